"""Collect the same blocks every time, continue an interrupted run, and keep whole files at any moment."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurosurgeon.cli import collect as collect_cli
from neurosurgeon.cli.process import ROOT
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor import collect, staging
from neurosurgeon.predictor.collect import (
    BLOCK_LAYERS,
    BlockTimes,
    append_rows,
    blocks,
    config_names,
    finished_configs,
    measure_block,
)
from neurosurgeon.predictor.get_datasets_func import (
    COLUMNS,
    MIN_ROWS,
    csv_path,
    load_dataset,
    load_datasets,
    read_provenance,
)
from neurosurgeon.predictor.kernel_flops import row_work
from neurosurgeon.predictor.kind_models import Score
from neurosurgeon.predictor.layer_timing import BUILDERS, build_layers
from neurosurgeon.predictor.machine_speed import SEED, control_layers
from neurosurgeon.predictor.places import default_directory, parameter_file
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.sampling import MAX_GFLOPS, MAX_TENSOR_BYTES, RECIPES, Layer, draw_layer, expected_ms
from neurosurgeon.predictor.store import load_predictor
from neurosurgeon.utils.errors import DataSetError

MEMORY = 1e9
ENOUGH = 60  # blocks, until even the rarest kind has enough rows to fit


class FakeClock:
    """A replacement of measure_block: made-up times at no cost, and Ctrl-C after a number of blocks."""

    def __init__(self, blocks: int | None = None) -> None:
        self.blocks = blocks
        self.measured: list[Sequence[Layer]] = []

    def __call__(self, block: Sequence[Layer], device: str, controls: object) -> BlockTimes:
        if len(self.measured) == self.blocks:
            raise KeyboardInterrupt
        self.measured.append(block)
        return BlockTimes([[0.001 + row_work(kind, config).flops / 1e9] * 7 for kind, config in block], 1.0)


Collect = Callable[..., FakeClock]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a fixed size on which every block takes six seconds."""
    times_ms = iter(range(0, 10**9, 6000))
    monkeypatch.setattr(collect, "now_ms", lambda: float(next(times_ms)))
    monkeypatch.setattr(collect, "memory_bytes", lambda: MEMORY / collect.MEMORY_SHARE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Collect:
    """The function that collects for as long as some blocks take, with a fake clock, and returns the clock."""

    def collect_into(directory: Path, blocks: int = 5, interrupt_after: int | None = None, **kinds: Any) -> FakeClock:
        clock = FakeClock(interrupt_after)
        monkeypatch.setattr(collect, "measure_block", clock)
        try:
            collect.collect(directory, "cpu", blocks * 6 / 60, {"side": "edge", "date": "today"}, **kinds)
        except KeyboardInterrupt:
            assert interrupt_after is not None
        return clock

    return collect_into


def contents(directory: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in sorted(directory.glob("*.csv"))}


# ---------------------------------------------------------------- blocks of layers


def test_blocks_are_always_the_same() -> None:
    assert list(islice(blocks(MEMORY), 10)) == list(islice(blocks(MEMORY), 10))


def test_the_first_blocks_have_enough_rows_of_every_kind() -> None:
    first = [kind for block in islice(blocks(MEMORY), collect.BATCH_LAYERS // BLOCK_LAYERS) for kind, _ in block]
    assert min(first.count(kind) for kind in RECIPES) >= MIN_ROWS * 1.25  # some are left out where the machine is busy
    few = [kind for block in islice(blocks(MEMORY), 5) for kind, _ in block]
    assert sum(few.count(kind) >= MIN_ROWS for kind in RECIPES) >= len(RECIPES) / 2


def test_later_blocks_are_those_of_earlier_versions() -> None:
    rng = np.random.default_rng([SEED, 0])
    drawn = [draw_layer(rng, MEMORY) for _ in range(collect.BATCH_LAYERS)]
    per_batch = collect.BATCH_LAYERS // BLOCK_LAYERS
    assert all(layer in drawn for block in islice(blocks(MEMORY), per_batch, 2 * per_batch) for layer in block)


def test_layers_are_never_too_large_to_measure() -> None:
    for block in islice(blocks(MEMORY), 16):
        for kind, config in block:
            work = row_work(kind, config)
            assert 0 < work.output_bytes <= MAX_TENSOR_BYTES
            assert work.flops <= MAX_GFLOPS * 1e9


def test_a_block_has_layers_of_similar_size_and_small_ones() -> None:
    for block in islice(blocks(MEMORY), 8):
        sizes_ms = sorted(expected_ms(*layer) for layer in block if expected_ms(*layer) > collect.SMALL_MS)
        if sizes_ms and sizes_ms[-1] < 1:  # the last block of a batch holds all that is larger
            assert sizes_ms[-1] / sizes_ms[0] < 10


def test_a_block_fits_into_memory() -> None:
    limit = 20e6
    for block in islice(blocks(limit), 16):
        assert len(block) == 1 or sum(row_work(*layer).traffic_bytes for layer in block) <= limit


def test_all_kinds_are_drawn_and_all_parts_of_the_space() -> None:
    rng = np.random.default_rng(1)
    drawn = [draw_layer(rng, MEMORY) for _ in range(6000)]
    assert {kind for kind, _ in drawn} == set(RECIPES) == set(COLUMNS)
    convs = [config for kind, config in drawn if kind is LayerKind.CONV]
    assert {config["kernel"] for config in convs} >= {1, 2, 3, 5, 7, 11}
    assert {config["stride"] for config in convs} >= {1, 2, 3, 4}
    assert {config["bias"] for config in convs} == {0, 1}
    assert any(1 < config["groups"] < config["Cin"] for config in convs)
    assert any(config["Cin"] % 2 for config in convs)
    assert any(config["HW"] % 2 and config["HW"] != 7 for config in convs)
    assert max(config["in_features"] for kind, config in drawn if kind is LayerKind.LINEAR) > 30_000


@pytest.mark.parametrize("kind", RECIPES)
def test_a_configuration_builds_the_layer_that_it_describes(kind: LayerKind) -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        config = RECIPES[kind].draw(rng)
        while not 0 < row_work(kind, config).output_bytes < 1e7:
            config = RECIPES[kind].draw(rng)
        layer = BUILDERS[kind](config)
        with torch.inference_mode():
            output = layer.run(*layer.inputs)
        assert isinstance(output, torch.Tensor)
        expected = row_work(kind, config).output_bytes
        slack = 4 * config["HW"] ** 2 if kind is LayerKind.SHUFFLE else 0  # needs an even number of channels
        assert abs(output.nbytes - expected) <= slack, config
        assert set(config) == set(config_names(kind))


def test_measure_block_times_every_layer_equally_often() -> None:
    block = next(blocks(MEMORY))[:5]
    times = measure_block(block, "cpu", build_layers(control_layers(), "cpu"))
    times_ms = times.layers_ms
    assert times.control_ms > 0
    assert len(times_ms) == 5
    assert {len(layer) for layer in times_ms} == {len(times_ms[0])}
    assert len(times_ms[0]) >= collect.MIN_PASSES
    assert min(map(min, times_ms)) > 0


# ---------------------------------------------------------------- collecting


def test_collect_writes_the_columns_of_the_contract_first(tmp_path: Path, run: Collect) -> None:
    clock = run(tmp_path, ENOUGH)
    rows = {
        kind: len(lines) - 1 for kind, lines in ((p.stem, contents(tmp_path)[p.name]) for p in tmp_path.glob("*.csv"))
    }
    assert sum(rows.values()) <= sum(map(len, clock.measured)) <= ENOUGH * BLOCK_LAYERS
    for kind in RECIPES:
        assert len(load_dataset(tmp_path, kind)) == rows[f"{kind}_lat"]
        header = contents(tmp_path)[f"{kind}_lat.csv"][0]
        assert header.startswith(",".join(COLUMNS[kind]))
        assert header.endswith(",".join(collect.EXTRA_COLUMNS))


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_collect_continues_an_interrupted_run(tmp_path: Path, run: Collect, blocks: int) -> None:
    run(tmp_path / "whole")
    first = run(tmp_path / "parts", interrupt_after=blocks)
    second = run(tmp_path / "parts")
    assert len(first.measured) == blocks
    assert len(first.measured) + len(second.measured) == 5
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_collect_measures_no_block_of_a_finished_run_again(tmp_path: Path, run: Collect) -> None:
    run(tmp_path)
    assert run(tmp_path).measured == []


def test_collect_extends_a_shorter_run(tmp_path: Path, run: Collect) -> None:
    run(tmp_path)
    assert len(run(tmp_path, 8).measured) == 3


def test_collect_without_a_lender_runs_until_all_kinds_have_rows(
    tmp_path: Path, run: Collect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "lending_directory", lambda directory, provenance: None)
    assert len(run(tmp_path, 1).measured) == collect.BATCH_LAYERS // BLOCK_LAYERS
    assert all(len(load_dataset(tmp_path, kind)) >= MIN_ROWS for kind in RECIPES)


TOGETHER = (LayerKind.MATMUL, LayerKind.SOFTMAX)


def test_collect_of_other_kinds_is_a_separate_collection(tmp_path: Path, run: Collect) -> None:
    run(tmp_path, kinds=(LayerKind.CONV,))
    before = contents(tmp_path)
    assert len(run(tmp_path, 3, kinds=TOGETHER).measured) == 3  # the time spent on other kinds does not count
    run(tmp_path, 4, kinds=TOGETHER[::-1])  # continues
    provenance = read_provenance(tmp_path)
    assert provenance["collections"] == [
        {"kinds": ["conv"], "date": "today", "profiling_s": 30.0},
        {"kinds": ["softmax", "matmul"], "date": "today", "profiling_s": 24.0},
    ]
    assert (provenance["side"], provenance["profiling_s"]) == ("edge", 54.0)
    assert contents(tmp_path)["conv_lat.csv"] == before["conv_lat.csv"]


def test_a_provenance_without_collections_counts_as_one(tmp_path: Path, run: Collect) -> None:
    run(tmp_path, kinds=TOGETHER)
    (tmp_path / "provenance.json").write_text('{"side": "edge", "date": "long ago", "profiling_s": 30.0}')
    assert run(tmp_path, kinds=TOGETHER).measured == []
    run(tmp_path, 1, kinds=(LayerKind.CONV,))
    assert read_provenance(tmp_path)["collections"] == [
        {"kinds": ["matmul", "softmax"], "date": "long ago", "profiling_s": 30.0},
        {"kinds": ["conv"], "date": "today", "profiling_s": 6.0},
    ]


@pytest.mark.parametrize(
    "damage",
    [
        '{"collections": [3]}',
        '{"collections": [{}]}',
        '{"collections": 3}',
        '{"collections": [{"kinds": ["conv"], "profiling_s": "x"}]}',
        '{"profiling_s": "x"}',
    ],
)
def test_damaged_collections_are_refused(tmp_path: Path, run: Collect, damage: str) -> None:
    (tmp_path / "provenance.json").write_text(damage)
    with pytest.raises(DataSetError, match=r"provenance\.json has damaged collections: .*--fresh"):
        run(tmp_path, kinds=(LayerKind.CONV,))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["cpu", "amd-epyc-avx2"])
def test_the_shipped_provenance_has_a_date_for_every_kind(side: str, name: str) -> None:
    directory = default_directory(side, name)
    collections = read_provenance(directory)["collections"]
    assert sorted(kind for each in collections for kind in each["kinds"]) == sorted(load_datasets(directory))
    assert load_predictor(parameter_file(side, name)).provenance["collections"] == collections


def test_no_layer_is_written_twice(tmp_path: Path, run: Collect) -> None:
    run(tmp_path, 30)
    for kind in RECIPES:
        path = csv_path(tmp_path, kind)
        assert len(finished_configs(path, kind)) == len(contents(tmp_path)[path.name]) - 1


def test_collect_measures_a_truncated_line_again(tmp_path: Path, run: Collect) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", interrupt_after=4)
    path = csv_path(tmp_path / "parts", LayerKind.CONV)
    path.write_text(path.read_text()[:-9])
    (tmp_path / "parts" / "provenance.json").unlink()
    run(tmp_path / "parts")
    whole, parts = (contents(tmp_path / name) for name in ("whole", "parts"))
    for name, lines in whole.items():
        assert set(lines) <= set(parts[name])
    assert len(set(parts["conv_lat.csv"])) == len(parts["conv_lat.csv"])


def test_collect_writes_a_truncated_header_again(tmp_path: Path, run: Collect) -> None:
    csv_path(tmp_path, LayerKind.CONV).write_text("HW,ker")
    run(tmp_path, 8)
    assert len(load_dataset(tmp_path, LayerKind.CONV)) >= 20


def test_collect_never_changes_a_file_with_other_columns(tmp_path: Path, run: Collect) -> None:
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


def test_a_row_has_the_lower_quartile_and_the_spread(tmp_path: Path) -> None:
    config = {"HW": 4, "Cin": 8}
    row = collect.csv_row(LayerKind.BATCHNORM, config, [1.0, 2.0, 3.0, 4.0, 50.0], 0.7)
    append_rows(csv_path(tmp_path, LayerKind.BATCHNORM), LayerKind.BATCHNORM, [row])
    expected = {"latency": 2.0, "median_ms": 3.0, "min_ms": 1.0, "iqr_ms": 2.0, "samples": 5, "pace_ms": 0.7}
    assert {name: row[name] for name in expected} == expected


def test_warn_if_noisy_warns_of_a_large_spread(caplog: pytest.LogCaptureFixture) -> None:
    collect.warn_if_noisy([0.1, 0.2, 0.1])
    assert not caplog.records
    collect.warn_if_noisy([0.4, 0.5, 0.1])
    assert "this machine is noisy" in caplog.text


# ---------------------------------------------------------------- killed


COLLECTORS = """
import os, sys
from pathlib import Path
from neurosurgeon.predictor import collect
collect.measure_block = lambda block, device, controls: collect.BlockTimes([[0.5] * 7 for _ in block], 1.0)
for _ in sys.stdin:  # a process for each line: to import everything takes seconds
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        collect.collect(Path(sys.argv[1]), "cpu", 60, {"side": "edge"})
        os._exit(0)
"""


def test_a_collector_killed_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    before: dict[str, list[str]] = {}
    command = [sys.executable, "-c", COLLECTORS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as collectors:
        assert collectors.stdin and collectors.stdout
        for kill in range(20):
            print(file=collectors.stdin, flush=True)
            collector = int(collectors.stdout.readline())
            wait_for_rows(tmp_path, sum(map(len, before.values())) + 1 + kill * 7 % 60)
            os.kill(collector, signal.SIGKILL)
            assert int(collectors.stdout.readline()) == -signal.SIGKILL
            after = contents(tmp_path)
            for name, lines in after.items():
                assert lines[: len(before.get(name, []))] == before.get(name, [])  # nothing is lost
                assert {line.count(",") for line in lines} == {lines[0].count(",")}
                assert (tmp_path / name).read_bytes().endswith(b"\n")
            before = after
    assert sum(map(len, before.values())) > 500


def wait_for_rows(directory: Path, rows: int) -> None:
    deadline_s = time.monotonic() + 60
    while sum(map(len, contents(directory).values())) < rows and time.monotonic() < deadline_s:
        time.sleep(0.005)


# ---------------------------------------------------------------- the command


def test_the_command_collects_fits_and_writes_its_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "measure_block", FakeClock())
    config = tmp_path / "config.json"
    arguments = ["--side", "edge", "--threads", "1", "--output", str(tmp_path / "data"), "--config", str(config)]
    assert collect_cli.main([*arguments, "--minutes", str(ENOUGH / 10)]) == 0
    provenance = json.loads((tmp_path / "data" / "provenance.json").read_text())
    assert set(provenance) >= {"side", "device", "device_name", "threads", "torch", "date", "governor", "profiling_s"}
    predictor = load_predictor(config)
    assert set(predictor.kinds) == set(RECIPES)
    assert predictor.threads == 1


def test_the_command_never_mixes_rows_of_two_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collect, "measure_block", FakeClock())
    arguments = ["--side", "edge", "--output", str(tmp_path), "--config", str(tmp_path / "config.json")]
    arguments += ["--minutes", str(ENOUGH / 10), "--threads"]
    assert collect_cli.main([*arguments, "1"]) == 0
    provenance = tmp_path / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"threads": 1', '"threads": 4'))
    assert collect_cli.main([*arguments, "1"]) == 2
    assert "--fresh" in capsys.readouterr().err
    clock = FakeClock()
    monkeypatch.setattr(collect, "measure_block", clock)
    assert collect_cli.main([*arguments, "1", "--fresh"]) == 0
    assert len(clock.measured) == ENOUGH


# ---------------------------------------------------------------- activation


Command = Callable[..., FakeClock]
FIT = "fit_and_save"  # takes seconds, and is another test's


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The function that runs the command in ``tmp_path`` for as long as some blocks take, and returns the clock."""

    def fit(directory: Path, path: Path) -> dict[str, dict[LayerKind, Score]]:
        load_datasets(directory)
        return {}

    monkeypatch.setattr(collect_cli, FIT, fit)

    def run_command(*flags: str, blocks: int = 9, interrupt_after: int | None = None) -> FakeClock:
        clock = FakeClock(interrupt_after)
        monkeypatch.setattr(collect, "measure_block", clock)
        arguments = ["--side", "edge", "--threads", "1", "--output", str(tmp_path), "--minutes", str(blocks * 6 / 60)]
        assert collect_cli.main([*arguments, *flags]) == (0 if interrupt_after is None else 130)
        return clock

    return run_command


def test_an_interrupted_command_names_the_command_to_continue(
    tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    command(interrupt_after=3)
    assert not contents(tmp_path)
    assert contents(tmp_path / staging.PARTIAL)
    assert caplog.messages[-1] == (
        f"interrupted: 18 of 54 s are measured and kept in {tmp_path / staging.PARTIAL}, but not in use yet; to "
        f"continue: python -m predictor.collect --side edge --device cpu --threads 1 --output {tmp_path} --minutes 0.9"
    )
    assert len(command().measured) == 6
    assert set(contents(tmp_path)) == {f"{kind}_lat.csv" for kind in RECIPES}
    assert not list(tmp_path.glob(".*"))


def test_a_fresh_collection_is_activated_when_complete(tmp_path: Path, command: Command) -> None:
    command(blocks=12)
    before = contents(tmp_path)
    command("--fresh", interrupt_after=3)
    assert contents(tmp_path) == before
    assert len(command().measured) == 6  # continues the fresh one
    assert contents(tmp_path) != before
    assert sum(map(len, contents(tmp_path).values())) < sum(map(len, before.values()))


def test_a_longer_collection_is_activated_when_complete(tmp_path: Path, command: Command) -> None:
    command()
    before = contents(tmp_path)
    command(blocks=12, interrupt_after=2)
    assert contents(tmp_path) == before
    assert len(command(blocks=12).measured) == 1
    for name, lines in before.items():
        assert contents(tmp_path)[name][: len(lines)] == lines


def test_a_fresh_collection_of_one_kind_keeps_the_others(tmp_path: Path, command: Command) -> None:
    command()
    before = contents(tmp_path)
    command("--fresh", "--kinds", "conv", blocks=1)
    after = contents(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"conv_lat.csv"}
    together, again = read_provenance(tmp_path)["collections"]
    assert set(together["kinds"]) == set(RECIPES) - {LayerKind.CONV}
    assert again["kinds"] == ["conv"]


def test_a_collection_keeps_other_files_of_the_directory(tmp_path: Path, command: Command) -> None:
    others = [tmp_path / "another-machine" / "conv_lat.csv", tmp_path / "notes.txt"]
    others[0].parent.mkdir()
    for path in others:
        path.write_text("mine")
    command()
    command("--fresh")
    assert [path.read_text() for path in others] == ["mine", "mine"]


@pytest.mark.parametrize("moment", [0, 1, 9, 17])
def test_activate_survives_a_power_cut(
    tmp_path: Path, command: Command, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--kinds", "conv", "softmax")
    before = contents(tmp_path)
    command("--fresh", interrupt_after=8)
    replaced: list[Path] = []

    def replace(path: Path, content: bytes) -> None:
        if len(replaced) == moment:
            raise KeyboardInterrupt
        replaced.append(path)
        path.write_bytes(content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "replace_file", replace)
        staging.activate(tmp_path, collect.FILES)
    whole = {kind: csv_path(tmp_path, kind).read_text() for kind in RECIPES}
    assert contents(staging.active_directory(tmp_path)) != before
    assert set(load_datasets(tmp_path)) == set(RECIPES)
    staging.finish_activation(tmp_path, collect.FILES)
    assert {kind: csv_path(tmp_path, kind).read_text() for kind in RECIPES} == whole
    assert staging.active_directory(tmp_path) == tmp_path


def test_activate_removes_kinds_that_were_not_measured(tmp_path: Path) -> None:
    (tmp_path / "add_lat.csv").write_text("old")
    staging.start_partial(tmp_path, {"conv_lat.csv": b"new"})
    staging.activate(tmp_path, collect.FILES)
    assert contents(tmp_path) == {"conv_lat.csv": ["new"]}


def test_a_truncated_copy_is_never_read(tmp_path: Path, command: Command) -> None:
    (tmp_path / staging.UNUSED).mkdir()
    (tmp_path / staging.UNUSED / "conv_lat.csv").write_text("half of a cop")
    assert len(command().measured) == 9
