"""A cloud that shares its machine: whole networks by threads and waiting policy, beside none, two and four busy loops.

    python -m tests.benchmark.busy [--models le_net mobile_net resnet18] [--loads 0 2 4] [--rounds 3]

OpenMP's threads wait for the next layer by a policy: they spin for a while, or sleep at once. They read it from the
environment when they start, so every setting is a process of its own. All processes stay alive. They run on command,
one at a time and in turns, so that a drift of the machine affects all of them. A single thread waits for no other, and
has no policy. A cell is the median and the 90th percentile of all runs, ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from neurosurgeon.cli.process import ROOT
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import busy_loops, environment_without, percentile, save

MODELS = ("le_net", "mobile_net", "resnet18")
LOADS = (0, 2, 4)
ROUNDS = 3
TURN_MS = 400.0
POLICY_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
POLICIES: dict[str, dict[str, str]] = {
    "ours": {},  # `utils.machine.set_waiting_policy`
    "spin 300000": {"GOMP_SPINCOUNT": "300000"},  # OpenMP's default
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
SETTINGS = ((1, "ours"), *((2, policy) for policy in POLICIES))

Setting = tuple[int, str]  # threads, waiting policy


@dataclass(frozen=True, slots=True)
class Computer:
    """A child process that runs whole networks on command, with one setting."""

    setting: Setting
    process: subprocess.Popen[str]

    def run(self, model: str) -> list[float]:
        """Return the time of each run of a turn, ms."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{model}\n")
        self.process.stdin.flush()
        times_ms: list[float] = json.loads(self.process.stdout.readline())
        return times_ms


@dataclass(slots=True)
class Cell:
    """All runs of one network with one setting and one number of loops."""

    times_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return median and 90th percentile, ms, and the number of runs."""
        runs = len(self.times_ms)
        return {"median": statistics.median(self.times_ms), "p90": percentile(self.times_ms, 90), "runs": runs}


def start(setting: Setting, models: Sequence[str], stack: ExitStack) -> Computer:
    """Start the process of a setting; it ends with the stack."""
    threads, policy = setting
    command = [sys.executable, "-m", "tests.benchmark.busy", "--serve", str(threads), "--models", *models]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment_without(*POLICY_VARIABLES) | POLICIES[policy],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Computer(setting, process)


def serve(threads: int, models: Sequence[str]) -> None:
    """Run the networks that stdin names, a turn each; write the times of each turn as a line."""
    import torch  # only here: OpenMP reads the environment of this process

    from tests.networks import cut, load_network, pixels, run

    torch.set_num_threads(threads)
    networks = {name: load_network(name) for name in models}
    partitions = {name: cut(network, 0).cloud for name, network in networks.items()}
    inputs = {name: [pixels(network.graph.inputs[0].shape)] for name, network in networks.items()}
    for line in sys.stdin:
        name = line.strip()
        times_ms: list[float] = []
        start_ms = now_ms()
        while not times_ms or now_ms() - start_ms < TURN_MS:
            times_ms.append(run(partitions[name], inputs[name]).compute_ms)
        print(json.dumps(times_ms[1:] or times_ms), flush=True)  # the first of several finds another's data cached


def measure(models: Sequence[str], loads: Sequence[int], rounds: int) -> dict[tuple[str, Setting, int], Cell]:
    """Return the cells, by network, setting and number of loops. Each gets a turn in every round, in random order."""
    cells = {key: Cell() for key in product(models, SETTINGS, loads)}
    with ExitStack() as stack:
        computers = [start(setting, models, stack) for setting in SETTINGS]
        for computer, model in product(computers, models):  # loads networks, builds kernels
            computer.run(model)
        for _ in range(rounds):
            for load in loads:
                with busy_loops(load):
                    for model in models:
                        for computer in random.sample(computers, len(computers)):
                            cells[model, computer.setting, load].times_ms += computer.run(model)
    return cells


def show(cells: dict[tuple[str, Setting, int], Cell], models: Sequence[str], loads: Sequence[int]) -> None:
    """Print the table: a line for each network and setting, two columns for each number of loops."""
    print(f"{'':<14}{'threads':>8}  {'waiting':<12}" + "".join(f"{f'{load} loops':>22}" for load in loads))
    print(f"{'':<14}{'':>8}  {'':<12}" + f"{'median':>13}{'p90':>9}" * len(loads))
    for model, setting in product(models, SETTINGS):
        summaries = [cells[model, setting, load].summary() for load in loads]
        columns = "".join(f"{summary['median']:>13.2f}{summary['p90']:>9.2f}" for summary in summaries)
        print(f"{model:<14}{setting[0]:>8}  {setting[1] if setting[0] > 1 else '':<12}{columns}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.busy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--loads", nargs="+", type=int, default=LOADS, metavar="LOOPS", help="(default: 0 2 4)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.models)
        return
    before = os.getloadavg()[0]
    start_ms = now_ms()
    cells = measure(args.models, args.loads, args.rounds)
    print(f"busy: whole networks, ms, {os.cpu_count()} cores, load before it {before:.1f}", end="")
    print(f", {args.rounds} rounds in turn, {(now_ms() - start_ms) / 1e3:.0f} s")
    show(cells, args.models, args.loads)
    rows: list[dict[str, Any]] = [
        {"model": model, "threads": threads, "waiting": policy, "loops": load, **cell.summary()}
        for (model, (threads, policy), load), cell in cells.items()
    ]
    save("busy", {"load_before": before, "rows": rows})


if __name__ == "__main__":
    main()
