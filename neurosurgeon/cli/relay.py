"""An emulated network between edge and cloud: the relay of --shape and --trace, and the synthetic traces.

python -m neurosurgeon relay -i 192.0.2.7 -p 9999 --shape 20,10
python edge_api.py -i 127.0.0.2 -p 9999 ...
python -m neurosurgeon traces traces        writes the synthetic traces again
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neurosurgeon.cli.parser import Parser, address_parser, base_parser
from neurosurgeon.cli.process import ServiceProcess, end_with_parent, listening_line, run_main, stop_event
from neurosurgeon.net.access import Access
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.shaper import BEGIN, RELAY_IP, EmulatedLink, Relay, TraceClock
from neurosurgeon.net.sockets import listen, stop_accepting
from neurosurgeon.net.traces import MAX_RTT_MS, SHAPES, Condition, Trace, made_up, read_trace, write_trace
from neurosurgeon.utils.errors import writing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShapedCloud:
    """The address of a cloud, or of the relay to it."""

    host: str
    begin: Callable[[], None]  # starts the time of the trace


@contextlib.contextmanager
def shaped(host: str, ports: Sequence[int], shape: str | None, trace: Path | None) -> Iterator[ShapedCloud]:
    """Yield the address of the cloud at ``host``: that one, or one of a relay that ends with the block.

    Raises: UsageError: the trace makes no sense. NetworkError: the relay did not start.
    """
    if not (shape or trace):
        yield ShapedCloud(host, lambda: None)
        return
    if trace:
        read_trace(trace)  # an error in the trace is raised in this process
    own_ip = f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}.2"  # each process has an address of its own
    network = ["--trace", str(trace.absolute())] if trace else ["--shape", str(shape)]
    addresses = ["-i", host, "-p", str(ports[0]), "--monitor-port", str(ports[1]), "--listen-ip", own_ip]
    with ServiceProcess(["-m", "neurosurgeon", "relay", *addresses, *network], services=len(ports)) as relay:
        yield ShapedCloud(own_ip, partial(relay.send_line, BEGIN))


def add_shaping(parser: Parser, *, required: bool = False) -> None:
    """Add --shape and --trace."""
    network = parser.add_mutually_exclusive_group(required=required)
    network.add_argument(
        "--shape",
        type=shape_text,
        metavar="MBIT[,RTT_MS]",
        help="emulate a slow network: limit the rate to MBIT, Mbit/s, in each direction, and delay both so that the "
        "round trip takes RTT_MS, ms (default: off)",
    )
    network.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.csv",
        help="emulate a network that changes: each line has a time, s, and from then on the rate, Mbit/s, and the "
        "round-trip time, ms (default: off)",
    )


def shape_text(text: str) -> str:
    """Return the value of --shape as it is, if it is valid (an argparse type)."""
    shape_of(text)
    return text


def relay(argv: Sequence[str] | None = None, prog: str = "shaper.py") -> int:
    """Emulate a network until a signal; return the exit code."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    parser.add_argument("--listen-ip", default=RELAY_IP, help=f"own address of the relay (default: {RELAY_IP})")
    add_shaping(parser, required=True)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return run_main(parser, argv, _relay)


def _relay(args: argparse.Namespace) -> int:
    clock = TraceClock(read_trace(args.trace) if args.trace else Trace([shape_of(args.shape)]))
    up, down = EmulatedLink(clock), EmulatedLink(clock)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    if args.until_stdin_closes:
        end_with_parent(stop, lambda line: clock.begin() if line.strip() == BEGIN else None)
    else:
        clock.begin()
    listeners = [listen(args.listen_ip, port, Access()) for port in (args.port, args.monitor_port)]
    for listener, port in zip(listeners, (args.port, args.monitor_port), strict=True):
        relay = Relay((args.ip, port), up, down)
        threading.Thread(target=relay.serve_tcp, args=(listener,), daemon=True).start()
    near = socket.socket(listeners[1].family, socket.SOCK_DGRAM)
    near.bind(listeners[1].getsockname())
    threading.Thread(target=relay.serve_udp, args=(near,), daemon=True).start()
    for listener in listeners:
        log.info(listening_line("relay", format_address(listener.getsockname())))
    stop.wait()
    near.close()
    for listener in listeners:
        stop_accepting(listener)
    return 0


def traces(argv: Sequence[str] | None = None, prog: str = "traces.py") -> int:
    """Write the synthetic traces; return the exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument("directory", type=Path, help="directory of the files, which is made if it is missing")
    return run_main(parser, argv, _traces)


def _traces(args: argparse.Namespace) -> int:
    with writing(args.directory):
        args.directory.mkdir(parents=True, exist_ok=True)
    for name, shape in SHAPES.items():
        comment = f"made up by python -m neurosurgeon traces, not recorded. {str(shape.__doc__).splitlines()[0]}"
        write_trace(args.directory / f"{name}.csv", made_up(name), comment)
    return 0


def shape_of(text: str) -> Condition:
    """Return the network of a text such as ``20`` or ``20,10``: rate in Mbit/s, round-trip time in ms.

    Raises: argparse.ArgumentTypeError: it is neither, or a value is out of range.
    """
    rate_text, comma, rtt_text = text.partition(",")
    try:
        condition = Condition(0.0, float(rate_text), float(rtt_text) if comma else 0.0)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not MBIT or MBIT,RTT_MS, such as 20,10") from exc
    if not (0 < condition.rate_mbit <= 1e6 and 0 <= condition.rtt_ms <= MAX_RTT_MS):
        raise argparse.ArgumentTypeError(f"{text!r}: a rate above 0 Mbit/s, and 0 to {MAX_RTT_MS:g} ms, are needed")
    return condition
