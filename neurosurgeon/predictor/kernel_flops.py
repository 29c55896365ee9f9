"""Compute the FLOPs and bytes of a layer from the columns of its data set. A multiply-add counts as two FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from neurosurgeon.graph.layer_graph import Node
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.utils.errors import MissingPredictorError

FLOAT_BYTES = 4

TOKEN_KINDS = frozenset({LayerKind.MATMUL, LayerKind.LAYER_NORM, LayerKind.SOFTMAX, LayerKind.ATTENTION})  # (..., C)

Row = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """The arithmetic and memory traffic of a layer: the inputs of its features."""

    flops: float
    input_bytes: float
    output_bytes: float
    weight_bytes: float
    output_channels: float

    @property
    def traffic_bytes(self) -> float:
        """The bytes of inputs, outputs and weights together."""
        return self.input_bytes + self.output_bytes + self.weight_bytes


def node_work(node: Node) -> Work:
    """Return the work of a traced node."""
    shape = node.output.shape
    if node.kind in TOKEN_KINDS or len(shape) == 3:
        channels = shape[-1]
    else:
        channels = shape[1] if len(shape) > 1 else node.output.numel
    return Work(node.flops, node.input_bytes, node.output_bytes, node.weight_bytes, channels)


def row_work(kind: LayerKind, row: Row) -> Work:
    """Return the work of a data-set row; columns beyond the contract's have defaults.

    FLOPs are always computed from the other columns, because files count them in different ways. Defaults are padding
    kernel // 2 for convolutions and 0 for pools, one group, a bias, batch 1 and float32.

    Raises: MissingPredictorError: the kind has no data set.
    """
    if kind not in _WORK:
        raise MissingPredictorError(f"layers of kind {kind} have no data set")
    return _WORK[kind](row)


def output_width(width: float, kernel: float, stride: float, padding: float) -> float:
    """Return the width of a feature map after a sliding window."""
    return (width + 2 * padding - kernel) // stride + 1


def _conv(row: Row) -> Work:
    groups, kernel = row.get("groups", 1), row["kernel"]
    out = output_width(row["HW"], kernel, row["stride"], row.get("padding", kernel // 2))
    outputs = out * out * row["Cout"]
    weights = row["Cout"] * row["Cin"] / groups * kernel * kernel
    flops = 2 * outputs * row["Cin"] / groups * kernel * kernel
    weights += row["Cout"] * row.get("bias", 1)
    return _float32_work(flops, row["HW"] ** 2 * row["Cin"], outputs, weights, row["Cout"])


def _dw_conv(row: Row) -> Work:
    return _conv({"Cout": row["Cin"], "groups": row["Cin"], **row})


def _linear(row: Row) -> Work:
    inputs, outputs = row["in_features"], row["out_features"]
    return _float32_work(2 * inputs * outputs, inputs, outputs, (inputs + 1) * outputs, outputs)


def _maxpool(row: Row) -> Work:
    kernel = row["kernel"]
    out = output_width(row["HW"], kernel, row["stride"], row.get("padding", 0))
    outputs = out * out * row["Cin"]
    return _float32_work(outputs * kernel * kernel, row["HW"] ** 2 * row["Cin"], outputs, 0, row["Cin"])


def _avgpool(row: Row) -> Work:
    inputs, outputs = row["HW"] ** 2 * row["Cin"], row["output"] ** 2 * row["Cin"]
    window = row.get("kernel", row["HW"] / row["output"])
    return _float32_work(outputs * window * window, inputs, outputs, 0, row["Cin"])


def _elementwise(flops: int, weights: int = 0) -> Callable[[Row], Work]:
    """Return the work of an operation with so many FLOPs for each element, and weights for each channel."""

    def work(row: Row) -> Work:
        elements = row["HW"] ** 2 * row["Cin"]
        return _float32_work(flops * elements, elements, elements, weights * row["Cin"], row["Cin"])

    return work


def _sum_or_product(row: Row) -> Work:
    elements = row["HW"] ** 2 * row["Cin"]
    second = row["Cin"] if row.get("broadcast", 0) else elements
    return _float32_work(elements, elements + second, elements, 0, row["Cin"])


def _flatten(row: Row) -> Work:
    elements = row["HW"] ** 2 * row["Cin"]
    return _float32_work(0, elements, elements, 0, elements)


def _matmul(row: Row) -> Work:
    batch, rows, inner, columns = (row[name] for name in ("batch", "rows", "inner", "columns"))
    first, second, outputs = batch * rows * inner, batch * inner * columns, batch * rows * columns
    flops = 2 * batch * rows * inner * columns
    if row.get("linear", 1):
        return _float32_work(flops, first, outputs, second + columns, columns)
    return _float32_work(flops, first + second, outputs, 0, columns)


def _rows(flops: int, weights: int) -> Callable[[Row], Work]:
    def work(row: Row) -> Work:
        elements = row["rows"] * row["width"]
        return _float32_work(flops * elements, elements, elements, weights * row["width"], row["width"])

    return work


def _attention(row: Row) -> Work:
    groups, tokens, width = row["groups"], row["tokens"], row["width"]
    elements = groups * tokens * width
    return _float32_work(elements * (8 * width + 4 * tokens), elements, elements, 4 * width * (width + 1), width)


def _float32_work(flops: float, inputs: float, outputs: float, weights: float, channels: float) -> Work:
    return Work(flops, inputs * FLOAT_BYTES, outputs * FLOAT_BYTES, weights * FLOAT_BYTES, channels)


_WORK: dict[LayerKind, Callable[[Row], Work]] = {
    LayerKind.CONV: _conv,
    LayerKind.DW_CONV: _dw_conv,
    LayerKind.LINEAR: _linear,
    LayerKind.MAXPOOL: _maxpool,
    LayerKind.AVGPOOL: _avgpool,
    LayerKind.BATCHNORM: _elementwise(2, 2),
    LayerKind.ACTIVATION: _elementwise(1),
    LayerKind.ADD: _sum_or_product,
    LayerKind.MULTIPLY: _sum_or_product,
    LayerKind.CONCAT: _elementwise(0),
    LayerKind.DROPOUT: _elementwise(0),
    LayerKind.FLATTEN: _flatten,
    LayerKind.SHUFFLE: _elementwise(0),
    LayerKind.MATMUL: _matmul,
    LayerKind.LAYER_NORM: _rows(8, 2),
    LayerKind.SOFTMAX: _rows(5, 0),
    LayerKind.ATTENTION: _attention,
}
