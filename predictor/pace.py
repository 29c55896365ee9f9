"""The pace of a machine: what a few layers that are always the same take on it.

The collector measures it beside its rows, so a data set tells the pace of the machine that it was collected on. On
another machine, what a network takes differs by about as much as the pace: by how much exactly depends on its layers.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.operations import LayerKind
from predictor.sampling import RECIPES, Config, Sample
from utils.files import cache_directory, file_name, replace_file
from utils.machine import device_name
from utils.timing import now_ms, synchronise, thread_ms

log = logging.getLogger(__name__)

SEED = 20170408  # of all that is drawn
WARMUP = 8  # passes
MEASURE_MS = 1000.0  # a machine's slow moments last tens of ms, and more

Layer = tuple[LayerKind, Config]


def pace_layers() -> list[Layer]:
    """Return the layers of the pace: arithmetic, weights from memory, and activations."""
    rng = np.random.default_rng(SEED)
    conv = RECIPES[LayerKind.CONV].draw(rng) | {"HW": 28, "kernel": 3, "stride": 1, "padding": 1, "bias": 1}
    return [
        (LayerKind.CONV, conv | {"Cin": 64, "Cout": 64, "groups": 1}),
        (LayerKind.LINEAR, RECIPES[LayerKind.LINEAR].draw(rng) | {"in_features": 1024, "out_features": 1024}),
        (LayerKind.BATCHNORM, RECIPES[LayerKind.BATCHNORM].draw(rng) | {"HW": 28, "Cin": 128}),
    ]


def lower_quartile(times_ms: Sequence[float]) -> float:
    """Return what a quarter of the times are below: the device undisturbed."""
    return statistics.quantiles(times_ms, n=4, method="inclusive")[0]


def built(block: Sequence[Layer], device: str) -> list[Sample]:
    """Return the layers of a block, ready to run."""
    return [RECIPES[kind].build(config).to(device) for kind, config in block]


def one_pass(samples: Sequence[Sample], device: str) -> list[float]:
    """Run every layer of a block once, in turn; return what each took, (layers,), ms."""
    with torch.inference_mode():
        return _pass_on_gpu(samples) if device == "cuda" else _pass_on_cpu(samples)


def _pass_on_cpu(samples: Sequence[Sample]) -> list[float]:
    """Time with the clock; one thread that others interrupted, by how long it computed."""
    is_one_thread = torch.get_num_threads() == 1
    times_ms = []
    for run, inputs in samples:
        fresh = _rewritten(inputs)
        computed_ms, start_ms = thread_ms(), now_ms()
        run(*fresh)
        took_ms, computed_ms = now_ms() - start_ms, thread_ms() - computed_ms
        times_ms.append(min(took_ms, computed_ms) if is_one_thread else took_ms)
    return times_ms


def _pass_on_gpu(samples: Sequence[Sample]) -> list[float]:
    """Time with events, which the GPU stamps between one layer and the next."""
    marks = []
    for run, inputs in samples:
        fresh = _rewritten(inputs)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run(*fresh)
        after.record()
        marks.append((before, after))
    synchronise("cuda")
    return [float(before.elapsed_time(after)) for before, after in marks]


def _rewritten(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Return copies in fresh memory, the first written last: as if the layer before had just made them."""
    return [torch.empty_like(value).copy_(value) for value in reversed(tuple(inputs))][::-1]


# ---------------------------------------------------------------- the pace of this machine


def kept_pace_ms(device: str) -> float:
    """Return what the layers of the pace take on this device with the threads in use: measured once, and kept."""
    name = f"{file_name(device_name(device))}-{torch.get_num_threads()}-{file_name(torch.__version__)}.json"
    try:
        return float(json.loads(_path(name).read_text())["pace_ms"])
    except OSError:
        pass  # not measured yet
    except (ValueError, KeyError, TypeError) as exc:
        log.warning("the kept pace of this machine is damaged (%s): measuring again", exc)
    pace_ms = measured_pace_ms(device)
    try:
        replace_file(_path(name), json.dumps({"pace_ms": pace_ms}) + "\n")
    except OSError as exc:
        log.warning("the pace of this machine cannot be kept: %s", exc)
    return pace_ms


def _path(name: str) -> Path:
    return cache_directory() / "paces" / name


def measured_pace_ms(device: str) -> float:
    """Return what the layers of the pace take together on this device, undisturbed; it takes a second."""
    layers = built(pace_layers(), device)
    for _ in range(WARMUP):  # builds kernels
        one_pass(layers, device)
    passes_ms: list[float] = []
    start_ms = now_ms()
    while len(passes_ms) < WARMUP or now_ms() - start_ms < MEASURE_MS:
        passes_ms.append(sum(one_pass(layers, device)))
    return lower_quartile(passes_ms)
