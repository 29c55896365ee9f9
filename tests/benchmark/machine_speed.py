"""Measure the speed of this machine beside busy loops, and show the spread of the measurements.

    python -m tests.benchmark.machine_speed [--times 2] [--loads 0 1 2 3 4]

Every measurement is a process of its own, as at the first contact with a machine. They run one after the other: in
each round one beside each number of loops, with the edge's threads and with the cloud's. A factor is the latency of
layers here / on the machine of the data in use. Spread is the largest factor / the smallest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from neurosurgeon.cli.process import ROOT
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import ms_to_s
from tests.benchmark.common import busy_loops, save
from tests.benchmark.predictors import measured_factors

TIMES, LOADS = 2, (0, 1, 2, 3, 4)

Json = dict[str, Any]


def measure_beside(side: str, load: int) -> Json:
    """Return the factors that a new process measures beside ``load`` busy loops, and its duration."""
    command = [sys.executable, "-m", "tests.benchmark.machine_speed", "--side", side]
    with busy_loops(load):
        start_ms = now_ms()
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        took_s = ms_to_s(now_ms() - start_ms)
    return {"side": side, "loops": load, "took_s": took_s, "factors": json.loads(done.stdout)}


def spread(factors: Sequence[float]) -> float:
    """Return the largest factor / the smallest."""
    return max(factors) / min(factors)


def show(rows: Sequence[Json], loads: Sequence[int]) -> None:
    """Print a line for each side and family of layers: all factors by load, and their spread."""
    print(f"{'':<24}" + "".join(f"{f'{load} loops':>18}" for load in loads) + f"{'spread':>9}")
    for side in SIDES:
        of_side = [row for row in rows if row["side"] == side]
        for name in of_side[0]["factors"]:
            by_load = [[row["factors"][name] for row in of_side if row["loops"] == load] for load in loads]
            cells = [" ".join(f"{factor:.3g}" for factor in factors) for factors in by_load]
            every = [factor for factors in by_load for factor in factors]
            print(f"{side:<8}{name:<16}" + "".join(f"{cell:>18}" for cell in cells) + f"{spread(every):>9.2f}")
    print(f"a measurement, with the start of its process: at most {max(row['took_s'] for row in rows):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.machine_speed")
    parser.add_argument("--times", type=int, default=TIMES, help="measurements beside each number of loops")
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, metavar="LOOPS", help="(default: 0 1 2 3 4)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured_factors(args.side)))
        return
    turns = [(side, load) for _ in range(args.times) for load in args.loads for side in SIDES]
    rows = [measure_beside(side, load) for side, load in turns]
    print("machine speed: factor of every measurement")
    show(rows, args.loads)
    save("machine_speed", {"calibrations": rows})


if __name__ == "__main__":
    main()
