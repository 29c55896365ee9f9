"""Run every benchmark that needs neither root nor more than some minutes, each in a process of its own.

    python -m tests.benchmark [--list]

Figures go to results/*.json. --list: the subject of each, and the reason if it must be run by itself.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from neurosurgeon.cli.process import ROOT
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import ms_to_s

ROOT_NEEDED = "needs root, and a link emulator that LINK_TOOL names"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module with a ``main``. The first line of its docstring is its description."""

    name: str
    left_out: str | None = None  # the reason, if it must be run by itself

    @property
    def command(self) -> str:
        """The command that runs only this benchmark."""
        return f"python -m tests.benchmark.{self.name}"

    @property
    def description(self) -> str:
        """The subject of the measurement."""
        source = (Path(__file__).parent / f"{self.name}.py").read_text(encoding="utf-8")
        return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]

    def run(self) -> bool:
        """Run the benchmark; return whether it succeeded."""
        return subprocess.run([sys.executable, "-m", f"tests.benchmark.{self.name}"], cwd=ROOT).returncode == 0


BENCHMARKS = (
    Benchmark("decision"),
    Benchmark("prediction"),
    Benchmark("machine_speed", "keeps the machine busy for three minutes"),
    Benchmark("execution"),
    Benchmark("batching"),
    Benchmark("busy"),
    Benchmark("halves_regret"),
    Benchmark("transport"),
    Benchmark("overhead"),
    Benchmark("safety"),
    Benchmark("gap"),
    Benchmark("load"),
    Benchmark("many_edges"),
    Benchmark("rate_filter"),
    Benchmark("following"),
    Benchmark("cold_start"),
    Benchmark("all_models", "takes a quarter of an hour"),
    Benchmark("sweep", "takes up to hours, and needs the packages of the families"),
    Benchmark("endurance", "takes eight minutes"),
    Benchmark("survival", "takes twenty minutes; links that lose everything need root"),
    Benchmark("soak", "takes a quarter of an hour"),
    Benchmark("queue", ROOT_NEEDED),
    Benchmark("probe", ROOT_NEEDED),
    Benchmark("transfer_model", ROOT_NEEDED),
    Benchmark("regret", ROOT_NEEDED),
    Benchmark("strategies", ROOT_NEEDED),
)


def show_list() -> None:
    """Print the table: the benchmarks that run, and the others with the reason."""
    print("run by make bench:")
    for benchmark in BENCHMARKS:
        if not benchmark.left_out:
            print(f"  {benchmark.command}\n      {benchmark.description}")
    print("\nto be run by themselves:")
    for benchmark in BENCHMARKS:
        if benchmark.left_out:
            print(f"  {benchmark.command}   ({benchmark.left_out})\n      {benchmark.description}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description="Run the benchmarks.")
    parser.add_argument("--list", action="store_true", help="list the benchmarks, and run none (default: run)")
    if parser.parse_args().list:
        show_list()
        return 0
    failed = []
    for benchmark in BENCHMARKS:
        if not benchmark.left_out:
            print(f"== {benchmark.name}: {benchmark.description}", flush=True)
            start_ms = now_ms()
            failed += [] if benchmark.run() else [benchmark.name]
            print(f"({ms_to_s(now_ms() - start_ms):.0f} s)\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
