"""Profile this device for one side: measure layers, one CSV per kind.

A layer alone in a loop is faster than inside a network, where its neighbours push its weights and its code out of
the caches. So layers run in blocks: as in a network, each follows others of about its own size, with small ones
between them, and reads a tensor that was written just before. A block is run over and over; a row has the lower
quartile of its times, which is the device undisturbed, and their median, minimum and spread. In between a few layers
run that are always the same: ``pace_ms``, what they took then, tells a slow minute from a slow layer.

Every row is on disk as soon as its block is measured: run the same command again after Ctrl-C or a power cut, and it
goes on where it stopped. Until all is measured the rows lie aside (see `predictor.staging`), and what was in effect
before stays so.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import logging
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.get_datasets_func import COLUMNS, MIN_ROWS, csv_name, csv_path, read_rows
from neurosurgeon.predictor.kernel_flops import row_work
from neurosurgeon.predictor.machine_speed import SEED, Layer, built, lower_quartile, one_pass, pace_layers
from neurosurgeon.predictor.predictor_utils import (
    lender,
    read_provenance,
)
from neurosurgeon.predictor.sampling import RECIPES, Config, Sample, draw_layer, expected_ms
from neurosurgeon.predictor.staging import PARTIAL, discard, finish, start_partial
from neurosurgeon.utils.errors import DataSetError, UsageError
from neurosurgeon.utils.files import append_durably, replace_file
from neurosurgeon.utils.machine import device_name, frequency_governor, memory_bytes
from neurosurgeon.utils.timing import Timing, now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

DEFAULT_MINUTES = 8.0
BATCH_LAYERS = 512  # drawn together, then grouped by size
BLOCK_LAYERS = 64
SMALL_MS = 0.02  # layers as small as this sit between layers up to SCATTER times as large
SCATTER = 15.0
MIN_PASSES, MAX_PASSES = 7, 25
MIN_BLOCK_MS = 250.0  # a machine's slow moments last tens of ms: a block should outlast them
MEMORY_SHARE = 0.05  # of the machine's memory, for one block
NOISY_SPREAD = 0.25  # interquartile range / median of a typical row, beyond which rows say little
EXTRA_COLUMNS = ("median_ms", "min_ms", "iqr_ms", "samples", "pace_ms")
PACE_RUNS = 8  # after each pass of a block; the first ones find its leavings in the caches, and only the last counts
SECONDS_PER_MINUTE = 60.0
FILES = (*map(csv_name, COLUMNS), "provenance.json")  # of a directory of data sets

Collection = dict[str, Any]  # as `collection` makes it


# ---------------------------------------------------------------- what to measure


def blocks(max_bytes: float, kinds: Sequence[LayerKind] = tuple(RECIPES)) -> Iterator[list[Layer]]:
    """Yield blocks of layers of some kinds without end, always the same ones: a command that broke off goes on.

    The first batch has as many layers of every kind, and begins with the smallest: a short collection has enough rows
    of rare kinds, too. See the top of this file.

    Args: max_bytes: of a block's weights and tensors; a larger block is cut short.
    """
    rng = np.random.default_rng([SEED, 0, 1])
    evenly = [draw_layer(rng, max_bytes, [kind]) for kind in islice(cycle(kinds), BATCH_LAYERS)]
    yield from _blocks_of(evenly, rng, max_bytes, smallest_first=True)
    batch = 0
    while True:
        rng = np.random.default_rng([SEED, batch])
        drawn = [draw_layer(rng, max_bytes, kinds) for _ in range(BATCH_LAYERS)]
        yield from _blocks_of(drawn, rng, max_bytes, smallest_first=False)
        batch += 1


def _blocks_of(
    drawn: Sequence[Layer], rng: np.random.Generator, max_bytes: float, *, smallest_first: bool
) -> Iterator[list[Layer]]:
    """Yield the blocks of a batch, each of layers of like size."""
    sizes_ms = [_place_ms(layer, rng) for layer in drawn]
    ordered = [drawn[index] for index in np.argsort(sizes_ms, kind="stable")]
    starts = range(0, BATCH_LAYERS, BLOCK_LAYERS)
    for start in starts if smallest_first else rng.permutation(starts):
        block = ordered[start : start + BLOCK_LAYERS]
        yield _cut_to_memory([block[index] for index in rng.permutation(BLOCK_LAYERS)], max_bytes)


def _place_ms(layer: Layer, rng: np.random.Generator) -> float:
    size_ms = expected_ms(*layer)
    return size_ms if size_ms > SMALL_MS else SMALL_MS * SCATTER ** float(rng.random())


def _cut_to_memory(block: list[Layer], max_bytes: float) -> list[Layer]:
    works = (row_work(*layer) for layer in block)
    used = np.cumsum([work.input_bytes + work.output_bytes + work.weight_bytes for work in works])
    return block[: max(1, int(np.searchsorted(used, max_bytes, side="right")))]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """What the layers of a block took, (layers, passes), ms, and what the layers of the pace took meanwhile, ms."""

    layers_ms: Sequence[Sequence[float]]
    pace_ms: float


def measure_block(block: Sequence[Layer], device: str, pace: Sequence[Sample]) -> BlockTimes:
    """Run a block, and the layers of the pace, in turn."""
    samples = built(block, device)
    one_pass(samples, device)  # builds kernels
    passes: list[list[float]] = []
    paces_ms: list[float] = []
    start_ms = now_ms()
    while len(passes) < MIN_PASSES or (now_ms() - start_ms < MIN_BLOCK_MS and len(passes) < MAX_PASSES):
        passes.append(one_pass(samples, device))
        paces_ms.append([sum(one_pass(pace, device)) for _ in range(PACE_RUNS)][-1])
    return BlockTimes([list(times_ms) for times_ms in zip(*passes, strict=True)], lower_quartile(paces_ms))


# ---------------------------------------------------------------- files


def row_of(kind: LayerKind, config: Config, times_ms: Sequence[float], pace_ms: float) -> dict[str, float | int]:
    """Return a CSV row: the contract's columns first, then ours."""
    row: dict[str, float | int] = dict(config)
    if "FLOPs" in COLUMNS[kind]:
        row["FLOPs"] = int(row_work(kind, config).flops)
    timing = Timing.of(times_ms)
    row["latency"] = round(lower_quartile(times_ms), 6)
    row["median_ms"], row["min_ms"] = round(timing.median_ms, 6), round(timing.min_ms, 6)
    row["iqr_ms"], row["samples"] = round(timing.iqr_ms, 6), timing.samples
    row["pace_ms"] = round(pace_ms, 6)
    return row


def header_of(kind: LayerKind) -> list[str]:
    """Return the columns of a kind's file."""
    names = config_names(kind)
    return [*COLUMNS[kind], *(name for name in names if name not in COLUMNS[kind]), *EXTRA_COLUMNS]


def config_names(kind: LayerKind) -> list[str]:
    """Return the names that make a configuration of a kind."""
    return list(RECIPES[kind].draw(np.random.default_rng(0)))


def finished_configs(path: Path, kind: LayerKind) -> set[tuple[int, ...]]:
    """Return the configurations that a file already holds; a last line cut off by a power failure is removed.

    Raises: DataSetError: the file was not written by this collector.
    """
    if not path.exists():
        return set()
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        replace_file(path, text)
    if not text:
        path.unlink()
        return set()
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != header_of(kind):
        raise DataSetError(f"{path} has other columns than this collector writes: move it away, or choose --output")
    names = config_names(kind)
    try:
        return {tuple(int(row[name]) for name in names) for row in reader}
    except (TypeError, ValueError) as exc:
        raise DataSetError(f"{path}, line {reader.line_num} is damaged ({exc}): remove that line and go on") from exc


def append_rows(path: Path, kind: LayerKind, rows: Iterable[Mapping[str, float | int]]) -> None:
    """Add rows to a kind's file and put them on disk, with one write."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header_of(kind), lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    append_durably(path, text.getvalue())


# ---------------------------------------------------------------- the collection


def collect(
    directory: Path,
    device: str,
    minutes: float,
    about: Mapping[str, Any],
    kinds: Sequence[LayerKind] = tuple(RECIPES),
) -> None:
    """Measure blocks that ``directory`` does not hold yet, until ``minutes`` have been spent on these kinds in all.

    It takes longer where a kind would have too few rows, and there is no data to borrow from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done = {kind: finished_configs(csv_path(directory, kind), kind) for kind in RECIPES}
    spent_s, others = earlier_collections(directory, kinds)
    budget_s = minutes * SECONDS_PER_MINUTE
    spreads: list[float] = []
    pace = built(pace_layers(), device)
    bar = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=budget_s, initial=min(spent_s, budget_s), bar_format=bar, disable=None) as progress:
        for block in blocks(MEMORY_SHARE * memory_bytes(), kinds):
            if spent_s >= budget_s and not too_few_rows(directory, kinds):
                break
            if all(tuple(config.values()) in done[kind] for kind, config in block):
                continue
            start_ms = now_ms()
            spreads += _keep(directory, block, measure_block(block, device, pace), done)
            block_s = (now_ms() - start_ms) / MS_PER_S
            spent_s += block_s
            write_provenance(directory, about, [*others, collection(about, kinds, spent_s)])
            progress.set_description(f"{sum(map(len, done.values()))} layers")
            progress.update(min(block_s, progress.total - progress.n))
    warn_of_noise(spreads)


def too_few_rows(directory: Path, kinds: Sequence[LayerKind]) -> bool:
    """Return whether a kind can neither be fitted nor be borrowed.

    Raises: DataSetError.
    """
    if lender(directory, read_provenance(directory)) is not None:
        return False
    paths = {kind: csv_path(directory, kind) for kind in kinds}
    return any(not path.exists() or len(read_rows(path, kind)) < MIN_ROWS for kind, path in paths.items())


def _keep(
    directory: Path, block: Sequence[Layer], times: BlockTimes, done: Mapping[LayerKind, set[tuple[int, ...]]]
) -> list[float]:
    """Write the rows of layers that are new, remember these, and return the spreads of the rows."""
    written: dict[LayerKind, list[dict[str, float | int]]] = {}
    for (kind, config), times_ms in zip(block, times.layers_ms, strict=True):
        if tuple(config.values()) not in done[kind]:
            written.setdefault(kind, []).append(row_of(kind, config, times_ms, times.pace_ms))
            done[kind].add(tuple(config.values()))
    for kind, kind_rows in written.items():
        append_rows(csv_path(directory, kind), kind, kind_rows)
    return [row["iqr_ms"] / row["median_ms"] for kind_rows in written.values() for row in kind_rows]


def warn_of_noise(spreads: Sequence[float]) -> None:
    """Say that the machine is too noisy to trust its rows."""
    if spreads and statistics.median(spreads) > NOISY_SPREAD:
        log.warning(
            "this machine is noisy: half of the layers vary by more than %.0f %% from run to run; stop what else runs "
            "on it, and collect again with --fresh",
            100 * statistics.median(spreads),
        )


# ---------------------------------------------------------------- where the rows come from


def provenance(side: str, device: str, threads: int) -> dict[str, Any]:
    """Return what a reader must know to trust the data elsewhere."""
    return {
        "side": side,
        "device": device,
        "device_name": device_name(device),
        "cores": os.cpu_count(),
        "threads": threads,
        "governor": frequency_governor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def collection(about: Mapping[str, Any], kinds: Sequence[LayerKind], spent_s: float) -> Collection:
    """Return what one collection adds to the provenance: kinds that were measured together, when and for how long."""
    return {"kinds": list(kinds), "date": about.get("date"), "profiling_s": round(spent_s, 1)}


def earlier_collections(directory: Path, kinds: Sequence[LayerKind]) -> tuple[float, list[Collection]]:
    """Return the seconds already spent on just these kinds together, and the collections of others.

    Raises: DataSetError: the provenance is damaged.
    """
    about = read_provenance(directory)
    here = [kind for kind in RECIPES if csv_path(directory, kind).exists()]
    known = about.get("collections", [collection(about, here, about.get("profiling_s", 0.0))])  # older files: one
    try:
        same = [each for each in known if set(each["kinds"]) == set(kinds)]
        others = [each for each in known if each["kinds"] and each not in same]
        return sum(float(each["profiling_s"]) for each in same), others
    except (KeyError, TypeError, ValueError) as exc:
        raise DataSetError(f"{directory / 'provenance.json'} has damaged collections: collect with --fresh") from exc


def write_provenance(directory: Path, about: Mapping[str, Any], collections: Sequence[Collection]) -> None:
    """Write where the rows of a directory come from: the machine, and each collection on it."""
    spent_s = sum(each["profiling_s"] for each in collections)
    document = {**about, "profiling_s": round(spent_s, 1), "collections": collections}
    replace_file(directory / "provenance.json", json.dumps(document, indent=2) + "\n")


def check_same_machine(directory: Path, about: Mapping[str, Any], kinds: Iterable[LayerKind]) -> None:
    """Refuse to mix rows of two machines.

    Raises: UsageError: rows of these kinds are of another machine, device, number of threads or version.
    """
    if not any(csv_path(directory, kind).exists() for kind in kinds):
        return
    before = read_provenance(directory)
    names = ("device", "device_name", "threads", "torch")
    if any(before.get(name) != about[name] for name in names):
        theirs, ours = ({name: known.get(name) for name in names} for known in (before, about))
        raise UsageError(
            f"{directory} holds rows of {theirs}, this is {ours}: pass --fresh without --kinds to replace them, "
            "or --output DIR"
        )


# ---------------------------------------------------------------- the command


def begin(directory: Path, about: Mapping[str, Any], kinds: Sequence[LayerKind], *, fresh: bool) -> Path:
    """Return the directory in which to measure: that of an interrupted run, or a new one with the rows to keep.

    Raises: OSError. DataSetError: what is there is damaged. UsageError: it is of another machine.
    """
    finish(directory, FILES)
    partial = directory / PARTIAL
    if fresh:
        discard(partial)
    is_new = not partial.is_dir()
    kept = [kind for kind in COLUMNS if not (fresh and kind in kinds)]
    check_same_machine(directory if is_new else partial, about, kept)
    if is_new:
        start_partial(directory, kept_files(directory, kept))
    return partial


def kept_files(directory: Path, kinds: Sequence[LayerKind]) -> dict[str, bytes]:
    """Return the files of some kinds by name, and what the provenance says of them.

    Raises: DataSetError: the provenance is damaged.
    """
    paths = [csv_path(directory, kind) for kind in kinds if csv_path(directory, kind).exists()]
    if not paths:
        return {}
    _, collections = earlier_collections(directory, ())
    for each in collections:
        each["kinds"] = [kind for kind in each["kinds"] if kind in kinds]
    document = {**read_provenance(directory), "collections": collections}
    files = {path.name: path.read_bytes() for path in paths}
    return files | {"provenance.json": (json.dumps(document, indent=2) + "\n").encode()}
