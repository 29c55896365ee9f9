"""Flags of the scripts: what several of them share, and the types of their values."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from neurosurgeon import __version__
from neurosurgeon.net.access import Access
from neurosurgeon.net.keys import find_key
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.logs import LEVELS
from neurosurgeon.utils.machine import forget_speeds

DEFAULT_IP, DEFAULT_PORT, DEFAULT_MONITOR_PORT = "127.0.0.1", 9999, 9922


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message} (--help shows all flags)\n")


def base_parser(prog: str, description: str | None) -> Parser:
    """Return a parser with what every command has."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs (default: off)")
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="what is logged; debug: every task, too (default: info)"
    )
    parser.add_argument("--log-json", action="store_true", help="log JSON, one object a line (default: text)")
    return parser


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version."""
    parser.add_argument("--version", action="version", version=f"neurosurgeon {__version__}")


def address_parser(prog: str, description: str | None, *, port: bool = True, monitor_port: bool = False) -> Parser:
    """Return a parser with the address of a service, as clients and servers share it."""
    parser = base_parser(prog, description)
    parser.add_argument("-i", "--ip", default=DEFAULT_IP, help=f"address of the cloud (default: {DEFAULT_IP})")
    if port:
        parser.add_argument(
            "-p", "--port", type=port_number, default=DEFAULT_PORT, help=f"port of the cloud (default: {DEFAULT_PORT})"
        )
    if monitor_port:
        parser.add_argument(
            "--monitor-port",
            type=port_number,
            default=DEFAULT_MONITOR_PORT,
            help=f"port of the bandwidth service (default: {DEFAULT_MONITOR_PORT})",
        )
    _add_access(parser)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Add what both sides prove to each other before they speak; the same flags on either side."""
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret that both sides hold and prove to each other (default: $NEUROSURGEON_KEY, else none)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="this side's certificate, PEM (default: none)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM (default: none)")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="CA that must have signed the other side's certificate, PEM; turns TLS on for an edge (default: none)",
    )


def add_insecure(parser: argparse.ArgumentParser) -> None:
    """Add --insecure, for services."""
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="serve whoever reaches an address that is not loopback, without key or TLS (default: off)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add -d and --threads."""
    parser.add_argument(
        "-d", "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)"
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        help="CPU threads to compute with (default: as many as this side's predictors were measured with)",
    )


def add_model(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add -t, --model-file and --input-size, for `Catalogue.choose`."""
    parser.add_argument(
        "-t",
        "--type",
        required=True,
        metavar="MODEL",
        help=f"model to {purpose}: alex_net, vgg_net, le_net, mobile_net, any classification network of torchvision by "
        "its own name, or FILE:FUNCTION of a --model-file",
    )
    add_model_files(parser)
    parser.add_argument(
        "--input-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the square image that the network takes (default: the one it was trained for, mostly 224)",
    )


def add_model_files(parser: argparse.ArgumentParser) -> None:
    """Add --model-file."""
    parser.add_argument(
        "--model-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="Python file with functions that return modules, known as FILE:FUNCTION; it is run; may be repeated "
        "(default: none)",
    )


def add_predictor_choice(
    parser: argparse.ArgumentParser, *choices: str, sides: Sequence[str] = ("edge", "cloud")
) -> None:
    """Add the flags that say where latencies come from; the first choice is the default."""
    parser.add_argument(
        "--predictor", choices=choices, default=choices[0], help=f"where latencies come from (default: {choices[0]})"
    )
    for side in sides:
        parser.add_argument(
            f"--{side}-config",
            type=Path,
            metavar="PATH",
            help=f"the {side}'s fitted parameters (a file) or data sets (a directory), used as they are "
            "(default: predictor/, scaled to the speed of this machine)",
        )
    parser.add_argument(
        "--remeasure-machine",
        action="store_true",
        help="measure the speed of this machine again (default: a measurement is kept for a week)",
    )


def forget_if_asked(args: argparse.Namespace) -> None:
    """Have the speed of this machine measured again, where --remeasure-machine asks for it."""
    if args.remeasure_machine:
        forget_speeds()


def add_link(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stand in for a measurement of the link."""
    parser.add_argument("--bandwidth", type=positive_float, help="uplink rate, MB/s (default: measured)")
    parser.add_argument("--rtt", type=non_negative_float, help="round-trip time, ms (default: measured)")


def add_deadline(parser: argparse.ArgumentParser) -> None:
    """Add --deadline-ms."""
    parser.add_argument(
        "--deadline-ms",
        type=positive_float,
        help="time that a task may take; where no cut makes it, the fastest runs, and the task says so (default: none)",
    )


def add_no_correction(parser: argparse.ArgumentParser) -> None:
    """Add --no-correction."""
    parser.add_argument(
        "--no-correction",
        action="store_true",
        help="predict without what earlier inferences have taught, and learn nothing (default: off)",
    )


def add_on_cloud_loss(parser: argparse.ArgumentParser) -> None:
    """Add --on-cloud-loss."""
    parser.add_argument(
        "--on-cloud-loss",
        choices=("local", "retry", "fail"),
        default="local",
        help="when the cloud is lost with a task: compute it here, send it again when the cloud is back within 30 s, "
        "or fail (default: local)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add where the weights of several models come from."""
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="weights of a model: checkpoint or safetensors; may be repeated (default: fixed-seed weights)",
    )
    parser.add_argument("--pretrained", action="store_true", help="use torchvision's pretrained weights (default: off)")


def add_objective(parser: argparse.ArgumentParser) -> None:
    """Add --objective."""
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        default="latency",
        help="smallest latency of one task, or most tasks at once: the cut with the shortest bottleneck stage "
        "(default: latency)",
    )


def add_strategy(parser: argparse.ArgumentParser) -> None:
    """Add --strategy and --max-edge-memory."""
    parser.add_argument(
        "--strategy",
        choices=("dads", "neurosurgeon", "chain-of-blocks", "edge-only", "cloud-only"),
        default="dads",
        help="where to cut: anywhere (dads), behind any layer in their order (neurosurgeon), where a single tensor "
        "crosses (chain-of-blocks), or nowhere; of a chain, the first three find the same (default: dads)",
    )
    parser.add_argument(
        "--max-edge-memory",
        type=positive_float,
        metavar="MB",
        help="leave out cuts whose edge half needs more: its parameters, and the tensors alive at once (default: none)",
    )


def checked(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """Return an argparse type that refuses with ``what`` when ``convert`` fails."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from exc

    return parse


def _in_range(number: float, low: float, high: float) -> float:
    if not low <= number <= high:  # false for NaN, too
        raise ValueError
    return number


worker_count = checked(lambda text: int(_in_range(int(text), 1, 64)), "a number of workers (1 to 64)")


port_number = checked(lambda text: int(_in_range(int(text), 0, 65535)), "a port (0 to 65535)")


positive_int = checked(lambda text: int(_in_range(int(text), 1, 2**31)), "a whole number of at least 1")


non_negative_int = checked(lambda text: int(_in_range(int(text), 0, 2**31)), "a whole number of at least 0")


positive_float = checked(lambda text: _in_range(float(text), 1e-9, 1e9), "a number above 0")


non_negative_float = checked(lambda text: _in_range(float(text), 0.0, 1e9), "a number of at least 0")


def typed(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that shows the one line of our own error."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return parse


def access_of_cloud(args: Namespace) -> Access:
    """Return what a service's command line asks for.

    Raises: UsageError: a file cannot be read or does not fit, or a flag is missing.
    """
    tls = None
    if bool(args.tls_cert) != bool(args.tls_key) or (args.tls_ca and not args.tls_cert):
        raise UsageError("TLS needs both --tls-cert and --tls-key (--tls-ca asks edges for certificates, too)")
    if args.tls_cert:
        from neurosurgeon.net.tls import cloud_tls

        tls = cloud_tls(args.tls_cert, args.tls_key, args.tls_ca)
    return Access(find_key(args.key_file), tls, args.insecure)


def access_of_edge(args: Namespace) -> Access:
    """Return what an edge's command line asks for.

    Raises: UsageError: a file cannot be read or does not fit, or a flag is missing.
    """
    tls = None
    if bool(args.tls_cert) != bool(args.tls_key) or (args.tls_cert and not args.tls_ca):
        raise UsageError("TLS needs --tls-ca, the CA of the cloud's certificate; --tls-cert and --tls-key go together")
    if args.tls_ca:
        from neurosurgeon.net.tls import edge_tls

        tls = edge_tls(args.tls_ca, args.tls_cert, args.tls_key)
    return Access(find_key(args.key_file), tls)
