"""Measure the speed of this machine: the latencies of reference layers, measured once and kept.

The data sets come from other machines. The latency of a layer here and there differs by a factor that depends on its
family: a processor with wider vectors is faster at convolutions, and no faster at weights that come from memory. So
layers of every family, as published networks have them, are measured here. Measured / predicted is the family's factor
(`scales_of`). The spread of the factors is the error that data of another machine adds.

A machine is rarely quiet, so the layers run in several bursts some time apart, and the fastest burst counts. A single
thread is timed by its CPU time, which other programs do not lengthen by taking turns with it; a burst gives the lower
quartile of its passes. Several threads wait for each other, and for cores that other programs use; a burst gives its
fastest pass. Bursts that disagree are repeated. A measurement on a busy machine is marked, and repeated soon.

The collector runs three more layers between its own (`control_layers`), to tell a slow minute from a slow layer.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import Columns, feature_matrix, tree_matrix
from neurosurgeon.predictor.kernel_flops import row_work
from neurosurgeon.predictor.kind_models import Family, Scale, family_of
from neurosurgeon.predictor.layer_timing import RunnableLayer, build_layers, lower_quartile, time_layers
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.sampling import RECIPES, Layer
from neurosurgeon.utils.files import DAMAGED, file_name, replace_file
from neurosurgeon.utils.machine import SPARE_CORE, CpuUse, device_name, speeds_directory

log = logging.getLogger(__name__)

SEED = 20170408  # of all random draws
BURSTS = 3
PASSES = 6  # of a burst, after a first one that fills the caches
BURST_PAUSE_S = 0.3  # a machine's slow moments last tens of ms, and more
DISAGREEMENT = 1.5  # slowest burst / fastest burst, or measured / predicted, beyond which the speed is measured again
MAX_AGE_DAYS = 7.0
SECONDS_PER_DAY = 86_400.0
BUSY_AGE_S = 600.0  # of a measurement on a busy machine
MIN_AGE_S = 600.0  # a younger measurement is not repeated when a task contradicts it
SPEED_VERSION = 2  # increases when the reference layers change
MIN_FACTOR, MAX_FACTOR = 0.02, 100.0  # of a credible machine; a small board may be 20 times as slow
# Standard deviations to either side: 1.645 hold nine layers in ten, three times as many hold networks, whose layers err
# together where the data is of another machine (`tests.benchmark.prediction --foreign --empty-cache`, ten networks on
# two sides with two predictors: with 1.645 they were inside 60 to 70 % of the time, with twice as many 70 to 80 %).
SPREAD_WIDTHS = 3 * 1.645


# ---------------------------------------------------------------- the layers


def control_layers() -> list[Layer]:
    """Return the layers that the collector repeats: arithmetic, weights from memory, and activations."""
    return [_conv(28, 3, 1, 64, 64), _linear(1024, 1024), _plane(LayerKind.BATCHNORM, 28, 128)]


@cache  # immutable data
def reference_layers() -> tuple[Layer, ...]:
    """Return the layers whose latencies are a machine's speed, as published networks have them, in a fixed order."""
    conv = [
        *((224, 7, 2, 3, 64), (224, 3, 2, 3, 32), (112, 3, 1, 32, 64), (56, 3, 1, 64, 64), (28, 3, 1, 128, 128)),
        *((28, 3, 2, 128, 256), (14, 3, 1, 256, 256), (14, 3, 1, 512, 512), (7, 3, 1, 512, 512), (27, 5, 1, 64, 192)),
        *((13, 3, 1, 384, 256), (14, 5, 1, 32, 64)),
    ]
    pointwise = [
        *((112, 1, 1, 16, 96), (56, 1, 1, 144, 24), (56, 1, 1, 64, 256), (28, 1, 1, 512, 128), (28, 1, 1, 192, 32)),
        *((14, 1, 1, 64, 384), (14, 1, 1, 384, 96), (14, 1, 1, 1024, 256), (7, 1, 1, 160, 960), (7, 1, 1, 960, 320)),
    ]
    depthwise = [
        *((112, 3, 1, 32), (112, 3, 2, 96), (56, 3, 1, 144), (56, 3, 2, 144), (28, 3, 1, 192), (28, 5, 1, 240)),
        *((14, 3, 1, 384), (14, 5, 1, 480), (14, 3, 2, 576), (7, 3, 1, 960)),
    ]
    linear = [(512, 1000), (1280, 1000), (2048, 1000), (4096, 1000), (4096, 4096), (1024, 1024), (768, 3072)]
    planes = [
        *((LayerKind.ACTIVATION, 112, 64), (LayerKind.ACTIVATION, 56, 64), (LayerKind.ACTIVATION, 28, 256)),
        *((LayerKind.BATCHNORM, 56, 128), (LayerKind.BATCHNORM, 28, 256), (LayerKind.ADD, 56, 64)),
        *((LayerKind.ADD, 28, 128), (LayerKind.MULTIPLY, 28, 240), (LayerKind.CONCAT, 28, 256)),
    ]
    others = [
        _layer(LayerKind.MAXPOOL, HW=112, kernel=3, stride=2, Cin=64, padding=1),
        _layer(LayerKind.MAXPOOL, HW=28, kernel=3, stride=1, Cin=192, padding=1),
        _layer(LayerKind.AVGPOOL, HW=7, Cin=512, output=1, kernel=7),
        _layer(LayerKind.LAYER_NORM, rows=50, width=768),
        _layer(LayerKind.SOFTMAX, rows=600, width=50),
        _layer(LayerKind.MATMUL, batch=1, rows=50, inner=768, columns=3072, linear=1),
        _layer(LayerKind.MATMUL, batch=1, rows=197, inner=384, columns=1536, linear=1),
        _layer(LayerKind.ATTENTION, groups=1, tokens=50, width=768, heads=12, windowed=0),
    ]
    layers = [_conv(*sizes) for sizes in (*conv, *pointwise)]
    layers += [_depthwise(*sizes) for sizes in depthwise] + [_linear(*sizes) for sizes in linear]
    layers += [_plane(*sizes) for sizes in planes] + others
    return tuple(layers[index] for index in np.random.default_rng(SEED).permutation(len(layers)))


def _layer(kind: LayerKind, **sizes: int) -> Layer:
    """Return a layer of these sizes; other columns have the values of the first draw."""
    return kind, RECIPES[kind].draw(np.random.default_rng(SEED)) | sizes


def _conv(width: int, kernel: int, stride: int, cin: int, cout: int) -> Layer:
    sizes = {"HW": width, "kernel": kernel, "stride": stride, "Cin": cin, "Cout": cout, "padding": kernel // 2}
    return LayerKind.CONV, {**sizes, "groups": 1, "bias": 1}


def _depthwise(width: int, kernel: int, stride: int, channels: int) -> Layer:
    return LayerKind.DW_CONV, _conv(width, kernel, stride, channels, channels)[1] | {"groups": channels}


def _linear(inputs: int, outputs: int) -> Layer:
    return LayerKind.LINEAR, {"in_features": inputs, "out_features": outputs}


def _plane(kind: LayerKind, width: int, channels: int) -> Layer:
    return _layer(kind, HW=width, Cin=channels)


# ---------------------------------------------------------------- the speed of this machine


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """The latencies of the reference layers on this machine, and the circumstances of their measurement."""

    layers_ms: tuple[float, ...]  # (layers,)
    date: str  # ISO 8601, UTC
    load: float  # runnable programs, mean of the last minute
    spread: float  # slowest burst / fastest burst
    was_busy: bool  # the bursts disagree, or other programs left fewer cores than threads

    def __post_init__(self) -> None:
        expected = len(reference_layers())
        if len(self.layers_ms) != expected or not all(0 < ms < math.inf for ms in self.layers_ms):
            raise ValueError(f"layers_ms: expected {expected} positive numbers, got {len(self.layers_ms)} numbers")
        if not 0 < self.spread < math.inf:
            raise ValueError(f"spread: expected a positive number, got {self.spread}")
        if datetime.datetime.fromisoformat(self.date).tzinfo is None:
            raise ValueError(f"date: expected a time zone, got {self.date}")

    @property
    def age_s(self) -> float:
        """Seconds since the measurement, by the system's clock; negative if the clock was set back."""
        return (_now() - datetime.datetime.fromisoformat(self.date)).total_seconds()


def kept_machine_speed(device: str, threads: int) -> MachineSpeed | None:
    """Return the kept speed of this device with these CPU threads; None if there is none, or it is too old."""
    try:
        kept = _read(_path(device, threads))
    except OSError:
        return None  # not measured yet
    except DAMAGED as exc:
        log.warning("the kept speed of this machine is damaged (%s): measuring again", exc)
        return None
    max_age_s = BUSY_AGE_S if kept.was_busy else MAX_AGE_DAYS * SECONDS_PER_DAY
    return kept if 0 <= kept.age_s < max_age_s else None


def machine_speed(device: str, threads: int) -> MachineSpeed:
    """Return the kept speed of this device with these CPU threads, or measure and keep it. May block for seconds."""
    speed = kept_machine_speed(device, threads)
    if speed is None:
        speed = measure_machine_speed(device, threads)
        try:
            replace_file(_path(device, threads), json.dumps({"version": SPEED_VERSION, **asdict(speed)}) + "\n")
        except OSError as exc:
            log.warning("the speed of this machine cannot be kept: %s", exc)
    return speed


def measure_machine_speed(device: str, threads: int) -> MachineSpeed:
    """Return the measured speed of this device. Blocks for up to 5 s, longer on a slow machine."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layers = build_layers(reference_layers(), device)
        time_layers(layers, device)  # builds kernels
        use_before = CpuUse.now()
        bursts = _bursts(layers, device)
        if _spread(bursts) > DISAGREEMENT:
            time.sleep(BURST_PAUSE_S)
            bursts += _bursts(layers, device)
    finally:
        torch.set_num_threads(threads_before)
    use_after, spread = CpuUse.now(), _spread(bursts)
    was_busy = spread > DISAGREEMENT
    if device == "cpu" and threads > 1 and use_before and use_after:
        was_busy |= use_before.free_cores_until(use_after) < threads - SPARE_CORE
    least_ms = tuple(round(min(times_ms), 6) for times_ms in zip(*bursts, strict=True))
    date = _now().isoformat(timespec="seconds")
    return MachineSpeed(least_ms, date, round(os.getloadavg()[0], 2), round(spread, 3), was_busy)


def _bursts(layers: Sequence[RunnableLayer], device: str) -> list[list[float]]:
    """Return the latencies of `BURSTS` bursts, (bursts, layers), ms."""
    undisturbed = lower_quartile if torch.get_num_threads() == 1 or device == "cuda" else min
    bursts = []
    for number in range(BURSTS):
        if number:
            time.sleep(BURST_PAUSE_S)
        time_layers(layers, device)
        passes = [time_layers(layers, device) for _ in range(PASSES)]
        bursts.append([undisturbed(times_ms) for times_ms in zip(*passes, strict=True)])
    return bursts


def _spread(bursts: Sequence[Sequence[float]]) -> float:
    """Return slowest / fastest of the `BURSTS` fastest bursts."""
    fastest_ms = sorted(map(sum, bursts))[:BURSTS]
    return fastest_ms[-1] / fastest_ms[0]


def doubt_machine_speed(device: str, threads: int) -> None:
    """Remove the kept speed, which a task contradicts, so that its next use measures it again; keep a recent one."""
    path = _path(device, threads)
    try:
        if _read(path).age_s > MIN_AGE_S:
            path.unlink()
    except (OSError, *DAMAGED):
        pass  # nothing is kept: the next use measures it anyway


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _path(device: str, threads: int) -> Path:
    return speeds_directory() / f"{file_name(device_name(device))}-{threads}-{file_name(torch.__version__)}.json"


def _read(path: Path) -> MachineSpeed:
    document: dict[str, Any] = json.loads(path.read_text())
    if document.pop("version") != SPEED_VERSION:
        raise ValueError(f"version: expected {SPEED_VERSION}, whose reference layers are others")
    layers_ms = tuple(float(value) for value in document.pop("layers_ms"))
    load, spread, was_busy = float(document["load"]), float(document["spread"]), bool(document["was_busy"])
    return MachineSpeed(layers_ms, str(document["date"]), load, spread, was_busy)


def scaled_to_machine(predictor: LatencyPredictor, device: str, threads: int) -> LatencyPredictor:
    """Return a predictor scaled to the speed of this machine. May block for seconds (`machine_speed`)."""
    return scaled_by_speed(predictor, machine_speed(device, threads), threads)


@cache  # of the process, as `predictor.store.installed_predictor`
def scaled_by_speed(predictor: LatencyPredictor, speed: MachineSpeed, threads: int) -> LatencyPredictor:
    """Return a predictor scaled to a machine of this speed with these CPU threads; implausible factors are logged."""
    scales = scales_of(predictor, reference_layers(), speed.layers_ms)
    factors = [scale.factor for scale in scales.values()]
    scaling = f"scaled by {min(factors):.2g} to {max(factors):.2g} to this machine, threads: {threads}"
    scaling += f" (measured {speed.date[:16].replace('T', ' ')} UTC, load {speed.load:g})"
    if speed.was_busy:
        scaling += ", while other programs kept it busy: --remeasure-machine on that machine measures it again"
    if not MIN_FACTOR <= min(factors) <= max(factors) <= MAX_FACTOR:
        log.warning(
            "the measured speed of this machine is implausible: %s; --remeasure-machine measures it again, "
            "python -m neurosurgeon doctor checks a prediction",
            scaling,
        )
    return replace(predictor, scales=scales, scaling=scaling)


def scales_of(
    predictor: LatencyPredictor, layers: Sequence[tuple[LayerKind, Columns]], measured_ms: Sequence[float]
) -> dict[Family, Scale]:
    """Return the scale of each family: the geometric mean of measured / predicted of its layers.

    A family without layers has the scale of all layers together.

    Args: layers: (n,). measured_ms: their latencies, (n,), ms.
    """
    logs: dict[Family, list[float]] = {}
    for (kind, columns), layer_ms in zip(layers, measured_ms, strict=True):
        if kind in predictor.kinds:
            work = [row_work(kind, columns)]
            features = feature_matrix(work), tree_matrix(kind, [columns], work)
            predicted_ms = float(predictor.kinds[kind].predict(*features)[0])
            logs.setdefault(family_of(kind, columns), []).append(math.log(layer_ms / predicted_ms))
    known = {family: _scale(values) for family, values in logs.items()}
    rest = _scale([value for values in logs.values() for value in values])
    return {family: known.get(family, rest) for family in Family}


def _scale(logs: Sequence[float]) -> Scale:
    """Return the scale of layers from the logarithms of measured / predicted; a factor of 1 if there are none."""
    if not logs:
        return Scale()
    spread = SPREAD_WIDTHS * statistics.pstdev(logs)
    return Scale(math.exp(statistics.fmean(logs)), math.exp(-spread), math.exp(spread))
