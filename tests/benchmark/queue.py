"""A queue over an emulated link: many in flight against one after the other, in turn, and the bound of the hardware.

    python -m tests.benchmark.queue [RATE_MBIT [RTT_MS]]

The bound is the busiest of edge, uplink and cloud in that run: the sum of its tasks' times there. Edge and cloud report
their compute times. The uplink is busy for the bytes of every request, its head included, at the rate of TCP's payload
on the link (1448 of 1500 bytes of a packet). Both sides compute with one thread, so that each has a core of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from neurosurgeon.planner.transfer import frame_bytes
from neurosurgeon.utils.units import s_to_ms
from tests.benchmark.common import save
from tests.benchmark.links import CLOUD_IP, emulated_link, on_cloud_side, on_edge_side, payload_bytes_per_s, why_not

ROUNDS = 3
TASKS = ["--tasks", "40", "--seed", "1"]
RUNS = {
    "latency, 1 in flight": ["--in-flight", "1"],
    "latency": [],
    "throughput, 1 in flight": ["--objective", "throughput", "--in-flight", "1"],
    "throughput": ["--objective", "throughput"],
    "throughput, 2 in flight": ["--objective", "throughput", "--in-flight", "2"],
    "throughput, 4 in flight": ["--objective", "throughput", "--in-flight", "4"],
    "throughput, Johnson's order": ["--objective", "throughput", "--schedule", "johnson"],
}


def run_queue(flags: list[str], ports: list[int]) -> dict[str, Any]:
    """Run one queue on the near side of the link; return its JSON document."""
    address = ["-i", CLOUD_IP, "-p", str(ports[0]), "--monitor-port", str(ports[1])]
    done = on_edge_side(["tasks_edge_api.py", *address, *TASKS, *flags, "--json"])
    if done.returncode:
        raise SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def bound_ms(document: dict[str, Any], rate_mbit: float) -> dict[str, float]:
    """Return how long the tasks of a run kept edge, uplink and cloud busy, ms."""
    edge = sum(task["measured"]["edge_ms"] for task in document["tasks"])
    spans = [task["spans_ms"]["cloud"] for task in document["tasks"] if "cloud" in task["spans_ms"]]
    cloud = sum(end - start for start, end in spans)
    sent = [sum(tensor["bytes"] for tensor in task["crossing"] or ()) for task in document["tasks"]]
    uplink_s = sum(map(frame_bytes, filter(None, sent))) / payload_bytes_per_s(rate_mbit)
    return {"edge": edge, "uplink": s_to_ms(uplink_s), "cloud": cloud}


def main() -> None:
    if reason := why_not():
        raise SystemExit(reason)
    rate_mbit, rtt_ms = (float(text) for text in (sys.argv[1:] + ["20", "20"][len(sys.argv) - 1 :]))
    rows: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in RUNS}
    with (
        emulated_link(rate_mbit, rtt_ms),
        on_cloud_side(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", "1"]) as cloud,
    ):
        run_queue([], cloud.ports)  # networks are loaded, forests fitted
        for _ in range(ROUNDS):
            for name, flags in RUNS.items():
                document = run_queue(flags, cloud.ports)
                busy = bound_ms(document, rate_mbit)
                makespan_ms = document["summary"]["makespan_ms"]
                rows[name].append((makespan_ms, max(busy.values()) / makespan_ms, busy))
    print(f"40 tasks over {rate_mbit:g} Mbit/s, RTT {rtt_ms:g} ms: medians of {ROUNDS} rounds in turn")
    print(f"{'':<30}{'makespan, ms':>13}{'tasks/s':>9}{'of the bound':>14}   busy, ms: edge, uplink, cloud")
    for name, runs in rows.items():
        makespan_ms = statistics.median(run[0] for run in runs)
        share = statistics.median(run[1] for run in runs)
        busy = runs[-1][2]
        print(
            f"{name:<30}{makespan_ms:>13.0f}{40e3 / makespan_ms:>9.2f}{share:>14.2f}   "
            + "  ".join(f"{value:.0f}" for value in busy.values())
        )
    save("queue", {"rate_mbit": rate_mbit, "rtt_ms": rtt_ms, "runs": rows})


if __name__ == "__main__":
    main()
