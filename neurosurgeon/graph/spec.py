"""Tensors and the kinds of layers: shared by every part of the project.

A tensor is a numpy array wherever no engine computes on it. numpy has no bfloat16: such a tensor is an array of its
bits, uint16. A batch of images (N, C, H, W) may lie in memory in the order N, H, W, C ("channels-last").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = tuple[Array, ...]

# Keys are torch's names of the types.
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
# By numpy's character of a type: ``str(dtype)`` would take 3 us, 5 % of the exchange of a small tensor.
TYPE_NAMES = {np.dtype(name).char: name for name in ITEM_BYTES if name != "bfloat16"} | {"H": "bfloat16"}
COLOURS = 3  # of an image
SYNTHETIC_SEED = 0
UNKNOWN = -1  # a size of a tensor that is known after running


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and element type of a tensor that does not exist yet; a size that depends on data is `UNKNOWN`."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def is_sized(self) -> bool:
        """Whether all sizes are known."""
        return UNKNOWN not in self.shape

    @property
    def numel(self) -> int:
        """Number of elements; 0 if it is unknown."""
        return math.prod(self.shape) if self.is_sized else 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the input of a network: torchvision's ImageClassification preset, or the network's own."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of the values 0 to 1, by colour
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize_share: float = 256 / 224  # of the shorter side to the crop
    interpolation: str = "bilinear"  # as Pillow calls it


IMAGENET = Preprocessing()
NO_TENSOR = TensorSpec((0,))  # of a result that is a size, or a tuple of parts


def takes_images(spec: TensorSpec) -> bool:
    """Return whether an input of a network is a batch of images with three colours."""
    return spec.dtype == "float32" and len(spec.shape) == 4 and spec.shape[1] == COLOURS


def dtype_of(array: Array) -> str:
    """Return the name of an array's element type: of uint16, the bits of bfloat16, that."""
    return TYPE_NAMES.get(array.dtype.char) or str(array.dtype)


def holds_scores(dimensions: int, dtype: str) -> bool:
    """Return whether an output may hold the scores of classes (1, classes)."""
    return dimensions == 2 and not dtype.startswith(("bool", "complex"))


def fits(array: Array, spec: TensorSpec) -> bool:
    """Return whether an array has a type and a shape, in which any size may be `UNKNOWN`."""
    sizes = zip(array.shape, spec.shape, strict=False)
    is_shape = array.ndim == len(spec.shape) and all(size == want or want == UNKNOWN for size, want in sizes)
    return is_shape and dtype_of(array) == spec.dtype


def as_floats(array: Array) -> Array:
    """Return the values of an array that numpy can calculate with: of bfloat16, float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def channels_last(array: Array) -> Array:
    """Return the same values (N, C, H, W), in memory as N, H, W, C; an array of other dimensions as it is."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if array.ndim == 4 else array


def synthetic_input(spec: TensorSpec) -> Array:
    """Return the input of a task that has none: noise, the same on every run.

    A network that takes images gets pixels, uint8; any other one standard normal values, float32.
    """
    generator = np.random.Generator(np.random.PCG64(SYNTHETIC_SEED))
    if not takes_images(spec):
        return channels_last(generator.standard_normal(spec.shape, dtype=np.float32))
    count, colours, height, width = spec.shape
    pixels = generator.integers(256, size=(count, height, width, colours), dtype=np.uint8)
    return pixels.transpose(0, 3, 1, 2)


class LayerKind(StrEnum):
    """The kind of operation of a node; each kind has its own data set and predictor."""

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
    MATMUL = "matmul"  # product of matrices, or of many pairs of them; a linear layer on many tokens
    LAYER_NORM = "layer_norm"
    SOFTMAX = "softmax"
    ATTENTION = "attention"  # projections, softmax and all, in one operation
    VIEW = "view"  # the same memory as another shape, or a part of it: nothing is computed or moved
    BLOCK = "block"  # a layer of several nodes
    WEIGHTED = "weighted"  # any other module with weights: a recurrent layer, a transposed convolution
    OTHER = "other"  # anything else
