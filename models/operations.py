"""What one traced operation is: its kind, the columns that describe it, and its FLOPs.

The columns are those of the kind's data set, so that a traced layer and a measured row speak of the same things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from torch import fx, nn

from models.shapes import ACTIVATIONS, TensorSpec, pair


class LayerKind(StrEnum):
    """What a node computes; each kind has its own data set and predictor."""

    INPUT = "input"
    CONV = "conv"
    DW_CONV = "dw_conv"
    LINEAR = "linear"
    MAXPOOL = "maxpool"
    AVGPOOL = "avgpool"
    BATCHNORM = "batchnorm"
    ACTIVATION = "activation"
    ADD = "add"
    MULTIPLY = "multiply"
    CONCAT = "concat"
    DROPOUT = "dropout"
    FLATTEN = "flatten"
    SHUFFLE = "shuffle"  # makes a transposed tensor dense
    VIEW = "view"  # looks at a tensor in another way, or at a part of it: nothing is computed or moved
    BLOCK = "block"  # a layer of several nodes
    OTHER = "other"  # traced and cut like any other, but nothing predicts it


# Modules by name; functions have the same names. A data set has the name's position.
_ACTIVATION_MODULES = {module.__name__.lower(): module for module in ACTIVATIONS}
ACTIVATION_NAMES = tuple(_ACTIVATION_MODULES)


class Operation(NamedTuple):
    """Kind, data-set columns and FLOPs (2 per multiply-add) of an operation."""

    kind: LayerKind
    params: Mapping[str, int]
    flops: int


class Call(NamedTuple):
    """One traced call: of a module, or of a function with its arguments; and the tensors that it reads and makes."""

    module: Any  # None for a function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: Sequence[TensorSpec]
    output: TensorSpec


Describer = Callable[[Call], Operation]


def describe(
    node: fx.Node, module: nn.Module | None, reads: Sequence[TensorSpec], output: TensorSpec | None
) -> Operation:
    """Return what a traced node is; one that makes no single tensor (a size, a tuple of parts) is a view."""
    if node.op == "placeholder":
        return Operation(LayerKind.INPUT, {}, 0)
    if output is None or not reads:
        return Operation(LayerKind.VIEW, {}, 0)
    call = Call(module, node.args, node.kwargs, reads, output)
    describer = _DESCRIBERS.get(_function_name(node)) if module is None else _module_describer(module)
    return (describer or _elementwise(LayerKind.OTHER, 1))(call)


def _function_name(node: fx.Node) -> str:
    """Return the name that a function has alike in torch, as a method and as an operator."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _module_describer(module: nn.Module) -> Describer | None:
    return next((_DESCRIBERS[base] for base in type(module).__mro__ if base in _DESCRIBERS), None)


def _plane(spec: TensorSpec) -> dict[str, int]:
    """Return feature-map width and channels; a flat tensor has width 1."""
    if len(spec.shape) == 4:
        return {"HW": spec.shape[-1], "Cin": spec.shape[1]}
    return {"HW": 1, "Cin": spec.numel}


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    """Return an argument of a function, or the attribute of the same name of a module."""
    if call.module is not None:
        return getattr(call.module, name, default)
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def _conv(call: Call) -> Operation:
    module, output = call.module, call.output
    groups = module.groups
    params = {
        **_plane(call.reads[0]),
        "kernel": round(math.sqrt(math.prod(pair(module.kernel_size)))),
        "stride": pair(module.stride)[0],
        "padding": pair(module.padding)[0] if not isinstance(module.padding, str) else 0,
        "Cout": module.out_channels,
        "groups": groups,
        "bias": int(module.bias is not None),
    }
    kind = LayerKind.DW_CONV if groups == module.in_channels and groups > 1 else LayerKind.CONV
    return Operation(kind, params, 2 * output.numel * module.weight[0].numel())


def _linear(call: Call) -> Operation:
    module = call.module
    params = {"in_features": module.in_features, "out_features": module.out_features}
    return Operation(LayerKind.LINEAR, params, 2 * call.output.numel * module.in_features)


def _maxpool(call: Call) -> Operation:
    kernel = pair(_argument(call, 1, "kernel_size", 1))[0]
    stride = _argument(call, 2, "stride", None)
    params = {
        **_plane(call.reads[0]),
        "kernel": kernel,
        "stride": pair(stride)[0] if stride else kernel,
        "padding": pair(_argument(call, 3, "padding", 0))[0],
    }
    return Operation(LayerKind.MAXPOOL, params, call.output.numel * kernel * kernel)


def _avgpool(call: Call) -> Operation:
    """Describe a window of fixed size."""
    kernel = pair(_argument(call, 1, "kernel_size", 1))[0]
    params = {**_plane(call.reads[0]), "output": call.output.shape[-1], "kernel": kernel}
    return Operation(LayerKind.AVGPOOL, params, call.output.numel * kernel * kernel)


def _adaptive_avgpool(call: Call) -> Operation:
    plane = _plane(call.reads[0])
    output = call.output.shape[-1] if len(call.output.shape) == 4 else 1
    return Operation(
        LayerKind.AVGPOOL, {**plane, "output": output, "kernel": -(-plane["HW"] // output)}, call.reads[0].numel
    )


def _activation(name: str) -> Describer:
    def describe(call: Call) -> Operation:
        inplace = bool(_argument(call, 1, "inplace", False))
        params = {**_plane(call.reads[0]), "function": ACTIVATION_NAMES.index(name), "inplace": int(inplace)}
        return Operation(LayerKind.ACTIVATION, params, call.output.numel)

    return describe


def _elementwise(kind: LayerKind, flops_per_element: int) -> Describer:
    def describe(call: Call) -> Operation:
        return Operation(kind, _plane(call.reads[0]), flops_per_element * call.output.numel)

    return describe


def _sum_or_product(kind: LayerKind) -> Describer:
    """Describe a sum or product of tensors: of one shape, or where the second is a factor for each channel."""

    def describe(call: Call) -> Operation:
        smaller = min(read.numel for read in call.reads) if len(call.reads) > 1 else 0
        params = {**_plane(call.output), "broadcast": int(smaller < call.output.numel)}
        return Operation(kind, params, call.output.numel)

    return describe


def _concat(call: Call) -> Operation:
    return Operation(LayerKind.CONCAT, {**_plane(call.output), "inputs": len(call.reads)}, 0)


def _view(call: Call) -> Operation:
    return Operation(LayerKind.VIEW, {}, 0)


def _reshape(call: Call) -> Operation:
    """Describe a change of shape: of a feature map it moves every element (channels-last), else it is a view."""
    is_plane = len(call.reads[0].shape) == 4 and len(call.output.shape) < 4
    return _elementwise(LayerKind.FLATTEN, 0)(call) if is_plane else _view(call)


_DESCRIBERS: dict[type[nn.Module] | str, Describer] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.MaxPool2d: _maxpool,
    nn.AvgPool2d: _avgpool,
    nn.AdaptiveAvgPool2d: _adaptive_avgpool,
    nn.BatchNorm2d: _elementwise(LayerKind.BATCHNORM, 2),
    nn.Dropout: _elementwise(LayerKind.DROPOUT, 0),
    nn.Identity: _elementwise(LayerKind.DROPOUT, 0),
    nn.Flatten: _reshape,
    **{module: _activation(name) for name, module in _ACTIVATION_MODULES.items()},
    **{function: _activation(name) for name in ACTIVATION_NAMES for function in (name, name + "_")},
    "max_pool2d": _maxpool,
    "avg_pool2d": _avgpool,
    "adaptive_avg_pool2d": _adaptive_avgpool,
    "mean": _adaptive_avgpool,  # over the feature map
    "cat": _concat,
    "concat": _concat,
    "contiguous": _elementwise(LayerKind.SHUFFLE, 0),
    **dict.fromkeys(("add", "iadd", "add_"), _sum_or_product(LayerKind.ADD)),
    **dict.fromkeys(("mul", "imul", "mul_"), _sum_or_product(LayerKind.MULTIPLY)),
    **dict.fromkeys(("dropout", "stochastic_depth"), _elementwise(LayerKind.DROPOUT, 0)),
    **dict.fromkeys(("flatten", "reshape", "view"), _reshape),
    **dict.fromkeys(("getitem", "getattr", "chunk", "transpose", "permute", "unsqueeze", "squeeze", "size"), _view),
}
