"""The table of benchmarks: it has every one, and says of each what it measures and how it is run."""

from __future__ import annotations

import re

import pytest

from tests.benchmark import __main__ as benchmarks
from tests.benchmark import common
from utils.cli import ROOT


def test_every_benchmark_is_in_the_table() -> None:
    files = (ROOT / "tests" / "benchmark").glob("[!_]*.py")
    runnable = {path.stem for path in files if '__name__ == "__main__"' in path.read_text()}
    names = [benchmark.name for benchmark in benchmarks.BENCHMARKS]
    assert set(names) == runnable
    assert len(set(names)) == len(names)


def test_the_list_has_a_command_and_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tests.benchmark", "--list"])
    assert benchmarks.main() == 0
    runs, _, alone = capsys.readouterr().out.partition("to be run by themselves:")
    for benchmark in benchmarks.BENCHMARKS:
        part = alone if benchmark.left_out else runs
        assert re.search(
            rf"python -m tests\.benchmark\.{benchmark.name}\b.*\n +{re.escape(benchmark.description)}", part
        )
        assert len(benchmark.description) > 20


def test_one_that_fails_leaves_the_others_to_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def note(benchmark: benchmarks.Benchmark) -> bool:
        run.append(benchmark.name)
        return benchmark.name != "decision"

    monkeypatch.setattr("sys.argv", ["tests.benchmark"])
    monkeypatch.setattr(benchmarks.Benchmark, "run", note)
    assert benchmarks.main() == 1
    assert run == [benchmark.name for benchmark in benchmarks.BENCHMARKS if not benchmark.left_out]
    assert capsys.readouterr().out.endswith("failed: decision\n")


@pytest.mark.parametrize(("stolen_ms", "tries"), [(0.0, 1), (3.0, 3), (100.0, common.MAX_TRIES)])
def test_what_the_host_disturbed_is_measured_again(
    stolen_ms: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_ms, stolen, calls = 0.0, 0.0, 0

    def measure() -> int:
        nonlocal clock_ms, stolen, calls
        clock_ms += 100.0
        stolen += max(stolen_ms - 0.7 * calls, 0.0)  # less from time to time
        calls += 1
        return calls

    monkeypatch.setattr(common, "now_ms", lambda: clock_ms)
    monkeypatch.setattr(common, "_stolen_ms", lambda: stolen)
    assert common.undisturbed(measure) == tries
