"""Measure layers on this device: one CSV per kind, for one side, then fit its predictors.

    python -m predictor.collect --side edge --device cpu --threads 1

Configurations are drawn from a fixed seed, log-spaced over what real networks use, and measured round by round over
all kinds, so that a slow minute does not spoil one of them. Every row is on disk as soon as it is measured: run the
same command again after Ctrl-C or a power cut, and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.operations import LayerKind
from predictor.get_datasets_func import COLUMNS, DATASET_DIR, csv_path
from predictor.kernel_flops import Work, row_work
from predictor.predictor_utils import SIDES, fit_and_save, parameter_file, print_scores, read_provenance
from utils.cli import add_device, base_parser, positive_int, run_main
from utils.errors import DataSetError, UsageError, writing
from utils.inference_utils import as_network_input, check_device, use_threads
from utils.timing import Timing, measure

SEED = 20170408  # fixed: the same command continues the same list of configurations
ROWS: Mapping[LayerKind, int] = {
    LayerKind.CONV: 600,
    LayerKind.DW_CONV: 250,
    LayerKind.LINEAR: 250,
    LayerKind.MAXPOOL: 150,
    LayerKind.AVGPOOL: 100,
    LayerKind.BATCHNORM: 120,
    LayerKind.ACTIVATION: 200,
    LayerKind.ADD: 120,
    LayerKind.DROPOUT: 40,
    LayerKind.FLATTEN: 80,
}
MAX_GFLOPS = 8.0
MAX_TENSOR_BYTES = 64e6
MAX_WEIGHT_BYTES = 512e6
EXTRA_COLUMNS = ("min_ms", "iqr_ms")

Config = dict[str, int]


# ---------------------------------------------------------------- what to measure


def _log_int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(round(np.exp(rng.uniform(np.log(low), np.log(high)))))


def _width(rng: np.random.Generator) -> int:
    return _log_int(rng, 4, 224)


def _channels(rng: np.random.Generator, high: int = 1024) -> int:
    """Return a number of channels: mostly multiples of 8, as in real networks, sometimes any."""
    channels = _log_int(rng, 3, high)
    return max(8, channels // 8 * 8) if rng.random() < 0.75 else channels


def _conv(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([1, 1, 1, 3, 3, 3, 5, 7, 11]))
    cin = 3 if rng.random() < 0.1 else _channels(rng)
    return {
        "HW": max(kernel, _width(rng)),
        "kernel": kernel,
        "stride": int(rng.choice([1, 1, 1, 2, 2, 4])),
        "Cin": cin,
        "Cout": _channels(rng),
        "padding": int(rng.choice([0, kernel // 2, kernel // 2])),
        "groups": 1,
        "bias": 1,
    }


def _dw_conv(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([3, 3, 3, 5, 7]))
    channels = _channels(rng)
    return {
        "HW": max(kernel, _width(rng)),
        "kernel": kernel,
        "stride": int(rng.choice([1, 1, 2])),
        "Cin": channels,
        "Cout": channels,
        "padding": kernel // 2,
        "groups": channels,
        "bias": 1,
    }


def _linear(rng: np.random.Generator) -> Config:
    return {"in_features": _log_int(rng, 32, 50_000), "out_features": _log_int(rng, 10, 4096)}


def _maxpool(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([2, 3, 3, 5]))
    width = max(kernel, _width(rng))
    padding = int(rng.choice([0, kernel // 2]))
    return {
        "HW": width,
        "kernel": kernel,
        "stride": int(rng.choice([1, 2, 2, 3])),
        "Cin": _channels(rng),
        "padding": padding,
    }


def _avgpool(rng: np.random.Generator) -> Config:
    width = _width(rng)
    return {"HW": width, "output": min(width, int(rng.choice([1, 1, 2, 6, 7]))), "Cin": _channels(rng, 2048)}


def _plane(rng: np.random.Generator) -> Config:
    return {"HW": _width(rng), "Cin": _channels(rng)}


def _plane_or_vector(rng: np.random.Generator) -> Config:
    return {"HW": 1, "Cin": _log_int(rng, 64, 50_000)} if rng.random() < 0.3 else _plane(rng)


def _conv_module(config: Config) -> nn.Module:
    return nn.Conv2d(
        config["Cin"],
        config["Cout"],
        config["kernel"],
        config["stride"],
        config["padding"],
        groups=config["groups"],
        bias=bool(config["bias"]),
    )


class _Add(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to draw a configuration of one kind, and how to build the layer it describes."""

    draw: Callable[[np.random.Generator], Config]
    build: Callable[[Config], nn.Module]


RECIPES: Mapping[LayerKind, Recipe] = {
    LayerKind.CONV: Recipe(_conv, _conv_module),
    LayerKind.DW_CONV: Recipe(_dw_conv, _conv_module),
    LayerKind.LINEAR: Recipe(_linear, lambda config: nn.Linear(config["in_features"], config["out_features"])),
    LayerKind.MAXPOOL: Recipe(
        _maxpool, lambda config: nn.MaxPool2d(config["kernel"], config["stride"], config["padding"])
    ),
    LayerKind.AVGPOOL: Recipe(_avgpool, lambda config: nn.AdaptiveAvgPool2d(config["output"])),
    LayerKind.BATCHNORM: Recipe(_plane, lambda config: nn.BatchNorm2d(config["Cin"])),
    LayerKind.ACTIVATION: Recipe(_plane_or_vector, lambda config: nn.ReLU(inplace=True)),
    LayerKind.ADD: Recipe(_plane, lambda config: _Add()),
    LayerKind.DROPOUT: Recipe(_plane_or_vector, lambda config: nn.Dropout()),
    LayerKind.FLATTEN: Recipe(_plane, lambda config: nn.Flatten()),
}


def configurations(kind: LayerKind, count: int) -> list[Config]:
    """Return ``count`` different configurations of a kind, always the same ones, none too large to measure."""
    rng = np.random.default_rng([SEED, list(RECIPES).index(kind)])
    seen: dict[tuple[int, ...], Config] = {}
    while len(seen) < count:
        config = RECIPES[kind].draw(rng)
        if _fits(row_work(kind, config)):
            seen.setdefault(tuple(config.values()), config)
    return list(seen.values())


def _fits(work: Work) -> bool:
    return (
        work.output_bytes > 0
        and work.flops <= MAX_GFLOPS * 1e9
        and max(work.input_bytes, work.output_bytes) <= MAX_TENSOR_BYTES
        and work.weight_bytes <= MAX_WEIGHT_BYTES
    )


def interleaved(plans: Mapping[LayerKind, Sequence[Config]]) -> Iterator[tuple[LayerKind, Config]]:
    """Yield the configurations of all kinds in turn, each kind spread evenly over the whole run."""
    steps = [
        ((index + 0.5) / len(plan), kind, config) for kind, plan in plans.items() for index, config in enumerate(plan)
    ]
    for _, kind, config in sorted(steps, key=lambda step: step[0]):
        yield kind, config


# ---------------------------------------------------------------- measuring


def measure_layer(kind: LayerKind, config: Config, device: str) -> Timing:
    """Time one layer as it runs inside a network: eval, inference mode, the device's memory format."""
    module = RECIPES[kind].build(config).eval().to(device)
    if device == "cpu":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind is LayerKind.LINEAR:
        shape: tuple[int, ...] = (1, config["in_features"])
    elif config["HW"] == 1 and kind in (LayerKind.ACTIVATION, LayerKind.DROPOUT):
        shape = (1, config["Cin"])
    else:
        shape = (1, config["Cin"], config["HW"], config["HW"])
    value = as_network_input(torch.rand(shape), device)
    with torch.inference_mode():
        return measure(lambda: module(value), device)


def row_of(kind: LayerKind, config: Config, timing: Timing) -> dict[str, float | int]:
    """Return a CSV row: the contract's columns first, then ours."""
    row: dict[str, float | int] = dict(config)
    if "FLOPs" in COLUMNS[kind]:
        row["FLOPs"] = int(row_work(kind, config).flops)
    row["latency"] = round(timing.median_ms, 6)
    row["min_ms"], row["iqr_ms"] = round(timing.min_ms, 6), round(timing.iqr_ms, 6)
    return row


def header_of(kind: LayerKind) -> list[str]:
    """Return the columns of a kind's file."""
    config = configurations(kind, 1)[0]
    return [*COLUMNS[kind], *(name for name in config if name not in COLUMNS[kind]), *EXTRA_COLUMNS]


def finished_configs(path: Path, kind: LayerKind) -> set[tuple[int, ...]]:
    """Return the configurations that a file already holds; a last line cut off by a power failure is removed.

    Raises: DataSetError: the file was not written by this collector.
    """
    if not path.exists():
        return set()
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    if not text:
        path.unlink()
        return set()
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames != header_of(kind):
        raise DataSetError(f"{path} has other columns than this collector writes: move it away, or choose --output")
    names = list(configurations(kind, 1)[0])
    try:
        return {tuple(int(row[name]) for name in names) for row in reader}
    except (TypeError, ValueError) as exc:
        raise DataSetError(f"{path}, line {reader.line_num} is damaged ({exc}): remove that line and go on") from exc


def append_row(path: Path, kind: LayerKind, row: Mapping[str, float | int]) -> None:
    """Add a row to a file and put it on disk."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header_of(kind), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def collect(directory: Path, device: str, share: float) -> None:
    """Measure what ``directory`` does not hold yet.

    Args: share: fraction of the usual number of rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plans = {kind: configurations(kind, max(8, round(count * share))) for kind, count in ROWS.items()}
    done = {kind: finished_configs(csv_path(directory, kind), kind) for kind in plans}
    steps = [step for step in interleaved(plans) if tuple(step[1].values()) not in done[step[0]]]
    total = sum(map(len, plans.values()))
    with tqdm(total=total, initial=total - len(steps), unit="layer", disable=None) as progress:
        for kind, config in steps:
            progress.set_description(kind)
            append_row(csv_path(directory, kind), kind, row_of(kind, config, measure_layer(kind, config, device)))
            progress.update()


def provenance(side: str, device: str, threads: int) -> dict[str, Any]:
    """Return what a reader must know to trust the data elsewhere."""
    return {
        "side": side,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("collect.py", __doc__)
    parser.add_argument("--side", choices=SIDES, required=True, help="which side of the split this device is")
    add_device(parser)
    parser.add_argument("--output", type=Path, help="directory of the CSV files (default: predictor/dataset/SIDE)")
    parser.add_argument(
        "--config", type=Path, help="parameter file to write (default: predictor/config/SIDE/DEVICE.json)"
    )
    parser.add_argument("--fresh", action="store_true", help="first remove the rows that are there (default: go on)")
    parser.add_argument("--percent", type=positive_int, default=100, help="share of the rows to measure (default: 100)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    threads = use_threads(args.threads or {"edge": 1, "cloud": os.cpu_count() or 1}[args.side])
    directory = args.output or default_directory(args.side, args.device)
    about = provenance(args.side, args.device, threads)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if args.fresh:
            for kind in ROWS:
                csv_path(directory, kind).unlink(missing_ok=True)
        check_same_machine(directory, about)
        (directory / "provenance.json").write_text(json.dumps(about, indent=2) + "\n")
        collect(directory, args.device, args.percent / 100)
    print_scores(fit_and_save(directory, args.config or parameter_file(args.side, args.device)))
    return 0


def default_directory(side: str, device: str) -> Path:
    """Return where the data sets of a side and device lie: those of the CPU in the contract's place."""
    return DATASET_DIR / side if device == "cpu" else DATASET_DIR / side / device


def check_same_machine(directory: Path, about: Mapping[str, Any]) -> None:
    """Refuse to mix rows of two machines.

    Raises: UsageError: the directory holds rows of another machine, device, number of threads or version.
    """
    if not any(csv_path(directory, kind).exists() for kind in ROWS):
        return
    before = read_provenance(directory)
    names = ("device", "device_name", "threads", "torch")
    if any(before.get(name) != about[name] for name in names):
        theirs, ours = ({name: known.get(name) for name in names} for known in (before, about))
        raise UsageError(
            f"{directory} holds rows of {theirs}, this is {ours}: pass --fresh to replace them, or --output DIR"
        )


if __name__ == "__main__":
    sys.exit(main())
