"""Self-test of the bandwidth monitor: server and client, a process each, on loopback.

python -m net.monitor_test [--duplex] [--compare-iperf3]

With --compare-iperf3 the same link is also measured by iperf3 (https://iperf.fr), where that is installed, for two
seconds; with -i both measure the way to another machine, on which a cloud and ``iperf3 -s`` run.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which need packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from neurosurgeon.net.monitor_client import line_of, measure_link
from neurosurgeon.net.net_utils import format_rate
from neurosurgeon.net.transport import ephemeral_port
from neurosurgeon.utils.cli import DEFAULT_IP, DEFAULT_MONITOR_PORT, ServiceProcess, base_parser, port_number, run_main
from neurosurgeon.utils.errors import NetworkError, UsageError
from neurosurgeon.utils.units import bits_per_s_to_bytes_per_s

IPERF3_S, IPERF3_TIMEOUT_S, IPERF3_PORT = 2, 30.0, 5201


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("monitor_test.py", __doc__)
    parser.add_argument("-i", "--ip", help="measure the way to this cloud (default: a service of our own on loopback)")
    parser.add_argument(
        "--monitor-port",
        type=port_number,
        default=DEFAULT_MONITOR_PORT,
        help=f"port of the cloud's bandwidth service (default: {DEFAULT_MONITOR_PORT})",
    )
    parser.add_argument("--duplex", action="store_true", help="measure both ways (default: the uplink)")
    parser.add_argument("--compare-iperf3", action="store_true", help="measure by iperf3, too (default: off)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    with service(args.ip, args.monitor_port) as (host, port):
        link = measure_link(host, port, duplex=args.duplex)
    print(f"bandwidth monitor works: {line_of(link)}")
    if args.compare_iperf3:
        iperf3_bytes_per_s = iperf3_rate_bytes_per_s(args.ip)
        difference = link.rate_bytes_per_s / iperf3_bytes_per_s - 1
        print(f"iperf3: uplink {format_rate(iperf3_bytes_per_s)}; the monitor differs by {100 * difference:+.1f} %")
    return 0


@contextlib.contextmanager
def service(host: str | None, port: int) -> Iterator[tuple[str, int]]:
    """Yield the address of a bandwidth service: the one asked for, else one of our own."""
    if host:
        yield host, port
        return
    with ServiceProcess(["-m", "neurosurgeon.net.monitor_server", "--monitor-port", "0"]) as server:
        yield DEFAULT_IP, server.ports[0]


def iperf3_rate_bytes_per_s(host: str | None) -> float:
    """Return the rate that iperf3 sees to ``host``; None: through loopback, to a server of our own.

    Raises: UsageError: iperf3 is not installed. NetworkError: it failed.
    """
    port = IPERF3_PORT if host else ephemeral_port(DEFAULT_IP)
    with contextlib.ExitStack() as stack:
        if not host:
            server = stack.enter_context(_iperf3("-s", "-1", "-p", str(port), "--forceflush"))
            assert server.stdout is not None  # noqa: S101  # a pipe, as asked for
            stack.callback(server.kill)
            while "listening" not in (line := server.stdout.readline()):
                if not line:
                    raise NetworkError("iperf3 did not start to listen")
        client = stack.enter_context(_iperf3("-c", host or DEFAULT_IP, "-p", str(port), "-t", str(IPERF3_S), "-J"))
        output, _ = client.communicate(timeout=IPERF3_TIMEOUT_S)
    try:
        document: dict[str, Any] = json.loads(output)
        return bits_per_s_to_bytes_per_s(float(document["end"]["sum_received"]["bits_per_second"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise NetworkError(f"iperf3 failed: {output.strip()[-200:] or 'no output'}") from exc


def _iperf3(*arguments: str) -> subprocess.Popen[str]:
    try:
        command = ["iperf3", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # as its user asked
    except FileNotFoundError as exc:
        raise UsageError("iperf3 is not installed: apt install iperf3, or leave out --compare-iperf3") from exc


if __name__ == "__main__":
    sys.exit(main())
