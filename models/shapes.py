"""The shape of every result of a traced program, on meta tensors and without running the usual modules.

On meta tensors a convolution or a batch norm first imports a second of compiler, so the shapes of common modules are
worked out here. For the same reason this is not torch's `ShapeProp`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
ADDITIONS = (operator.add, operator.iadd, torch.add)
SHAPE_PRESERVING = (nn.BatchNorm2d, nn.Dropout, nn.Identity, *ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type of a tensor that does not exist yet."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return int(getattr(torch, self.dtype).itemsize)


NO_TENSOR = TensorSpec((0,))  # a size, or a tuple of parts


class ShapeRecorder(fx.Interpreter):
    """Runs a program on meta tensors and keeps a `TensorSpec` of every result in its node's ``meta["spec"]``."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module, unless its output's shape is known."""
        shape = _output_shape(self.fetch_attr(target), args[0].shape)
        return super().call_module(target, args, kwargs) if shape is None else args[0].new_empty(shape)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function, unless it adds two tensors of one shape and type."""
        kinds = {(value.shape, value.dtype) if isinstance(value, torch.Tensor) else None for value in args}
        if target in ADDITIONS and len(kinds) == 1 and None not in kinds:
            return args[0].new_empty(args[0].shape)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its result's description."""
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["spec"] = TensorSpec(tuple(result.shape), str(result.dtype).removeprefix("torch."))
        return result


def _output_shape(module: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
    """Return the output shape of a common module for an input of ``shape``; None where it must be run to know."""
    if isinstance(module, SHAPE_PRESERVING):
        return shape
    if isinstance(module, nn.Linear):
        return (*shape[:-1], module.out_features)
    if len(shape) != 4:
        return None
    if isinstance(module, nn.AdaptiveAvgPool2d) and None not in pair(module.output_size):
        return (*shape[:2], *pair(module.output_size))
    if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
        return (shape[0], module.out_channels, *_window_planes(module, shape))
    if isinstance(module, nn.MaxPool2d) and not (module.ceil_mode or module.return_indices):
        return (*shape[:2], *_window_planes(module, shape))
    return None


def _window_planes(module: Any, shape: Sequence[int]) -> list[int]:
    """Return height and width behind a sliding window."""
    sizes = (pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation))
    windows = zip(shape[2:], *sizes, strict=True)
    return [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in windows]


def pair(value: Any) -> tuple[int, int]:
    """Return a size for both directions, given as one number or as two."""
    return value if isinstance(value, tuple) else (value, value)
