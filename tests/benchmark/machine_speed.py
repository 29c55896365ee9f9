"""How far a machine's measured speed can be believed: calibrations beside busy loops, and what they spread by.

    python -m tests.benchmark.machine_speed [--times 2] [--loads 0 1 2 3 4]

Every calibration is a process of its own, as the first contact with a machine is, one after the other: in every round
one beside each number of loops, on the edge's threads and on the cloud's. A factor is how much longer layers take than
where the data comes from that is in use here. Spread: the largest factor over the smallest.
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


def calibrate(side: str, load: int) -> Json:
    """Return the factors that a fresh process measures beside so many loops, and how long it took."""
    command = [sys.executable, "-m", "tests.benchmark.machine_speed", "--side", side]
    with busy_loops(load):
        start_ms = now_ms()
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        took_s = ms_to_s(now_ms() - start_ms)
    return {"side": side, "loops": load, "took_s": took_s, "factors": json.loads(done.stdout)}


def spread(factors: Sequence[float]) -> float:
    """Return the largest over the smallest."""
    return max(factors) / min(factors)


def show(rows: Sequence[Json], loads: Sequence[int]) -> None:
    """Print a line for each side and kind of factor: all calibrations by load, and the spread."""
    print(f"{'':<24}" + "".join(f"{f'{load} loops':>18}" for load in loads) + f"{'spread':>9}")
    for side in SIDES:
        of_side = [row for row in rows if row["side"] == side]
        for name in of_side[0]["factors"]:
            by_load = [[row["factors"][name] for row in of_side if row["loops"] == load] for load in loads]
            cells = [" ".join(f"{factor:.3g}" for factor in factors) for factors in by_load]
            every = [factor for factors in by_load for factor in factors]
            print(f"{side:<8}{name:<16}" + "".join(f"{cell:>18}" for cell in cells) + f"{spread(every):>9.2f}")
    print(f"a calibration, with the start of its process: at most {max(row['took_s'] for row in rows):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.machine_speed")
    parser.add_argument("--times", type=int, default=TIMES, help="calibrations beside each number of loops")
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, metavar="LOOPS", help="(default: 0 1 2 3 4)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured_factors(args.side)))
        return
    turns = [(side, load) for _ in range(args.times) for load in args.loads for side in SIDES]
    rows = [calibrate(side, load) for side, load in turns]
    print("machine speed: factor of every calibration")
    show(rows, args.loads)
    save("machine_speed", {"calibrations": rows})


if __name__ == "__main__":
    main()
