"""The bandwidth monitor: its service, one measurement of the link, and a test of both.

python -m net.monitor_server -i 127.0.0.1 --monitor-port 9922
python -m net.monitor_client -i 127.0.0.1 --monitor-port 9922 [--duplex] [--json]
python -m net.monitor_test [--duplex] [--compare-iperf3]

The test starts a service and measures loopback. With --compare-iperf3 it also measures the same link by iperf3
(https://iperf.fr) for two seconds, if that is installed. With -i both measure the link to another machine, on which a
cloud and ``iperf3 -s`` run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from neurosurgeon.cli.parser import (
    DEFAULT_IP,
    access_of_cloud,
    access_of_edge,
    add_monitor_port,
    add_service,
    address_parser,
    base_parser,
)
from neurosurgeon.cli.process import ServiceProcess, end_with_parent, listening_line, run_main, stop_event
from neurosurgeon.net.limits import ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.monitor_client import measure_link
from neurosurgeon.net.monitor_server import MAX_CONNECTIONS, MonitorServer
from neurosurgeon.net.net_utils import format_address, format_rate
from neurosurgeon.net.sockets import free_port, listen, stop_accepting
from neurosurgeon.utils.errors import NetworkError, UsageError
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import bits_per_s_to_bytes_per_s, bytes_per_s_to_mb_per_s

log = logging.getLogger(__name__)

IPERF3_S, IPERF3_TIMEOUT_S, IPERF3_PORT = 2, 30.0, 5201


def server(argv: Sequence[str] | None = None, prog: str = "monitor_server.py") -> int:
    """Serve bandwidth measurements until a signal; return the exit code."""
    parser = address_parser(prog, __doc__, port=False, monitor_port=True)
    add_service(parser)
    return run_main(parser, argv, _serve)


def _serve(args: argparse.Namespace) -> int:
    access = access_of_cloud(args)
    listener = listen(args.ip, args.monitor_port, access)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    server = MonitorServer(listener, ConnectionLimiter(access, ConnectionLimits(MAX_CONNECTIONS)))
    if args.until_stdin_closes:
        end_with_parent(stop, server.record_load)
    threading.Thread(target=server.serve, daemon=True).start()
    log.info(listening_line("bandwidth service", format_address(listener.getsockname())))
    stop.wait()
    stop_accepting(listener)
    return 0


def client(argv: Sequence[str] | None = None, prog: str = "monitor_client.py") -> int:
    """Measure the link once and print it; return the exit code."""
    parser = address_parser(prog, __doc__, port=False, monitor_port=True)
    parser.add_switch("--duplex", "measure the downlink, too")
    parser.add_switch("--no-udp", "measure by TCP only, rather than by UDP if the network passes it")
    parser.add_switch("--json", "print one JSON object, rather than a line")
    return run_main(parser, argv, _measure)


def _measure(args: argparse.Namespace) -> int:
    start_ms = now_ms()
    estimate = measure_link(
        args.ip, args.monitor_port, access_of_edge(args), use_udp=not args.no_udp, duplex=args.duplex
    )
    print(json.dumps(document_of(estimate, now_ms() - start_ms)) if args.json else line_of(estimate))
    return 0


def document_of(estimate: LinkEstimate, took_ms: float) -> dict[str, Any]:
    """Return a measurement as a JSON object."""
    down = estimate.down_bytes_per_s
    return {
        "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(estimate.rate_bytes_per_s),
        "downlink_mb_per_s": bytes_per_s_to_mb_per_s(down) if down else None,
        "rtt_ms": estimate.rtt_ms,
        "host_ms": estimate.host_ms,
        "relative_error": estimate.error,
        "method": estimate.method,
        "age_s": estimate.age_s,
        "probe_bytes": estimate.probe_bytes,
        "probe_ms": took_ms,
    }


def line_of(estimate: LinkEstimate) -> str:
    """Return a measurement as a line of text."""
    line = f"uplink {format_rate(estimate.rate_bytes_per_s)} +-{100 * estimate.error:.0f} % by {estimate.method}"
    if estimate.down_bytes_per_s:
        line += f", downlink {format_rate(estimate.down_bytes_per_s)}"
    return f"{line}, RTT {estimate.rtt_ms:.3f} ms"


def test(argv: Sequence[str] | None = None, prog: str = "monitor_test.py") -> int:
    """Measure the link to a service and print it; return the exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument(
        "-i", "--ip", help="measure the link to the cloud at this address (default: to a service on loopback)"
    )
    add_monitor_port(parser)
    parser.add_switch("--duplex", "measure the downlink, too")
    parser.add_switch("--compare-iperf3", "measure by iperf3, too")
    return run_main(parser, argv, _test)


def _test(args: argparse.Namespace) -> int:
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
    """Yield the address of a bandwidth service: of the given host, else of a child process on loopback."""
    if host:
        yield host, port
        return
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as server:
        yield DEFAULT_IP, server.ports[0]


def iperf3_rate_bytes_per_s(host: str | None) -> float:
    """Return the rate to ``host`` by iperf3, bytes/s. May block for seconds. None: over loopback, to a child process.

    Raises: UsageError: iperf3 is not installed. NetworkError: it failed.
    """
    port = IPERF3_PORT if host else free_port(DEFAULT_IP)
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
