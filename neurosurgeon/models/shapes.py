"""The shape of every result of a traced program, on meta tensors and without running the common modules.

On meta tensors, the first convolution or batch norm imports a compiler, which takes a second. So the shapes of common
modules are computed here, and torch's `ShapeProp` is not used.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from neurosurgeon.models.program import record_result

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh)
ADDITIONS = (operator.add, operator.iadd, torch.add)
SHAPE_PRESERVING = (nn.BatchNorm2d, nn.LayerNorm, nn.Dropout, nn.Identity, *ACTIVATIONS)


class ResultRecorder(fx.Interpreter):
    """Runs a program, and records the result of each operation."""

    current = "the input"  # the operation that runs, for messages of errors

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation and record its result."""
        self.current = str(n.target) if n.op == "call_module" else n.name
        result = super().run_node(n)
        record_result(n, result)
        return result


class ShapeRecorder(ResultRecorder):
    """Runs a program on meta tensors."""

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fetch an attribute; a tensor, without its data."""
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module, unless its output's shape is known."""
        is_usual = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        shape = _output_shape(self.fetch_attr(target), args[0].shape) if is_usual else None
        return super().call_module(target, args, kwargs) if shape is None else args[0].new_empty(shape)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function, unless it adds two tensors of one shape and type."""
        kinds = {(value.shape, value.dtype) if isinstance(value, torch.Tensor) else None for value in args}
        if target in ADDITIONS and len(kinds) == 1 and None not in kinds:
            return args[0].new_empty(args[0].shape)
        return super().call_function(target, args, kwargs)


def _output_shape(module: nn.Module, shape: Sequence[int]) -> Sequence[int] | None:
    """Return the output shape of a common module for an input of ``shape``; None if it must be run."""
    if isinstance(module, SHAPE_PRESERVING):
        return shape
    if isinstance(module, nn.Linear):
        if shape[-1] != module.in_features:
            raise ValueError(f"a linear layer expects {module.in_features} values, got {shape[-1]}")
        return (*shape[:-1], module.out_features)
    if len(shape) != 4:
        return None
    if isinstance(module, nn.AdaptiveAvgPool2d) and None not in pair(module.output_size):
        return (*shape[:2], *pair(module.output_size))
    if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
        if shape[1] != module.in_channels:
            raise ValueError(f"a convolution expects {module.in_channels} channels, got {shape[1]}")
        return (shape[0], module.out_channels, *_window_planes(module, shape))
    if isinstance(module, nn.MaxPool2d) and not (module.ceil_mode or module.return_indices):
        return (*shape[:2], *_window_planes(module, shape))
    return None


def _window_planes(module: Any, shape: Sequence[int]) -> list[int]:
    """Return the height and the width of a sliding window's output."""
    sizes = (pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation))
    windows = zip(shape[2:], *sizes, strict=True)
    planes = [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in windows]
    if min(planes) < 1:
        raise ValueError(f"a window of {module.kernel_size} is larger than its input of {tuple(shape[2:])}")
    return planes


def pair(value: Any) -> tuple[int, int]:
    """Return a size for both directions from one number or from two."""
    return (value[0], value[-1]) if isinstance(value, tuple | list) else (value, value)
