"""Description of traced operations: their kind, the columns of their kind's data set, and their FLOPs.

So a traced layer has the same columns as a measured row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from neurosurgeon.graph.spec import LayerKind, TensorSpec
from neurosurgeon.models.program import function_name, spec_of
from neurosurgeon.models.shapes import ACTIVATIONS, pair

log = logging.getLogger(__name__)


# Modules by name; functions have the same names. Data sets hold the position of the name.
_ACTIVATION_MODULES = {module.__name__.lower(): module for module in ACTIVATIONS}
ACTIVATION_NAMES = tuple(_ACTIVATION_MODULES)


class Operation(NamedTuple):
    """Kind, data-set columns and FLOPs (2 per multiply-add) of an operation."""

    kind: LayerKind
    params: Mapping[str, int]
    flops: int


class Call(NamedTuple):
    """One traced call of a module, or of a function with its arguments, and the tensors that it reads and makes."""

    module: Any  # None: a function is called
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: Sequence[TensorSpec]
    output: TensorSpec


Describer = Callable[[Call], Operation]


def describe(
    node: fx.Node, module: nn.Module | None, reads: Sequence[TensorSpec], output: TensorSpec | None
) -> Operation:
    """Return the description of a traced node; it is a view if its result is no single tensor (a size, a tuple)."""
    if node.op == "placeholder":
        return Operation(LayerKind.INPUT, {}, 0)
    if output is None or not reads:
        return Operation(LayerKind.VIEW, {}, 0)
    call = Call(module, node.args, node.kwargs, reads, output)
    describer = _DESCRIBERS.get(function_name(node)) if module is None else _module_describer(module)
    try:
        return (describer or _other)(call)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:  # its arguments are unusual
        log.debug("%s is described by its size alone: %s", node.name, exc)
        return _other(call)


def _module_describer(module: nn.Module) -> Describer | None:
    if type(module).__name__ == "StochasticDepth":
        return _DESCRIBERS["identity"]
    return next((_DESCRIBERS[base] for base in type(module).__mro__ if base in _DESCRIBERS), None)


def _plane(spec: TensorSpec) -> dict[str, int]:
    """Return the width and the channels of a feature map; for tokens (N, L, C), the width of a map with L positions."""
    if len(spec.shape) == 4:
        return {"HW": round(math.sqrt(math.prod(spec.shape[2:]))), "Cin": spec.shape[1]}
    if len(spec.shape) == 3:
        return {"HW": round(math.sqrt(spec.shape[1])), "Cin": spec.shape[2]}
    return {"HW": 1, "Cin": spec.numel}


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    """Return an argument of a function, or the attribute of the same name of a module."""
    if call.module is not None:
        return getattr(call.module, name, default)
    return call.args[position] if len(call.args) > position else call.kwargs.get(name, default)


def _shape(call: Call, position: int, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor argument; an empty one if it is missing."""
    value = _argument(call, position, name, None)
    if isinstance(value, fx.Node):
        return value.meta["spec"].shape if "spec" in value.meta else ()
    return tuple(value.shape) if value is not None else ()


def _conv(call: Call) -> Operation:
    weight = _shape(call, 1, "weight")  # (Cout, Cin / groups, kernel, kernel)
    groups = _argument(call, 6, "groups", 1)
    padding = _argument(call, 4, "padding", 0)
    plane = _plane(call.reads[0])
    params = {
        **plane,
        "kernel": round(math.sqrt(math.prod(weight[2:]))),
        "stride": pair(_argument(call, 3, "stride", 1))[0],
        "padding": pair(padding)[0] if not isinstance(padding, str) else 0,
        "Cout": weight[0],
        "groups": groups,
        "bias": int(bool(_shape(call, 2, "bias"))),
    }
    kind = LayerKind.DW_CONV if groups == plane["Cin"] and groups > 1 else LayerKind.CONV
    return Operation(kind, params, 2 * call.output.numel * math.prod(weight[1:]))


def _linear(call: Call) -> Operation:
    outputs, inputs = _shape(call, 1, "weight")
    if call.reads[0].numel == inputs:
        return Operation(LayerKind.LINEAR, {"in_features": inputs, "out_features": outputs}, 2 * inputs * outputs)
    return _product(1, call.output.numel // outputs, inputs, outputs, is_linear=True)


def _product(batch: int, rows: int, inner: int, columns: int, *, is_linear: bool = False) -> Operation:
    """Describe ``batch`` products of (rows, inner) and (inner, columns); ``is_linear``: the latter are weights."""
    params = {"batch": batch, "rows": rows, "inner": inner, "columns": columns, "linear": int(is_linear)}
    return Operation(LayerKind.MATMUL, params, 2 * batch * rows * inner * columns)


def _matmul(call: Call) -> Operation:
    first = call.reads[0].shape
    rows, inner = (first[-2] if len(first) > 1 else 1), first[-1]
    columns = call.output.shape[-1]
    return _product(max(call.output.numel // (rows * columns), 1), rows, inner, columns)


def _einsum(call: Call) -> Operation:
    """Describe a sum of products of two tensors as products of matrices."""
    terms, _, result = str(call.args[0]).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    if len(call.reads) != 2 or "." in terms or "," in second:
        return _other(call)
    sizes = dict(zip(first + second, (*call.reads[0].shape, *call.reads[1].shape), strict=True))
    groups = {"batch": set(first) & set(second) & set(result), "inner": set(first) & set(second) - set(result)}
    groups |= {"rows": set(first) - set(second), "columns": set(second) - set(first)}
    return _product(*(math.prod(sizes[axis] for axis in groups[name]) for name in PRODUCT_COLUMNS))


PRODUCT_COLUMNS = ("batch", "rows", "inner", "columns")


def _rows(kind: LayerKind, flops_per_element: int) -> Describer:
    """Describe an operation on each row of the last dimension."""

    def describe(call: Call) -> Operation:
        width = call.reads[0].shape[-1]
        params = {"rows": call.reads[0].numel // width, "width": width}
        return Operation(kind, params, flops_per_element * call.output.numel)

    return describe


def _attention(call: Call) -> Operation:
    """Describe the self-attention of a `MultiheadAttention` on tokens (N, L, C)."""
    tokens = call.reads[0].shape[1 if call.module.batch_first else 0]
    return _attention_of(call.reads[0].numel, tokens, call.module.embed_dim, call.module.num_heads, is_windowed=False)


def _window_attention(call: Call) -> Operation:
    """Describe torchvision's attention within windows of a map (N, H, W, C), which is padded to whole windows."""
    window = call.args[4]
    batch, *plane, width = call.reads[0].shape
    padded = [-(-size // side) * side for size, side in zip(plane, window, strict=True)]
    elements = batch * math.prod(padded) * width
    return _attention_of(elements, math.prod(window), width, call.args[5], is_windowed=True)


def _attention_of(elements: int, tokens: int, width: int, heads: int, *, is_windowed: bool) -> Operation:
    """Describe self-attention in groups of ``tokens``: four projections, the scores, and the weighted sums."""
    params = {"groups": elements // (tokens * width), "tokens": tokens, "width": width, "heads": heads}
    params["windowed"] = int(is_windowed)
    return Operation(LayerKind.ATTENTION, params, elements * (8 * width + 4 * tokens))


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
    """Describe an average pool with a window of fixed size."""
    kernel = pair(_argument(call, 1, "kernel_size", 1))[0]
    params = {**_plane(call.reads[0]), "output": call.output.shape[-1], "kernel": kernel}
    return Operation(LayerKind.AVGPOOL, params, call.output.numel * kernel * kernel)


def _adaptive_avgpool(call: Call) -> Operation:
    plane = _plane(call.reads[0])
    output = call.output.shape[-1] if len(call.output.shape) == 4 else 1
    return Operation(
        LayerKind.AVGPOOL, {**plane, "output": output, "kernel": -(-plane["HW"] // output)}, call.reads[0].numel
    )


def _mean(call: Call) -> Operation:
    """Describe a mean, which is a pool if it is over the feature map."""
    is_pool = len(call.reads[0].shape) == 4 and call.output.numel == math.prod(call.reads[0].shape[:2])
    return (_adaptive_avgpool if is_pool else _other)(call)


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


def _other(call: Call) -> Operation:
    """Describe an unknown operation: it uses every weight at every position of its input, in one multiply-add."""
    if call.module is not None:
        weights = sum(value.numel() for value in call.module.parameters())
    else:
        read = [node for node in tree_leaves((call.args, call.kwargs)) if isinstance(node, fx.Node)]
        weights = sum(spec_of(node).numel for node in read if node.op == "get_attr")
    if not weights:
        return _elementwise(LayerKind.OTHER, 1)(call)
    shape = call.reads[0].shape
    width = shape[1] if len(shape) > 3 else shape[-1] if shape else 1
    positions = call.reads[0].numel // max(width, 1)
    return Operation(LayerKind.WEIGHTED, _plane(call.reads[0]), 2 * weights * max(positions, 1))


def _sum_or_product(kind: LayerKind) -> Describer:
    """Describe a sum or product of tensors with one shape, or with a smaller tensor that is broadcast."""

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
    """Describe a change of shape: a view, unless it joins channels and positions, which moves all (channels-last)."""
    before, after = call.reads[0].shape, call.output.shape
    is_plane = len(before) == 4 and (len(after) == 2 or (len(after) == 3 and before[:2] != after[:2]))
    return _elementwise(LayerKind.FLATTEN, 0)(call) if is_plane else _view(call)


_VIEWS = (
    "getitem getattr chunk split tensor_split unbind transpose permute swapaxes movedim unsqueeze squeeze size expand "
    "detach t narrow select slice alias"
).split()
_IDENTITIES = ("dropout", "stochastic_depth", "feature_dropout", "identity")

_DESCRIBERS: dict[type[nn.Module] | str, Describer] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.MaxPool2d: _maxpool,
    nn.AvgPool2d: _avgpool,
    nn.AdaptiveAvgPool2d: _adaptive_avgpool,
    nn.BatchNorm2d: _elementwise(LayerKind.BATCHNORM, 2),
    nn.LayerNorm: _rows(LayerKind.LAYER_NORM, 8),
    nn.Softmax: _rows(LayerKind.SOFTMAX, 5),
    nn.MultiheadAttention: _attention,
    nn.Dropout: _elementwise(LayerKind.DROPOUT, 0),
    nn.Identity: _elementwise(LayerKind.DROPOUT, 0),
    nn.Flatten: _reshape,
    **{module: _activation(name) for name, module in _ACTIVATION_MODULES.items()},
    **{function: _activation(name) for name in ACTIVATION_NAMES for function in (name, name + "_")},
    "conv2d": _conv,
    "linear": _linear,
    "max_pool2d": _maxpool,
    "avg_pool2d": _avgpool,
    "adaptive_avg_pool2d": _adaptive_avgpool,
    "mean": _mean,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _elementwise(LayerKind.BATCHNORM, 2)),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _rows(LayerKind.LAYER_NORM, 8)),
    **dict.fromkeys(("softmax", "_softmax"), _rows(LayerKind.SOFTMAX, 5)),
    "einsum": _einsum,
    "shifted_window_attention": _window_attention,
    "cat": _concat,
    "concat": _concat,
    "contiguous": _elementwise(LayerKind.SHUFFLE, 0),
    "clone": _elementwise(LayerKind.SHUFFLE, 0),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("pad", "roll"), _elementwise(LayerKind.SHUFFLE, 0)),
    **dict.fromkeys(("add", "iadd", "add_", "sub", "isub", "rsub"), _sum_or_product(LayerKind.ADD)),
    **dict.fromkeys(("mul", "imul", "mul_", "truediv", "div", "itruediv"), _sum_or_product(LayerKind.MULTIPLY)),
    **dict.fromkeys(_IDENTITIES, _elementwise(LayerKind.DROPOUT, 0)),
    **dict.fromkeys(("flatten", "reshape", "view"), _reshape),
    **dict.fromkeys(_VIEWS, _view),
}
