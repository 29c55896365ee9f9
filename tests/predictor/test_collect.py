"""The collector: the same configurations every time, spread over the run, and resumed where it stopped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.operations import LayerKind
from predictor import collect
from predictor.collect import RECIPES, Config, configurations, finished_configs, interleaved
from predictor.get_datasets_func import COLUMNS, csv_path, load_dataset
from predictor.kernel_flops import row_work
from predictor.predictor_utils import load_predictor
from utils.errors import DataSetError
from utils.timing import Timing

FEW_ROWS = {LayerKind.CONV: 12, LayerKind.LINEAR: 9, LayerKind.ADD: 8}


class FakeClock:
    """Stands in for measure_layer: a made-up time, and Ctrl-C after a number of rows."""

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.measured: list[tuple[LayerKind, Config]] = []

    def __call__(self, kind: LayerKind, config: Config, device: str) -> Timing:
        if len(self.measured) == self.rows:
            raise KeyboardInterrupt
        self.measured.append((kind, config))
        latency_ms = 0.001 + row_work(kind, config).flops / 1e9
        return Timing(latency_ms, latency_ms, latency_ms, 0.0, 5)


Collect = Callable[..., FakeClock]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collect little, and leave the number of threads to others as it was."""
    monkeypatch.setattr(collect, "ROWS", FEW_ROWS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Collect:
    """The function that collects into a directory with a fake clock, and returns the clock."""

    def collect_into(directory: Path, rows: int | None = None) -> FakeClock:
        clock = FakeClock(rows)
        monkeypatch.setattr(collect, "measure_layer", clock)
        try:
            collect.collect(directory, "cpu", 1.0)
        except KeyboardInterrupt:
            assert rows is not None
        return clock

    return collect_into


def contents(directory: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(directory.glob("*.csv"))}


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("kind", RECIPES)
def test_configurations_are_always_the_same_and_all_different(kind: LayerKind) -> None:
    first = configurations(kind, 30)
    assert first == configurations(kind, 30)
    assert len({tuple(config.values()) for config in first}) == 30


@pytest.mark.parametrize("kind", RECIPES)
def test_more_configurations_begin_with_the_fewer(kind: LayerKind) -> None:
    assert configurations(kind, 20)[:10] == configurations(kind, 10)


@pytest.mark.parametrize("kind", RECIPES)
def test_no_configuration_is_too_large_to_measure(kind: LayerKind) -> None:
    for config in configurations(kind, 40):
        work = row_work(kind, config)
        assert 0 < work.output_bytes <= collect.MAX_TENSOR_BYTES
        assert work.flops <= collect.MAX_GFLOPS * 1e9


@pytest.mark.parametrize("kind", RECIPES)
def test_a_configuration_builds_a_layer_that_can_be_timed(kind: LayerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[torch.Tensor] = []

    def once(function: Callable[[], torch.Tensor], device: str) -> Timing:
        outputs.append(function())
        return Timing.of([1.0])

    monkeypatch.setattr(collect, "measure", once)
    for config in configurations(kind, 4):
        collect.measure_layer(kind, config, "cpu")
        assert outputs[-1].nbytes == row_work(kind, config).output_bytes


def test_kinds_are_spread_evenly_over_the_run() -> None:
    plans = {LayerKind.CONV: [{"n": n} for n in range(20)], LayerKind.ADD: [{"n": n} for n in range(10)]}
    kinds = [kind for kind, _ in interleaved(plans)]
    assert len(kinds) == 30
    for start in range(0, 30, 6):
        assert kinds[start : start + 6].count(LayerKind.ADD) == 2


def test_each_kind_keeps_its_order_over_the_run() -> None:
    plans = {LayerKind.CONV: [{"n": n} for n in range(7)], LayerKind.ADD: [{"n": n} for n in range(3)]}
    for wanted, plan in plans.items():
        assert [config for kind, config in interleaved(plans) if kind is wanted] == plan


# ---------------------------------------------------------------- collecting


def test_a_run_writes_every_row_behind_the_columns_of_the_contract(tmp_path: Path, run: Collect) -> None:
    run(tmp_path)
    for kind, rows in FEW_ROWS.items():
        assert len(load_dataset(tmp_path, kind).latency_ms) == rows
        header = csv_path(tmp_path, kind).read_text().splitlines()[0]
        assert header.startswith(",".join(COLUMNS[kind]))


@pytest.mark.parametrize("rows", [0, 1, 10, 28])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, run: Collect, rows: int) -> None:
    run(tmp_path / "whole")
    first = run(tmp_path / "parts", rows)
    second = run(tmp_path / "parts")
    assert len(first.measured) == rows
    assert len(first.measured) + len(second.measured) == sum(FEW_ROWS.values())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_finished_run_measures_nothing_again(tmp_path: Path, run: Collect) -> None:
    run(tmp_path)
    assert run(tmp_path).measured == []


def test_a_line_cut_off_by_a_power_failure_is_measured_again(tmp_path: Path, run: Collect) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts")
    path = csv_path(tmp_path / "parts", LayerKind.CONV)
    path.write_text(path.read_text()[:-9])
    assert len(run(tmp_path / "parts").measured) == 1
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_header_cut_off_by_a_power_failure_is_written_again(tmp_path: Path, run: Collect) -> None:
    csv_path(tmp_path, LayerKind.CONV).write_text("HW,ker")
    run(tmp_path)
    assert len(load_dataset(tmp_path, LayerKind.CONV).latency_ms) == FEW_ROWS[LayerKind.CONV]


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, run: Collect) -> None:
    path = csv_path(tmp_path, LayerKind.CONV)
    path.write_text("HW,kernel,stride,Cin,Cout,FLOPs,latency\n8,3,1,4,4,1000,0.5\n")
    before = path.read_text()
    with pytest.raises(DataSetError, match=r"conv_lat\.csv has other columns"):
        run(tmp_path)
    assert path.read_text() == before


def test_a_missing_file_has_no_finished_rows(tmp_path: Path) -> None:
    assert finished_configs(tmp_path / "none.csv", LayerKind.CONV) == set()


def test_flops_are_written_as_whole_numbers(tmp_path: Path, run: Collect) -> None:
    run(tmp_path)
    with csv_path(tmp_path, LayerKind.CONV).open() as file:
        assert all(row["FLOPs"].isdigit() for row in csv.DictReader(file))


# ---------------------------------------------------------------- the command


def test_the_command_collects_fits_and_says_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "measure_layer", FakeClock())
    config = tmp_path / "config.json"
    arguments = ["--side", "edge", "--threads", "1", "--output", str(tmp_path / "data"), "--config", str(config)]
    assert collect.main(arguments) == 0
    provenance = json.loads((tmp_path / "data" / "provenance.json").read_text())
    assert set(provenance) >= {"side", "device", "device_name", "threads", "torch", "date"}
    predictor = load_predictor(config)
    assert set(predictor.coefficients) == set(FEW_ROWS)
    assert predictor.threads == 1


def test_rows_of_another_machine_are_never_mixed_with_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collect, "measure_layer", FakeClock())
    arguments = ["--side", "edge", "--output", str(tmp_path), "--config", str(tmp_path / "config.json"), "--threads"]
    assert collect.main([*arguments, "1"]) == 0
    provenance = tmp_path / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"threads": 1', '"threads": 4'))
    assert collect.main([*arguments, "1"]) == 2
    assert "--fresh" in capsys.readouterr().err
    clock = FakeClock()
    monkeypatch.setattr(collect, "measure_layer", clock)
    assert collect.main([*arguments, "1", "--fresh"]) == 0
    assert len(clock.measured) == sum(FEW_ROWS.values())
