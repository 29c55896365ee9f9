"""Predicted against measured transfer times over emulated links, on an idle and on a warm connection.

    python -m tests.benchmark.transfer_model [RATE_MBIT,RTT_MS ...] [--congestion-control NAME]

Messages of the project are sent: a request with one tensor, and a reply of 1000 classes. Idle: a connection after hello
and the preparation of a cut, paced as the edge paces a first task. Warm: a connection that has just carried the same
tensor, twice.

The model gets the link's payload rate (1448 of 1500 bytes of a packet) and the round trip of pings just before, both
true, so that the error is that of the model. If the host gave this machine no time for more than 2 % of a transfer, the
transfer is repeated.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np

from neurosurgeon.graph.spec import Array
from neurosurgeon.net.access import Access
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.messages import Hello, Message, Prepare, Ready, Reply, Request
from neurosurgeon.net.session import PACE
from neurosurgeon.net.sockets import accepted, connect, listen
from neurosurgeon.planner.transfer import FRAME_BYTES, IDLE, Sender, transfer_time_ms
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import save, undisturbed
from tests.benchmark.links import CLOUD_IP, TOOL, emulated_link, payload_bytes_per_s, why_not

PORT, NETWORK = 5077, "10.77.0.0/30"
RATES_MBIT, RTTS_MS = (1, 5, 20, 100, 500), (1, 10, 50)
SIZES_BYTES = (1_000, 10_000, 37_000, 150_000, 602_000, 3_200_000, 13_000_000)
LONGEST_S = 30.0  # a transfer; larger ones would make the same point for minutes
CLASSES = 1000
REQUEST = Request("model", b"", "0" * 16, "0" * 16)
PINGS, SETTLE_S, WAIT_S = 5, 0.3, 200.0
# Repetitions of a transfer by its longest time, s, each on a connection of its own: medians count.
REPEATS = ((0.05, 15), (0.2, 5), (2.0, 3), (LONGEST_S, 1))


def serve() -> None:
    """Answer requests, one connection after the other, on the far side of the link."""
    output = np.zeros((1, CLASSES), np.float32)
    for sock, _ in accepted(listen(CLOUD_IP, PORT, Access(insecure=True))):
        with Connection(sock) as connection:
            while answer(connection, output):
                pass


def answer(connection: Connection, output: Array) -> bool:
    try:
        received = connection.receive(WAIT_S)
        arrived_ms = now_ms()
        if isinstance(received.message, Hello):
            connection.send(Hello.of())
        elif isinstance(received.message, Prepare):
            connection.send(Ready(received.message.model, ""))
        else:
            connection.send(Reply(now_ms() - arrived_ms, 0.0, 0.0, received.receive_ms), [output])
    except Exception:
        return False
    return True


def asked_ms(connection: Connection, message: Message) -> float:
    """Return the time until the reply to a few bytes."""
    start_ms = now_ms()
    connection.send(message)
    connection.receive(WAIT_S)
    return now_ms() - start_ms


def transfer_ms(connection: Connection, array: Array) -> float:
    start_ms = now_ms()
    connection.send(REQUEST, [array])
    received = connection.receive(WAIT_S)
    assert isinstance(received.message, Reply)
    return now_ms() - start_ms - received.message.cloud_ms


def measure(rate_mbit: float) -> None:
    """Print one line for each size: bytes, and (predicted, measured) of an idle and a warm connection, ms."""
    rate = payload_bytes_per_s(rate_mbit)
    for size in SIZES_BYTES:
        if size / rate > LONGEST_S:
            continue
        repeats = next(count for longest_s, count in REPEATS if size / rate <= longest_s)
        figures = [undisturbed(partial(figures_of, size, rate)) for _ in range(repeats)]
        print(size, *map(statistics.median, zip(*figures, strict=True)), flush=True)


def ping_ms(rate: float) -> float:
    """Return the round trip of a few bytes, less their own time on the link."""
    with connect(CLOUD_IP, PORT) as connection:
        return statistics.median(asked_ms(connection, Hello.of()) for _ in range(PINGS)) - 2e3 * FRAME_BYTES / rate


def figures_of(size: int, rate: float) -> list[float]:
    """Return predicted and measured time of an idle connection, and of a warm one, ms."""
    array, figures, rtt_ms = np.zeros(size // 4, np.float32), list[float](), ping_ms(rate)
    with connect(CLOUD_IP, PORT) as connection:
        connection.send_at_most(PACE * rate)
        asked_ms(connection, Hello.of())
        asked_ms(connection, Prepare(str(len(array)), b"", ""))
        for warmup in (0, 1):  # the idle transfer itself is the first that warms the connection
            for _ in range(warmup):
                transfer_ms(connection, array)
            state = connection.send_state()
            sender = Sender(*state) if state else IDLE
            figures += [transfer_time_ms(size, 4 * CLASSES, rate, rtt_ms, sender), transfer_ms(connection, array)]
            connection.send_at_most(math.inf)
    return figures


def run(rate_mbit: float, rtt_ms: float, congestion_control: str) -> list[list[float]]:
    """Return the figures of one link, (sizes, 5)."""
    module = [sys.executable, "-m", "tests.benchmark.transfer_model"]
    with emulated_link(rate_mbit, rtt_ms):
        server = subprocess.Popen([TOOL, "cloud", *module, "--serve"])
        listening = [TOOL, "cloud", "ss", "-Hltn", f"sport = :{PORT}"]
        while server.poll() is None and not subprocess.run(listening, capture_output=True, check=True).stdout:
            time.sleep(SETTLE_S)
        if congestion_control:  # from the first packet on; a socket that had another one before may still pace
            set_route = ["ip", "route", "replace", NETWORK, "dev", "emu0", "congctl", congestion_control]
            subprocess.run([TOOL, "edge", *set_route], check=True)
        measuring = [*module, f"{rate_mbit:g},{rtt_ms:g}", "--measure"]
        done = subprocess.run([TOOL, "edge", *measuring], stdout=subprocess.PIPE, text=True, check=True)
        server.kill()
        server.wait()
    return [list(map(float, line.split())) for line in done.stdout.splitlines()]


def show(rate_mbit: float, rtt_ms: float, rows: list[list[float]]) -> list[dict[str, Any]]:
    """Print the figures of one link; return them by name."""
    found = []
    for size, *figures in rows:
        pairs = list(zip(figures[::2], figures[1::2], strict=True))  # predicted, measured
        errors = [predicted / measured - 1 for predicted, measured in pairs]
        print(f"{rate_mbit:>6g}{rtt_ms:>6g}{size / 1e3:>10.0f}", end="")
        for (predicted, measured), error in zip(pairs, errors, strict=True):
            print(f"{predicted:>12.2f}{measured:>11.2f}{100 * error:>+7.1f} %", end="")
        print(flush=True)
        found += [
            {"rate_mbit": rate_mbit, "rtt_ms": rtt_ms, "bytes": size, "state": state, "error": error}
            for state, error in zip(("idle", "warm"), errors, strict=True)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("links", nargs="*", default=[f"{r},{t}" for r in RATES_MBIT for t in RTTS_MS])
    parser.add_argument("--congestion-control", default="", help="of the edge (default: the system's)")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    if args.serve:
        return serve()
    links = [tuple(map(float, link.split(","))) for link in args.links]
    if args.measure:
        return measure(links[0][0])
    if reason := why_not():
        raise SystemExit(reason)
    print(f"{'Mbit/s':>6}{'RTT':>6}{'KB':>10}{'idle: predicted':>16}{'measured':>9}{'error':>7}{'warm':>12}  ms")
    found = [row for rate, rtt in links for row in show(rate, rtt, run(rate, rtt, args.congestion_control))]
    for state in ("idle", "warm"):
        errors = [abs(row["error"]) for row in found if row["state"] == state]
        good = sum(error <= 0.1 for error in errors)
        print(f"{state}: {good} of {len(errors)} within 10 %, median {100 * statistics.median(errors):.1f} %", end="")
        print(f", worst {100 * max(errors):.1f} %")
    save("transfer_model", {"congestion_control": args.congestion_control or "system's", "transfers": found})


if __name__ == "__main__":
    main()
