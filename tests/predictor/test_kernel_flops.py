"""Compute the same FLOPs and bytes from a data-set row as from a traced node, and as by hand."""

from __future__ import annotations

import pytest

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.names import ZOO
from neurosurgeon.predictor.kernel_flops import Row, Work, node_work, output_width, row_work
from neurosurgeon.utils.errors import MissingPredictorError
from tests.networks import model_graph


@pytest.mark.parametrize("name", ZOO)
def test_a_row_does_the_work_of_the_node_it_describes(name: str) -> None:
    for node in model_graph(name).nodes:
        if node.params:
            assert row_work(node.kind, node.params) == node_work(node), node.name


@pytest.mark.parametrize(
    ("kind", "row", "floats_in", "floats_out", "weights", "flops", "channels"),
    [
        (
            LayerKind.CONV,
            {"HW": 8, "kernel": 3, "stride": 2, "Cin": 4, "Cout": 6, "padding": 0},
            8 * 8 * 4,
            3 * 3 * 6,
            6 * 4 * 9 + 6,
            2 * 3 * 3 * 6 * 4 * 9,
            6,
        ),
        (
            LayerKind.DW_CONV,
            {"HW": 8, "kernel": 3, "stride": 1, "Cin": 4},
            8 * 8 * 4,
            8 * 8 * 4,
            4 * 9 + 4,
            2 * 8 * 8 * 4 * 9,
            4,
        ),
        (LayerKind.LINEAR, {"in_features": 10, "out_features": 7}, 10, 7, 10 * 7 + 7, 2 * 10 * 7, 7),
        (LayerKind.MAXPOOL, {"HW": 7, "kernel": 3, "stride": 2, "Cin": 4}, 196, 36, 0, 36 * 9, 4),
        (LayerKind.AVGPOOL, {"HW": 7, "output": 1, "Cin": 4}, 196, 4, 0, 196, 4),
        (LayerKind.BATCHNORM, {"HW": 5, "Cin": 4}, 100, 100, 8, 200, 4),
        (LayerKind.ACTIVATION, {"HW": 5, "Cin": 4}, 100, 100, 0, 100, 4),
        (LayerKind.ADD, {"HW": 5, "Cin": 4}, 200, 100, 0, 100, 4),
        (LayerKind.DROPOUT, {"HW": 5, "Cin": 4}, 100, 100, 0, 0, 4),
        (LayerKind.FLATTEN, {"HW": 5, "Cin": 4}, 100, 100, 0, 0, 100),
    ],
)
def test_work_by_hand(
    kind: LayerKind, row: Row, floats_in: int, floats_out: int, weights: int, flops: int, channels: int
) -> None:
    assert row_work(kind, row) == Work(flops, 4 * floats_in, 4 * floats_out, 4 * weights, channels)


def test_a_convolution_pads_by_half_its_kernel_by_default() -> None:
    row = {"HW": 8, "kernel": 5, "stride": 1, "Cin": 2, "Cout": 3}
    assert row_work(LayerKind.CONV, row) == row_work(LayerKind.CONV, {**row, "padding": 2, "groups": 1, "bias": 1})


def test_a_pool_does_not_pad_by_default() -> None:
    row = {"HW": 8, "kernel": 3, "stride": 2, "Cin": 2}
    assert row_work(LayerKind.MAXPOOL, row) == row_work(LayerKind.MAXPOOL, {**row, "padding": 0})


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        (LayerKind.CONV, {"HW": 8, "kernel": 3, "stride": 1, "Cin": 2, "Cout": 3}),
        (LayerKind.DW_CONV, {"HW": 8, "kernel": 3, "stride": 1, "Cin": 2}),
        (LayerKind.LINEAR, {"in_features": 3, "out_features": 4}),
    ],
)
def test_row_work_ignores_the_flops_of_the_file(kind: LayerKind, row: Row) -> None:
    assert row_work(kind, {**row, "FLOPs": 12345}) == row_work(kind, row)


@pytest.mark.parametrize(
    ("width", "kernel", "stride", "padding", "expected"), [(224, 11, 4, 2, 55), (55, 3, 2, 0, 27), (7, 7, 1, 0, 1)]
)
def test_output_width_after_a_sliding_window(width: int, kernel: int, stride: int, padding: int, expected: int) -> None:
    assert output_width(width, kernel, stride, padding) == expected


@pytest.mark.parametrize("kind", [LayerKind.OTHER, LayerKind.INPUT, LayerKind.BLOCK])
def test_a_kind_without_data_set_has_no_rows(kind: LayerKind) -> None:
    with pytest.raises(MissingPredictorError, match=f"{kind} have no data set"):
        row_work(kind, {})
