"""Error of the measured rate and RTT over emulated links: plain, lossy, with a token bucket, and shared.

    python -m tests.benchmark.probe [plain|loss|bucket|shared ...] [--tcp] [--cores-sleep]

Five measurements a link; medians, and the largest error of the rate. If the host gave this machine no time for more
than 2 % of a measurement, it is repeated (`tests.benchmark.common.undisturbed`). The true rate is that of TCP's
payload, 1448 of 1500 bytes of a packet. With a token bucket (tbf on the edge's side, on a link of 500 Mbit/s and 10 ms)
it is the bucket's rate. With another TCP flow, started 2 s before, the link's rate or 50 % of it could be called true:
the table compares with the link's. The true RTT is that of ICMP echoes between the two kernels, directly before and
after each measurement, because the emulator's delay over a millisecond changes from second to second. Most of that is
the time in which a virtual core wakes up (`tests.benchmark.common.cores_awake`). It affects echoes and probes alike,
but by chance: so no core sleeps, except with --cores-sleep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from neurosurgeon.cli.monitor import document_of
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.net.monitor_client import measure_link
from neurosurgeon.utils.errors import NetworkError
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import cores_awake, save, undisturbed
from tests.benchmark.links import CLOUD_IP, ECHO_BYTES, PAYLOAD_SHARE, TOOL, echo_ms, emulated_link, why_not

RATES_MBIT, RTTS_MS = (1, 5, 20, 100, 500), (1, 10, 50)
LINKS = [(rate, rtt) for rate in RATES_MBIT for rtt in RTTS_MS]
BUCKETS = [(rate, burst_kb) for rate in (5, 20, 100) for burst_kb in (4, 8, 16, 32, 64)]
FAST_MBIT, FAST_RTT_MS = 500, 10
LOSS_PPM = 5_000
ROUNDS = 5
FLOW_S, FLOW_PORT = 2.0, 5078
SINK = f"""
import socket
listener = socket.create_server(({CLOUD_IP!r}, {FLOW_PORT}))
while True:
    peer, _ = listener.accept()
    while peer.recv(1 << 20):
        pass
"""
FLOW = f"""
import socket
peer = socket.create_connection(({CLOUD_IP!r}, {FLOW_PORT}))
while True:
    peer.sendall(bytes(1 << 18))
"""


def measured(port: int, use_udp: bool) -> dict[str, Any]:
    """Return one measurement, as the self-test reports it, and the mean of the echoes before and after it."""
    before_ms, start_ms = echo_ms(), now_ms()
    estimate = measure_link(CLOUD_IP, port, use_udp=use_udp)
    document = document_of(estimate, now_ms() - start_ms)
    return {**document, "echo_ms": (before_ms + echo_ms()) / 2}


def measure(port: int, use_udp: bool) -> None:
    """Print the measurements of one link as JSON (runs on the near side)."""
    for _ in range(ROUNDS):
        try:
            print(json.dumps(undisturbed(lambda: measured(port, use_udp))), flush=True)
        except NetworkError as exc:  # a lossy link may lose the first packet of a connection: asked again in a second
            print(exc, file=sys.stderr)


@contextlib.contextmanager
def token_bucket(rate_mbit: float, burst_kb: int) -> Iterator[None]:
    """Put a token bucket before the link; its queue holds a tenth of a second, and at least 64 KB."""
    limit = max(64_000, round(rate_mbit * 1e6 / 8 / 10))
    bucket = ["rate", f"{rate_mbit}mbit", "burst", f"{burst_kb * 1000}b", "limit", f"{limit}b"]
    subprocess.run([TOOL, "edge", "tc", "qdisc", "add", "dev", "emu0", "root", "tbf", *bucket], check=True)
    yield


@contextlib.contextmanager
def other_flow() -> Iterator[None]:
    """Keep the link busy with one TCP connection of the system's kind."""
    with contextlib.ExitStack() as stack:
        for side, code in (("cloud", SINK), ("edge", FLOW)):
            process = stack.enter_context(subprocess.Popen([TOOL, side, sys.executable, "-c", code]))
            stack.callback(process.kill)
            time.sleep(FLOW_S / 2)
        yield


def run(link: tuple[float, float], true_mbit: float, tcp: bool, loss: int = 0, beside: Any = None) -> dict[str, Any]:
    """Return and print the figures of one link."""
    rate_mbit, rtt_ms = link
    flags = ["--tcp"] if tcp else []
    module = [sys.executable, "-m", "tests.benchmark.probe"]
    with emulated_link(rate_mbit, rtt_ms, loss), beside or contextlib.nullcontext():
        server = ["-m", "neurosurgeon", "monitor-server", "-i", CLOUD_IP, "--monitor-port", "0", "--insecure"]
        with ServiceProcess(server, prefix=[str(TOOL), "cloud"]) as service:
            command = [TOOL, "edge", *module, "--measure", str(service.ports[0]), *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if not found:
        print(f"{rate_mbit:>6g}{rtt_ms:>6g}  failed", flush=True)
        return {"link": link, "true_mbit": true_mbit, "found": []}
    errors = [one["bandwidth_mb_per_s"] * 8 / (true_mbit * PAYLOAD_SHARE) - 1 for one in found]
    own_ms = 2 * ECHO_BYTES * 8 / (rate_mbit * 1e3)  # of an echo's bytes on the link
    true_rtts_ms = [one["echo_ms"] - own_ms for one in found]
    rtt_errors = [one["rtt_ms"] / true_ms - 1 for one, true_ms in zip(found, true_rtts_ms, strict=True)]
    row = {
        "link": link,
        "true_mbit": true_mbit,
        "error": statistics.median(errors),
        "worst_error": max(errors, key=abs),
        "told_error": statistics.median(one["relative_error"] for one in found),
        "rtt_ms": statistics.median(one["rtt_ms"] for one in found),
        "echo_ms": statistics.median(true_rtts_ms),
        "rtt_error": statistics.median(rtt_errors),
        "bytes": max(one["probe_bytes"] for one in found),
        "ms": statistics.median(one["probe_ms"] for one in found),
        "methods": sorted({one["method"] for one in found}),
        "rates": [one["bandwidth_mb_per_s"] for one in found],
    }
    print(
        f"{rate_mbit:>6g}{rtt_ms:>6g}{true_mbit:>7g}{100 * row['error']:>+8.1f}{100 * row['worst_error']:>+8.1f}"
        f"{100 * row['told_error']:>7.1f}{row['rtt_ms']:>10.2f}{row['echo_ms']:>8.2f}"
        f"{100 * row['rtt_error']:>+8.1f}{row['bytes'] / 1e3:>8.0f}{row['ms']:>8.0f}  {', '.join(row['methods'])}",
        flush=True,
    )
    return row


def run_case(case: str, links: Sequence[tuple[float, float]], tcp: bool) -> list[dict[str, Any]]:
    """Return and print the figures of all links of one case."""
    print(f"\n{case}\n  link: RTT   true   error   worst  claimed%   RTT, ms    echo error %      KB      ms")
    if case == "bucket":
        fast = (FAST_MBIT, FAST_RTT_MS)
        rows = [run(fast, rate, tcp, beside=token_bucket(rate, burst)) for rate, burst in BUCKETS]
    else:
        loss = LOSS_PPM if case == "loss" else 0
        rows = [run(link, link[0], tcp, loss, other_flow() if case == "shared" else None) for link in links]
    good = sum(abs(row.get("error", 1)) <= 0.05 for row in rows)
    near = sum(abs(row.get("rtt_error", 1)) <= 0.05 for row in rows)
    print(f"{case}: rate of {good}, RTT of {near} of {len(rows)} within 5 %")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["plain", "loss", "bucket", "shared"])
    parser.add_argument("--tcp", action="store_true", help="by TCP only")
    parser.add_argument("--cores-sleep", action="store_true", help="keep no core awake")
    parser.add_argument("--rates", type=float, nargs="+", help="only links of these rates")
    parser.add_argument("--measure", type=int, metavar="PORT")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, not args.tcp)
    if reason := why_not():
        raise SystemExit(reason)
    links = [link for link in LINKS if not args.rates or link[0] in args.rates]
    with contextlib.nullcontext() if args.cores_sleep else cores_awake():
        found = {case: run_case(case, links, args.tcp) for case in args.cases}
    save("probe", {"cores_sleep": args.cores_sleep, "cases": found})


if __name__ == "__main__":
    main()
