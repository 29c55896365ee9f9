"""Flags of the scripts: those that several scripts share, and the types of their values."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from neurosurgeon.net.access import Access
from neurosurgeon.net.keys import find_key
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.logs import LEVELS
from neurosurgeon.utils.machine import SPARE_CORE, free_cores
from neurosurgeon.utils.version import __version__

DEFAULT_IP, DEFAULT_PORT, DEFAULT_MONITOR_PORT = "127.0.0.1", 9999, 9922
PREDICTORS = {
    "forest": "boosted trees over linear models",
    "linear": "linear models",
    "measured": "each layer of this model, timed once",
}
SCALED_DATA = "the data in predictor/, scaled to the speed of this machine"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with shorthands for the two most frequent kinds of flag."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message} (--help shows all flags)\n")

    def add_switch(self, flag: str, meaning: str) -> None:
        """Add a flag without a value, which is off by default."""
        self.add_argument(flag, action="store_true", help=f"{meaning} (default: off)")

    def add_number(self, *flags: str, type: Callable[[str], Any], default: float, meaning: str) -> None:
        """Add a flag whose value is a number. Its help ends with the default."""
        self.add_argument(*flags, type=type, default=default, help=f"{meaning} (default: {default:g})")


def base_parser(prog: str, description: str | None) -> Parser:
    """Return a parser with the flags that every command has."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_version(parser)
    parser.add_switch("--debug", "show tracebacks and debug logs")
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        help="lowest level that is logged; debug logs every task (default: info)",
    )
    parser.add_switch("--log-json", "write each log line as a JSON object, rather than as text")
    return parser


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version."""
    parser.add_argument("--version", action="version", version=f"neurosurgeon {__version__}")


def address_parser(prog: str, description: str | None, *, port: bool = True, monitor_port: bool = False) -> Parser:
    """Return a parser with the address of a service and the flags of authentication, for clients and servers alike."""
    parser = base_parser(prog, description)
    parser.add_argument("-i", "--ip", default=DEFAULT_IP, help=f"address of the cloud (default: {DEFAULT_IP})")
    if port:
        parser.add_number("-p", "--port", type=port_number, default=DEFAULT_PORT, meaning="port of the cloud")
    if monitor_port:
        add_monitor_port(parser)
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret key of both sides; each side proves that it holds the key (default: $NEUROSURGEON_KEY, else none)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate of this side, PEM (default: none)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key of --tls-cert, PEM (default: none)")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="CA that signed the other side's certificate, PEM: an edge uses TLS, and a cloud requires a certificate "
        "of each edge (default: none)",
    )
    return parser


def add_monitor_port(parser: Parser) -> None:
    """Add --monitor-port."""
    meaning = "port of the bandwidth service"
    parser.add_number("--monitor-port", type=port_number, default=DEFAULT_MONITOR_PORT, meaning=meaning)


def add_service(parser: Parser) -> None:
    """Add the flags of a service: --insecure, and the hidden --until-stdin-closes of `process.ServiceProcess`."""
    parser.add_switch("--insecure", "serve any peer on an address that is not loopback, without key or TLS")
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)


def add_device(parser: Parser, *, default_threads: str = "those that the data of this side was measured with") -> None:
    """Add -d and --threads. ``default_threads``: the number of threads without that flag, for the help."""
    parser.add_argument(
        "-d", "--device", choices=("cpu", "cuda"), default="cpu", help="device that computes (default: cpu)"
    )
    parser.add_argument(
        "--threads", type=positive_int, help=f"CPU threads to compute with (default: {default_threads})"
    )


def add_model(parser: Parser, purpose: str) -> None:
    """Add -t, --model-file, --input-size and --classes, for `Catalogue.choose`."""
    parser.add_argument(
        "-t",
        "--type",
        required=True,
        metavar="MODEL",
        help=f"model to {purpose}: alex_net, vgg_net, le_net, mobile_net, the name of a classification network of "
        "torchvision, or FILE:FUNCTION of a --model-file",
    )
    add_model_files(parser)
    parser.add_argument(
        "--input-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the square input image, pixels (default: that of the network's training, mostly 224)",
    )
    parser.add_argument(
        "--classes",
        type=positive_int,
        metavar="N",
        help="classes of a network that is known by name (default: those of --weights, else mostly 1000)",
    )


def add_model_files(parser: Parser) -> None:
    """Add --model-file."""
    parser.add_argument(
        "--model-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="Python file with functions that return modules, named FILE:FUNCTION; the file is executed; may be "
        "repeated (default: none)",
    )


def add_predictor_choice(parser: Parser, *choices: str, sides: Mapping[str, str]) -> None:
    """Add the flags that choose the source of predicted latencies.

    Args: choices: of `PREDICTORS`; the first is the default. sides: each with the default of its data, for the help.
    """
    meaning = "; ".join(f"{name}: {PREDICTORS[name]}" for name in choices)
    parser.add_argument(
        "--predictor",
        choices=choices,
        default=choices[0],
        help=f"source of the predicted latencies. {meaning} (default: {choices[0]})",
    )
    for side, default in sides.items():
        parser.add_argument(
            f"--{side}-config",
            type=Path,
            metavar="PATH",
            help=f"parameters (a file) or data sets (a directory) of the {side}, used unscaled (default: {default})",
        )
    parser.add_argument(
        "--remeasure-machine",
        action="store_true",
        help="measure the speed of this machine again (default: use a measurement for a week)",
    )


def add_edge(parser: Parser) -> None:
    """Add the flags that an edge has for one task and for a queue of tasks."""
    parser.add_argument("--bandwidth", type=positive_float, help="uplink rate, MB/s (default: measured)")
    parser.add_argument("--rtt", type=non_negative_float, help="round-trip time, ms (default: measured)")
    parser.add_argument(
        "--deadline-ms",
        type=positive_float,
        help="time limit of a task, ms; if no cut meets it, the fastest runs and the task is flagged (default: none)",
    )
    sides = {"edge": SCALED_DATA, "cloud": "the latencies that the cloud reports"}
    add_predictor_choice(parser, "forest", "linear", "measured", sides=sides)
    parser.add_switch("--no-correction", "predict without the corrections of earlier inferences, and record none")
    parser.add_argument(
        "--on-cloud-loss",
        choices=("local", "retry", "fail"),
        default="local",
        help="if the cloud is disconnected during a task: compute the task here (local), send it again if the cloud is "
        "reconnected within 30 s (retry), or fail (default: local)",
    )


def add_weights(parser: Parser) -> None:
    """Add --weights, of several models, and --pretrained."""
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="weights of a model: checkpoint or safetensors; may be repeated (default: weights of a fixed seed)",
    )
    parser.add_switch("--pretrained", "use torchvision's pretrained weights")


def add_labels(parser: Parser) -> None:
    """Add --labels."""
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: one a line, or JSON, a list or names by index (default: those of ImageNet for "
        "torchvision's weights, else none)",
    )


def add_objective(parser: Parser) -> None:
    """Add --objective."""
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        default="latency",
        help="latency: shortest time of each task; throughput: most tasks per second, by the shortest bottleneck "
        "stage "
        "(default: latency)",
    )


def add_strategy(parser: Parser) -> None:
    """Add --strategy and --max-edge-memory."""
    parser.add_argument(
        "--strategy",
        choices=("dads", "neurosurgeon", "chain-of-blocks", "edge-only", "cloud-only"),
        default="dads",
        help="allowed cuts: any (dads), after a layer in execution order (neurosurgeon), after a layer if a single "
        "tensor is transferred (chain-of-blocks), or none; for a chain the first three choose the same (default: dads)",
    )
    parser.add_argument(
        "--max-edge-memory",
        type=positive_float,
        metavar="MB",
        help="memory of the edge partition, MB at most: its parameters and the tensors alive at once (default: none)",
    )


# ---------------------------------------------------------------- types of values


def checked(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """Return an argparse type that reports the ``expected`` value if ``convert`` raises ValueError."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from exc

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


# ---------------------------------------------------------------- values that follow from several flags


def access_of_cloud(args: Namespace) -> Access:
    """Return the authentication of a service's command line.

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
    """Return the authentication of an edge's command line.

    Raises: UsageError: a file cannot be read or does not fit, or a flag is missing.
    """
    tls = None
    if bool(args.tls_cert) != bool(args.tls_key) or (args.tls_cert and not args.tls_ca):
        raise UsageError("TLS needs --tls-ca, the CA of the cloud's certificate; --tls-cert and --tls-key go together")
    if args.tls_ca:
        from neurosurgeon.net.tls import edge_tls

        tls = edge_tls(args.tls_ca, args.tls_cert, args.tls_key)
    return Access(find_key(args.key_file), tls)


def free_threads(threads: int) -> int:
    """Return this number of CPU threads for a cloud, or 1 if other programs leave fewer cores.

    Threads that wait for each other take longer than a single one: MobileNetV2 beside two busy loops on two cores took
    36 ms with two threads and 12 ms with one (`tests.benchmark.busy`).
    """
    return threads if threads == 1 or free_cores() > threads - SPARE_CORE else 1
