"""Hold out rows as named, average over networks, and write all reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from openpyxl import load_workbook
from PIL import Image

from neurosurgeon.cli import evaluate as evaluate_cli
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor import evaluate, whole_networks
from neurosurgeon.predictor.evaluate import Evaluation, channel_folds, random_folds, score_kind, summaries, width_folds
from neurosurgeon.predictor.get_datasets_func import DataSet, load_dataset
from neurosurgeon.predictor.whole_networks import NetworkScore, RemeasuredRows


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Data sets of all kinds that two small networks have."""
    rng = np.random.default_rng(0)
    planes = [(int(rng.integers(2, 60)), int(rng.integers(4, 300))) for _ in range(150)]
    by_area = [(w, c, w * w * c / 1e6 + 0.01) for w, c in planes]
    rows = {
        "conv": ["HW,kernel,stride,Cin,Cout,FLOPs,latency", *(f"{w},3,1,{c},{c},0,{c * ms}" for w, c, ms in by_area)],
        "dw_conv": ["HW,kernel,stride,Cin,FLOPs,latency", *(f"{w},3,1,{c},0,{ms}" for w, c, ms in by_area)],
        "linear": ["in_features,out_features,FLOPs,latency", *(f"{w},{c},0,{w * c / 1e6 + 0.01}" for w, c in planes)],
        "maxpool": ["HW,kernel,stride,Cin,latency", *(f"{w},2,2,{c},{ms}" for w, c, ms in by_area)],
        "avgpool": ["HW,output,Cin,latency", *(f"{w},1,{c},{ms}" for w, c, ms in by_area)],
    }
    for kind in ("batchnorm", "activation", "add", "multiply", "concat", "dropout", "flatten", "shuffle"):
        rows[kind] = ["HW,Cin,latency", *(f"{w},{c},{ms}" for w, c, ms in by_area)]
    folder = tmp_path / "data"
    folder.mkdir()
    for kind, lines in rows.items():
        (folder / f"{kind}_lat.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def convs(directory: Path) -> DataSet:
    return load_dataset(directory, LayerKind.CONV)


def test_left_out_sizes_are_whole_sizes(convs: DataSet) -> None:
    folds, widths = width_folds(convs), convs.tree_features[:, 0]
    for width in np.unique(widths):
        assert len(set(folds[widths == width])) == 1
    assert len(set(folds)) == evaluate.FOLDS


def test_left_out_channels_are_whole_ranges(convs: DataSet) -> None:
    folds = channel_folds(convs)
    channels = convs.features[:, 3] / convs.features[:, 7]
    ranges = sorted((channels[folds == fold].min(), channels[folds == fold].max()) for fold in set(folds))
    assert len(ranges) == evaluate.FOLDS
    assert all(before[1] < after[0] for before, after in zip(ranges, ranges[1:], strict=False))


def test_random_folds_hold_out_every_row_once(convs: DataSet) -> None:
    assert np.bincount(random_folds(convs).astype(int), minlength=evaluate.FOLDS).min() > 10


@pytest.mark.parametrize("name", evaluate.PREDICTORS)
def test_a_simple_law_scores_well_on_random_rows(convs: DataSet, name: str) -> None:
    score = score_kind(LayerKind.CONV, convs, name, "random rows")
    assert score.rows == len(convs)
    assert 0 < score.mape < 0.5
    assert score.r2 > 0.8
    assert 0.75 <= score.coverage <= 1


def test_summaries_average_over_networks() -> None:
    networks = [
        NetworkScore("a", 10.0, 10.5, 0.01, {"forest": 10.5}, {"forest": True}, {"forest": 0}),
        NetworkScore("b", 10.0, 10.5, 0.01, {"forest": 8.0}, {"forest": False}, {"forest": 3}),
    ]
    summary = summaries(Evaluation("edge", [], {}, 0.9, networks))
    assert summary["mean error"]["forest"] == pytest.approx(0.125)
    assert summary["within 10 %"]["forest"] == 0.5
    assert summary["mean error less drift"]["forest"] == pytest.approx((0.055 + 0.28) / 2)
    assert summary["inside the 90 % interval"]["forest"] == 0.5


def test_remeasured_rows_have_drift_and_noise() -> None:
    config = {"HW": 56, "Cin": 256}
    remeasured = RemeasuredRows([(1e-3, LayerKind.BATCHNORM, config), (1000.0, LayerKind.BATCHNORM, config)], "cpu")
    for counts in (False, True, True):
        remeasured.measure(0, counts)
    assert 0 < remeasured.drift < 0.1  # this layer takes less than 100 ms
    assert set(remeasured.noise()) == {"batchnorm"}


def test_no_remeasured_rows_have_no_drift() -> None:
    assert RemeasuredRows([], "cpu").drift == 1.0
    assert RemeasuredRows([], "cpu").noise() == {}


def test_the_command_prints_and_writes_everything(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whole_networks, "NETWORKS", ("squeezenet1_1", "mnasnet0_5"))
    output = tmp_path / "out"
    arguments = ["--side", "edge", "--dataset", str(directory), "--output", str(output), "--rounds", "2", "--compare"]
    assert evaluate_cli.main([*arguments, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "extra trees" in out
    assert "squeezenet1_1" in out
    document = json.loads((output / "evaluation.json").read_text())
    assert [network["network"] for network in document[0]["networks"]] == ["squeezenet1_1", "mnasnet0_5"]
    assert load_workbook(output / "evaluation.xlsx").sheetnames == ["edge layers", "edge networks"]
    with Image.open(output / "evaluation.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rounds", "1"], "--rounds must be at least 2"), (["--dataset", "x"], "--dataset belongs to one side")],
)
def test_a_wrong_command_line_has_a_message_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_cli.main(arguments) == 2
    assert said in capsys.readouterr().err
