"""Profile this device for one side: measure layers, and write a CSV file for each kind.

A layer that runs alone in a loop is faster than inside a network, where its neighbours evict its weights and its code
from the caches. So layers run in blocks: as in a network, each follows others of about its own size, with small ones
between them, and reads a tensor that was written just before. A block runs several times. A row has the lower quartile
of its times, which is the device undisturbed, and their median, minimum and interquartile range. Between the passes
the control layers run, always the same ones: ``pace_ms``, their time, tells a slow minute from a slow layer.

Every row is on disk as soon as its block is measured. After Ctrl-C or a power cut, the same command continues the
collection. Until it is complete the rows lie aside (see `predictor.staging`), and readers read the earlier data.
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
from neurosurgeon.predictor.get_datasets_func import (
    COLUMNS,
    MIN_ROWS,
    csv_name,
    csv_path,
    kinds_in,
    read_provenance,
    read_rows,
)
from neurosurgeon.predictor.kernel_flops import row_work
from neurosurgeon.predictor.layer_timing import RunnableLayer, build_layers, lower_quartile, time_layers
from neurosurgeon.predictor.machine_speed import SEED, control_layers
from neurosurgeon.predictor.sampling import RECIPES, Config, Layer, draw_layer, expected_ms
from neurosurgeon.predictor.staging import PARTIAL, discard, finish_activation, start_partial
from neurosurgeon.predictor.store import lending_directory
from neurosurgeon.utils.errors import DataSetError, UsageError
from neurosurgeon.utils.files import append_durably, replace_file
from neurosurgeon.utils.machine import device_name, frequency_governor, memory_bytes
from neurosurgeon.utils.timing import Timing, now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

DEFAULT_MINUTES = 8.0
BATCH_LAYERS = 512  # drawn together, then grouped by size
BLOCK_LAYERS = 64
SMALL_MS = 0.02  # layers up to this size are spread over the blocks of layers up to SCATTER times as large
SCATTER = 15.0
MIN_PASSES, MAX_PASSES = 7, 25
MIN_BLOCK_MS = 250.0  # a machine's slow moments last tens of ms: a block must last longer
MEMORY_SHARE = 0.05  # of the machine's memory, for one block
NOISY_SPREAD = 0.25  # interquartile range / median of the median row, beyond which the machine is too noisy
EXTRA_COLUMNS = ("median_ms", "min_ms", "iqr_ms", "samples", "pace_ms")
CONTROL_RUNS = 8  # after each pass of a block, which leaves its data in the caches: only the last run counts
SECONDS_PER_MINUTE = 60.0
FILES = (*map(csv_name, COLUMNS), "provenance.json")  # of a directory of data sets

Collection = dict[str, Any]  # an entry of the provenance, see `collection_entry`


# ---------------------------------------------------------------- blocks of layers


def blocks(max_bytes: float, kinds: Sequence[LayerKind] = tuple(RECIPES)) -> Iterator[list[Layer]]:
    """Yield blocks of layers of some kinds without end, always the same ones, so that a collection can continue.

    The first batch has the same number of layers of every kind, and begins with the smallest layers: a short collection
    has enough rows of rare kinds, too.

    Args: max_bytes: upper limit of a block's weights and tensors together; a larger block is truncated.
    """
    rng = np.random.default_rng([SEED, 0, 1])
    evenly = [draw_layer(rng, max_bytes, [kind]) for kind in islice(cycle(kinds), BATCH_LAYERS)]
    yield from _group_by_size(evenly, rng, max_bytes, smallest_first=True)
    batch = 0
    while True:
        rng = np.random.default_rng([SEED, batch])
        drawn = [draw_layer(rng, max_bytes, kinds) for _ in range(BATCH_LAYERS)]
        yield from _group_by_size(drawn, rng, max_bytes, smallest_first=False)
        batch += 1


def _group_by_size(
    drawn: Sequence[Layer], rng: np.random.Generator, max_bytes: float, *, smallest_first: bool
) -> Iterator[list[Layer]]:
    """Yield the blocks of a batch, each of layers of similar size."""
    sizes_ms = (expected_ms(*layer) for layer in drawn)
    keys_ms = [size_ms if size_ms > SMALL_MS else SMALL_MS * SCATTER ** float(rng.random()) for size_ms in sizes_ms]
    ordered = [drawn[index] for index in np.argsort(keys_ms, kind="stable")]
    starts = range(0, BATCH_LAYERS, BLOCK_LAYERS)
    for start in starts if smallest_first else rng.permutation(starts):
        block = [ordered[start + index] for index in rng.permutation(BLOCK_LAYERS)]
        used = np.cumsum([row_work(*layer).traffic_bytes for layer in block])
        yield block[: max(1, int(np.searchsorted(used, max_bytes, side="right")))]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """The measured times of a block and of the control layers between its passes."""

    layers_ms: Sequence[Sequence[float]]  # (layers, passes)
    control_ms: float  # of all control layers together, lower quartile


def measure_block(block: Sequence[Layer], device: str, controls: Sequence[RunnableLayer]) -> BlockTimes:
    """Return the times of a block that runs in turn with the control layers. May block for seconds."""
    layers = build_layers(block, device)
    time_layers(layers, device)  # builds kernels
    passes: list[list[float]] = []
    controls_ms: list[float] = []
    start_ms = now_ms()
    while len(passes) < MIN_PASSES or (now_ms() - start_ms < MIN_BLOCK_MS and len(passes) < MAX_PASSES):
        passes.append(time_layers(layers, device))
        controls_ms.append([sum(time_layers(controls, device)) for _ in range(CONTROL_RUNS)][-1])
    return BlockTimes([list(times_ms) for times_ms in zip(*passes, strict=True)], lower_quartile(controls_ms))


# ---------------------------------------------------------------- files


def csv_row(kind: LayerKind, config: Config, times_ms: Sequence[float], control_ms: float) -> dict[str, float | int]:
    """Return the CSV row of a layer: the contract's columns first, then ours."""
    row: dict[str, float | int] = dict(config)
    if "FLOPs" in COLUMNS[kind]:
        row["FLOPs"] = int(row_work(kind, config).flops)
    timing = Timing.of(times_ms)
    row["latency"] = round(lower_quartile(times_ms), 6)
    row["median_ms"], row["min_ms"] = round(timing.median_ms, 6), round(timing.min_ms, 6)
    row["iqr_ms"], row["samples"] = round(timing.iqr_ms, 6), timing.samples
    row["pace_ms"] = round(control_ms, 6)
    return row


def csv_header(kind: LayerKind) -> list[str]:
    """Return the column names of a kind's file."""
    names = config_names(kind)
    return [*COLUMNS[kind], *(name for name in names if name not in COLUMNS[kind]), *EXTRA_COLUMNS]


def config_names(kind: LayerKind) -> list[str]:
    """Return the column names of a configuration of a kind."""
    return list(RECIPES[kind].draw(np.random.default_rng(0)))


def finished_configs(path: Path, kind: LayerKind) -> set[tuple[int, ...]]:
    """Return the configurations that a file already holds; remove a last line that a power cut truncated.

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
    if reader.fieldnames != csv_header(kind):
        raise DataSetError(f"{path} has other columns than this collector writes: move it away, or choose --output")
    names = config_names(kind)
    try:
        return {tuple(int(row[name]) for name in names) for row in reader}
    except (TypeError, ValueError) as exc:
        raise DataSetError(
            f"{path}, line {reader.line_num} is damaged ({exc}): remove the line and run this again"
        ) from exc


def append_rows(path: Path, kind: LayerKind, rows: Iterable[Mapping[str, float | int]]) -> None:
    """Append rows to a kind's file with one write, and wait until they are on disk."""
    text = io.StringIO()
    writer = csv.DictWriter(text, csv_header(kind), lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    append_durably(path, text.getvalue())


# ---------------------------------------------------------------- the collection


def collect(
    directory: Path,
    device: str,
    minutes: float,
    provenance: Mapping[str, Any],
    kinds: Sequence[LayerKind] = tuple(RECIPES),
) -> None:
    """Measure blocks that ``directory`` does not hold yet, until ``minutes`` have been spent on these kinds in all.

    It takes longer if a kind would have too few rows, and there is no data to borrow from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done = {kind: finished_configs(csv_path(directory, kind), kind) for kind in RECIPES}
    spent_s, others = earlier_collections(directory, kinds)
    budget_s = minutes * SECONDS_PER_MINUTE
    spreads: list[float] = []
    controls = build_layers(control_layers(), device)
    bar = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=budget_s, initial=min(spent_s, budget_s), bar_format=bar, disable=None) as progress:
        for block in blocks(MEMORY_SHARE * memory_bytes(), kinds):
            if spent_s >= budget_s and not has_too_few_rows(directory, kinds):
                break
            if all(tuple(config.values()) in done[kind] for kind, config in block):
                continue
            start_ms = now_ms()
            spreads += _write_new_rows(directory, block, measure_block(block, device, controls), done)
            block_s = (now_ms() - start_ms) / MS_PER_S
            spent_s += block_s
            write_provenance(directory, provenance, [*others, collection_entry(provenance, kinds, spent_s)])
            progress.set_description(f"{sum(map(len, done.values()))} layers")
            progress.update(min(block_s, progress.total - progress.n))
    warn_if_noisy(spreads)


def has_too_few_rows(directory: Path, kinds: Sequence[LayerKind]) -> bool:
    """Return whether a kind can neither be fitted nor borrowed.

    Raises: DataSetError: a file is malformed.
    """
    if lending_directory(directory, read_provenance(directory)) is not None:
        return False
    paths = {kind: csv_path(directory, kind) for kind in kinds}
    return any(not path.exists() or len(read_rows(path, kind)) < MIN_ROWS for kind, path in paths.items())


def _write_new_rows(
    directory: Path, block: Sequence[Layer], times: BlockTimes, done: Mapping[LayerKind, set[tuple[int, ...]]]
) -> list[float]:
    """Write the rows of layers that are not ``done``, and add them to it; return the spread of each row."""
    written: dict[LayerKind, list[dict[str, float | int]]] = {}
    for (kind, config), times_ms in zip(block, times.layers_ms, strict=True):
        if tuple(config.values()) not in done[kind]:
            written.setdefault(kind, []).append(csv_row(kind, config, times_ms, times.control_ms))
            done[kind].add(tuple(config.values()))
    for kind, kind_rows in written.items():
        append_rows(csv_path(directory, kind), kind, kind_rows)
    return [row["iqr_ms"] / row["median_ms"] for kind_rows in written.values() for row in kind_rows]


def warn_if_noisy(spreads: Sequence[float]) -> None:
    """Warn if the machine is too noisy for its rows to be useful."""
    if spreads and statistics.median(spreads) > NOISY_SPREAD:
        log.warning(
            "this machine is noisy: half of the layers vary by more than %.0f %% from run to run; stop what else runs "
            "on it, and collect again with --fresh",
            100 * statistics.median(spreads),
        )


# ---------------------------------------------------------------- provenance


def new_provenance(side: str, device: str, threads: int) -> dict[str, Any]:
    """Return the provenance of rows that are measured now: the machine, the versions and the date."""
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


def collection_entry(provenance: Mapping[str, Any], kinds: Sequence[LayerKind], spent_s: float) -> Collection:
    """Return the provenance of one collection: the kinds that were measured together, the date and the time spent."""
    return {"kinds": list(kinds), "date": provenance.get("date"), "profiling_s": round(spent_s, 1)}


def earlier_collections(directory: Path, kinds: Sequence[LayerKind]) -> tuple[float, list[Collection]]:
    """Return the time already spent on exactly these kinds together, in s, and the collections of other kinds.

    Raises: DataSetError: the provenance is damaged.
    """
    provenance = read_provenance(directory)
    try:
        one = collection_entry(provenance, kinds_in(directory), provenance.get("profiling_s", 0.0))
        known = provenance.get("collections", [one])  # older files have no list
        same = [each for each in known if set(each["kinds"]) == set(kinds)]
        others = [each for each in known if each["kinds"] and each not in same]
        return sum(float(each["profiling_s"]) for each in same), others
    except (KeyError, TypeError, ValueError) as exc:
        raise DataSetError(f"{directory / 'provenance.json'} has damaged collections: collect with --fresh") from exc


def write_provenance(directory: Path, provenance: Mapping[str, Any], collections: Sequence[Collection]) -> None:
    """Write the provenance of a directory's rows: the machine, and each collection on it."""
    spent_s = sum(each["profiling_s"] for each in collections)
    document = {**provenance, "profiling_s": round(spent_s, 1), "collections": collections}
    replace_file(directory / "provenance.json", json.dumps(document, indent=2) + "\n")


def check_same_machine(directory: Path, provenance: Mapping[str, Any], kinds: Iterable[LayerKind]) -> None:
    """Refuse to mix rows of two machines, devices, numbers of threads or versions.

    Raises: UsageError: rows of these kinds differ in one of them.
    """
    if not any(csv_path(directory, kind).exists() for kind in kinds):
        return
    before = read_provenance(directory)
    names = ("device", "device_name", "threads", "torch")
    if any(before.get(name) != provenance[name] for name in names):
        theirs, ours = ({name: known.get(name) for name in names} for known in (before, provenance))
        raise UsageError(
            f"{directory} holds rows of {theirs}, this is {ours}: pass --fresh without --kinds to replace them, "
            "or --output DIR"
        )


# ---------------------------------------------------------------- begin or continue


def begin(directory: Path, provenance: Mapping[str, Any], kinds: Sequence[LayerKind], *, fresh: bool) -> Path:
    """Return the directory in which to measure: that of an interrupted run, or a new one with the rows to keep.

    Args:   fresh: discard an interrupted run, and the rows of these kinds.
    Raises: OSError. DataSetError: the data is damaged. UsageError: it is of another machine.
    """
    finish_activation(directory, FILES)
    partial = directory / PARTIAL
    if fresh:
        discard(partial)
    is_new = not partial.is_dir()
    kept = [kind for kind in COLUMNS if not (fresh and kind in kinds)]
    check_same_machine(directory if is_new else partial, provenance, kept)
    if is_new:
        start_partial(directory, files_to_keep(directory, kept))
    return partial


def files_to_keep(directory: Path, kinds: Sequence[LayerKind]) -> dict[str, bytes]:
    """Return the files of some kinds by name, and the provenance of these kinds alone.

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
