"""Measure the speed of a machine in bursts, keep it with its date, and measure it again when it is in doubt."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor import layer_timing
from neurosurgeon.predictor import machine_speed as speeds
from neurosurgeon.predictor.features import feature_matrix, tree_matrix
from neurosurgeon.predictor.kernel_flops import row_work
from neurosurgeon.predictor.kind_models import Family, family_of
from neurosurgeon.predictor.layer_timing import RunnableLayer, time_layers
from neurosurgeon.predictor.machine_speed import (
    BURSTS,
    BUSY_AGE_S,
    DISAGREEMENT,
    MAX_AGE_DAYS,
    MIN_AGE_S,
    SECONDS_PER_DAY,
    MachineSpeed,
    doubt_machine_speed,
    kept_machine_speed,
    machine_speed,
    measure_machine_speed,
    reference_layers,
    scaled_by_speed,
    scales_of,
)
from neurosurgeon.predictor.places import config_path
from neurosurgeon.predictor.predictor_utils import SIDES, LatencyPredictor
from neurosurgeon.predictor.store import load_predictor
from neurosurgeon.utils.files import cache_directory
from neurosurgeon.utils.machine import CpuUse, forget_speeds
from tests.networks import trace_module
from tests.predictor.samples import ONES, linear_model

LAYERS = len(reference_layers())


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[MachineSpeed]:
    """The measured speeds so far; each measurement is of a slower machine than the last."""
    found: list[MachineSpeed] = []

    def measure(device: str, threads: int) -> MachineSpeed:
        found.append(speed_of(len(found) + 1.0))
        return found[-1]

    monkeypatch.setattr(speeds, "measure_machine_speed", measure)
    return found


def speed_of(layer_ms: float, age_s: float = 0.0, was_busy: bool = False) -> MachineSpeed:
    date = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    return MachineSpeed((layer_ms,) * LAYERS, date.isoformat(), 0.5, 1.1, was_busy)


def kept() -> Path:
    return next((cache_directory() / "speeds").glob("*.json"))


def keep_with_age(age_s: float) -> None:
    document = json.loads(kept().read_text())
    kept().write_text(json.dumps(document | {"date": speed_of(1.0, age_s).date}))


# ---------------------------------------------------------------- measuring


def test_reference_layers_are_constant_and_of_all_families() -> None:
    assert speeds.reference_layers.__wrapped__() == reference_layers()
    families = [family_of(kind, config) for kind, config in reference_layers()]
    assert min(families.count(family) for family in Family) >= 7
    assert all(row_work(kind, config).output_bytes > 0 for kind, config in reference_layers())


def test_measure_machine_speed_restores_the_threads() -> None:
    before = torch.get_num_threads()
    speed = measure_machine_speed("cpu", 1)
    assert torch.get_num_threads() == before
    assert len(speed.layers_ms) == LAYERS
    assert speed.spread >= 1
    assert abs(speed.age_s) < SECONDS_PER_DAY


@pytest.fixture
def bursts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[float]]]:
    """The bursts that measurements find, the next ones first; each is the time of every layer."""
    waiting: list[list[float]] = []

    def next_bursts(*_: object) -> list[list[float]]:
        taken = waiting[:BURSTS]
        del waiting[:BURSTS]
        return taken

    monkeypatch.setattr(speeds, "_bursts", next_bursts)
    monkeypatch.setattr(speeds, "build_layers", lambda *_: [])
    monkeypatch.setattr(speeds, "BURST_PAUSE_S", 0.0)
    yield waiting
    assert not waiting


def test_measure_machine_speed_takes_the_fastest_burst(bursts: list[list[float]]) -> None:
    bursts += [[1.0] * LAYERS, [1.2] * LAYERS, [0.9] * (LAYERS - 1) + [2.0]]
    speed = measure_machine_speed("cpu", 1)
    assert speed.layers_ms == (0.9,) * (LAYERS - 1) + (1.0,)
    assert not speed.was_busy


def test_bursts_that_disagree_are_measured_again(bursts: list[list[float]]) -> None:
    bursts += [[9.0] * LAYERS, [1.0] * LAYERS, [8.0] * LAYERS]  # busy for a moment
    bursts += [[1.1] * LAYERS, [7.0] * LAYERS, [1.2] * LAYERS]
    speed = measure_machine_speed("cpu", 1)
    assert speed.layers_ms == (1.0,) * LAYERS
    assert speed.spread == pytest.approx(1.2)
    assert not speed.was_busy


def test_a_machine_that_stays_busy_is_marked(bursts: list[list[float]]) -> None:
    bursts += [[value] * LAYERS for value in (9.0, 1.0, 8.0, 9.0, 7.0, 3.0)]
    speed = measure_machine_speed("cpu", 1)
    assert speed.layers_ms == (1.0,) * LAYERS
    assert speed.was_busy
    assert speed.spread > DISAGREEMENT


@pytest.mark.parametrize(("threads", "expected_ms"), [(1, 2.0), (2, 30.0)])
def test_time_layers_uses_the_cpu_time_of_a_single_thread(
    threads: int, expected_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_timing, "now_ms", iter([100.0, 130.0]).__next__)
    monkeypatch.setattr(layer_timing, "thread_ms", iter([7.0, 9.0]).__next__)
    monkeypatch.setattr(layer_timing.torch, "get_num_threads", lambda: threads)
    assert time_layers([RunnableLayer(abs, (torch.ones(1),))], "cpu") == [expected_ms]


# ---------------------------------------------------------------- keeping


def test_machine_speed_is_measured_once_and_kept(measured: list[MachineSpeed]) -> None:
    assert kept_machine_speed("cpu", 1) is None
    assert machine_speed("cpu", 1) == machine_speed("cpu", 1) == kept_machine_speed("cpu", 1) == measured[0]
    assert machine_speed("cpu", 2) == measured[1]
    assert len(measured) == 2


@pytest.mark.parametrize("date", ["yesterday", "2026-11-30T12:00:00", 5])
def test_a_speed_without_a_date_is_measured_again(date: object, measured: list[MachineSpeed]) -> None:
    machine_speed("cpu", 1)
    kept().write_text(json.dumps(json.loads(kept().read_text()) | {"date": date}))
    assert machine_speed("cpu", 1) == measured[1]


@pytest.mark.parametrize(
    "damage",
    ["", "{}", "[]", '{"version": 0}', '{"version": 2, "layers_ms": [1.0], "date": "x"}', "[" * 100_000],
)
def test_a_damaged_file_is_measured_again(damage: str, measured: list[MachineSpeed]) -> None:
    machine_speed("cpu", 1)
    kept().write_text(damage)
    assert machine_speed("cpu", 1) == measured[1]
    assert kept_machine_speed("cpu", 1) == measured[1]


@pytest.mark.parametrize(("age_s", "times"), [(SECONDS_PER_DAY, 1), (MAX_AGE_DAYS * SECONDS_PER_DAY + 1, 2), (-60, 2)])
def test_an_old_speed_is_measured_again(age_s: float, times: int, measured: list[MachineSpeed]) -> None:
    machine_speed("cpu", 1)
    keep_with_age(age_s)
    machine_speed("cpu", 1)
    assert len(measured) == times


def test_the_speed_of_a_busy_machine_expires_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "measure_machine_speed", lambda *_: speed_of(1.0, was_busy=True))
    machine_speed("cpu", 1)
    keep_with_age(BUSY_AGE_S / 2)
    assert kept_machine_speed("cpu", 1) is not None
    keep_with_age(BUSY_AGE_S + 1)
    assert kept_machine_speed("cpu", 1) is None


@pytest.mark.parametrize(("threads", "free", "was_busy"), [(2, 2.0, False), (2, 1.2, True), (1, 0.2, False)])
def test_a_machine_without_free_cores_is_marked_busy(
    threads: int, free: float, was_busy: bool, bursts: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bursts += [[1.0] * LAYERS] * BURSTS
    uses = iter([CpuUse(0.0, 0.0, 0.0), CpuUse(10.0, 10.0 * free, 0.0)])
    monkeypatch.setattr(speeds.CpuUse, "now", lambda: next(uses))
    assert measure_machine_speed("cpu", threads).was_busy == was_busy


def test_forgotten_speeds_are_measured_again(measured: list[MachineSpeed]) -> None:
    forget_speeds()  # nothing is kept yet
    machine_speed("cpu", 1)
    forget_speeds()
    assert kept_machine_speed("cpu", 1) is None


@pytest.mark.parametrize(("age_s", "is_kept"), [(MIN_AGE_S / 2, True), (MIN_AGE_S * 2, False)])
def test_a_doubted_speed_is_measured_again_unless_it_is_young(
    age_s: float, is_kept: bool, measured: list[MachineSpeed]
) -> None:
    doubt_machine_speed("cpu", 1)  # nothing is kept yet
    machine_speed("cpu", 1)
    keep_with_age(age_s)
    doubt_machine_speed("cpu", 1)
    assert (kept_machine_speed("cpu", 1) is not None) == is_kept


def test_a_speed_that_cannot_be_kept_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, measured: list[MachineSpeed]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine_speed("cpu", 1) == measured[0]
    assert "cannot be kept" in caplog.text
    forget_speeds()


@pytest.mark.parametrize("changes", [{"layers_ms": (1.0,)}, {"layers_ms": (0.0,) * LAYERS}, {"spread": float("nan")}])
def test_a_speed_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(speed_of(1.0), **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- scales


def times_on(predictor: LatencyPredictor, factors: Mapping[Family, float]) -> list[float]:
    """Return the latencies of the reference layers on a machine that differs from the data's by these factors, ms."""
    times_ms = []
    for kind, config in reference_layers():
        work = [row_work(kind, config)]
        data_ms = predictor.kinds[kind].predict(feature_matrix(work), tree_matrix(kind, [config], work))[0]
        times_ms.append(float(data_ms) * factors[family_of(kind, config)])
    return times_ms


@pytest.mark.parametrize("side", SIDES)
def test_scales_of_another_machine_are_its_factors(side: str) -> None:
    predictor = load_predictor(config_path(side))
    factors = {family: 1.5 + number for number, family in enumerate(Family)}
    scales = scales_of(predictor, reference_layers(), times_on(predictor, factors))
    for family, scale in scales.items():
        np.testing.assert_allclose(scale, (factors[family], 1.0, 1.0), rtol=1e-9)


def test_scales_of_disagreeing_layers_have_wide_intervals() -> None:
    predictor = load_predictor(config_path("edge"))
    as_is_ms = times_on(predictor, dict.fromkeys(Family, 1.0))
    disturbed_ms = [ms * 2 ** (index % 2) for index, ms in enumerate(as_is_ms)]
    for factor, low, high in scales_of(predictor, reference_layers(), disturbed_ms).values():
        assert 1 < factor < 2
        assert low < 0.7
        assert high > 1.4


def test_a_family_without_data_scales_as_the_others_do() -> None:
    predictor = load_predictor(config_path("edge"))
    some = dataclasses.replace(
        predictor, kinds={kind: model for kind, model in predictor.kinds.items() if kind == "linear"}
    )
    layers = [layer for layer in reference_layers() if layer[0] == "linear"]
    scales = scales_of(some, layers, [1.0] * len(layers))
    assert scales[Family.DEPTHWISE] == scales[Family.LINEAR]
    nothing = scales_of(dataclasses.replace(predictor, kinds={}), layers, [1.0] * len(layers))
    assert set(nothing.values()) == {(1.0, 1.0, 1.0)}


# ---------------------------------------------------------------- scaled predictors


@pytest.fixture
def one_layer() -> LayerGraph:
    return trace_module(nn.Sequential(nn.Linear(4, 4)), (1, 4), "one")


def dated_speed(layer_ms: float, spread: float = 1.0) -> MachineSpeed:
    layers_ms = (layer_ms,) * len(reference_layers())
    return MachineSpeed(layers_ms, "2026-11-30T12:34:56+00:00", 0.25, spread, was_busy=spread > 1.5)


def test_scaled_by_speed_widens_the_intervals(one_layer: LayerGraph) -> None:
    predictor = LatencyPredictor("linear", {LayerKind.LINEAR: linear_model(ONES)}, {"device_name": "A", "threads": 2})
    as_is = predictor.predict(one_layer)
    scaled = scaled_by_speed(predictor, dated_speed(1.0), 1)
    scale = scaled.scales[Family.LINEAR]
    predicted = scaled.predict(one_layer)
    assert predicted.total() == pytest.approx(scale.factor * as_is.total())
    assert scale.high > 2.0  # layers that all take the same are unlike any machine
    assert predicted.high_ms[-1] == pytest.approx(scale.high * predicted.total())


def test_predictions_name_the_machine_of_their_data(one_layer: LayerGraph) -> None:
    predictor = LatencyPredictor("linear", {LayerKind.LINEAR: linear_model(ONES)}, {"device_name": "A", "threads": 2})
    assert predictor.predict(one_layer).origin == "data of A, threads: 2, as it is"
    origin = scaled_by_speed(predictor, dated_speed(1.0), 1).predict(one_layer).origin
    assert re.fullmatch(
        r"data of A, threads: 2, scaled by \S+ to \S+ to this machine, threads: 1 "
        r"\(measured 2026-11-30 12:34 UTC, load 0\.25\)",
        origin,
    )
    busy = scaled_by_speed(predictor, dated_speed(1.0, spread=2.5), 1).predict(one_layer).origin
    assert busy.endswith("while other programs kept it busy: --remeasure-machine on that machine measures it again")


def test_scaled_by_speed_warns_of_implausible_factors(caplog: pytest.LogCaptureFixture) -> None:
    predictor = load_predictor(config_path("edge"))
    scaled_by_speed(predictor, dated_speed(0.3), 1)
    assert not caplog.text
    scaled_by_speed(predictor, dated_speed(1000.0), 1)
    assert "is implausible" in caplog.text
