"""The edge: measure the link, choose the partition point, run one task with the cloud, and show its output.

python edge_api.py -i 127.0.0.1 -p 9999 -d cpu -t vgg_net
python edge_api.py --local-cloud -t mobile_net --input docs/photo.jpg --verify
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from neurosurgeon.cli.parser import (
    DEFAULT_IP,
    access_of_edge,
    add_device,
    add_edge,
    add_labels,
    add_model,
    add_strategy,
    address_parser,
    non_negative_int,
    positive_int,
)
from neurosurgeon.cli.process import ServiceProcess, run_main
from neurosurgeon.cli.relay import add_shaping, shaped
from neurosurgeon.edge.inputs import drawn_inputs, inputs_of
from neurosurgeon.edge.labels import labels_of
from neurosurgeon.edge.run import CloudAddress, LinkChoice, run_one_task
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.engine.base import WeightsSource, find_engine
from neurosurgeon.graph.cut import check_point
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights import check_pretrained
from neurosurgeon.models.weights_sources import fitted_name
from neurosurgeon.net.monitor_client import RECENT_S
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.reports.text import EdgeReport, print_json
from neurosurgeon.utils.errors import UsageError, VerificationError, WeightsError
from neurosurgeon.utils.units import mb_to_bytes

if TYPE_CHECKING:
    from neurosurgeon.engine.base import Engine
    from neurosurgeon.graph.spec import Array


def main(argv: Sequence[str] | None = None, prog: str = "edge_api.py") -> int:
    """Run this command; return its exit code."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser)
    add_model(parser, "run")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="image, array (.npy; .npz for several inputs, by name) or sound (.wav) (default: the example of the model "
        "file, or a fixed image of noise)",
    )
    parser.add_argument(
        "--input-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="draw the inputs from this range in place of the fixed image of noise",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint or safetensors (default: weights of a fixed seed)"
    )
    parser.add_switch("--pretrained", "use torchvision's pretrained weights")
    add_labels(parser)
    parser.add_argument("--point", type=non_negative_int, help="force this partition point (default: the best one)")
    add_edge(parser)
    parser.add_argument(
        "--measure",
        choices=("always", "auto"),
        default="always",
        help="when to measure the link. always: for each task; auto: only if no estimate of the last "
        f"{RECENT_S:g} s is kept and the rate can change the plan (default: always)",
    )
    add_shaping(parser)
    add_strategy(parser)
    parser.add_switch("--local-cloud", "start a cloud on this machine for this task, and stop it afterwards")
    meaning = "inferences; with more than 1, a cold one runs before them, and median and spread are shown"
    parser.add_number("--repeat", type=positive_int, default=1, meaning=meaning)
    parser.add_switch("--verify", "also run the unsplit network here, and show the largest difference")
    parser.add_switch("--json", "print one JSON object on stdout, and all lines on stderr")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    show = EdgeReport(sys.stderr if args.json else sys.stdout)
    catalogue = Catalogue(args.model_file)
    args.type = model_of(args, catalogue)
    check_given(args, catalogue)
    open_engine = cache(partial(find_engine(), catalogue, args.device))
    arrays = given_inputs(args, open_engine)
    access = access_of_edge(args)
    choice = LinkChoice(args.bandwidth, args.rtt, args.measure == "always")
    with (
        cloud_of(args) as (host, port, monitor_port),
        shaped(host, (port, monitor_port), args.shape, args.trace) as network,
    ):
        network.begin()
        cloud = CloudAddress(
            network.host,
            port,
            monitor_port,
            dataclasses.replace(access, cloud_name=host),
            is_temporary=args.local_cloud,
            is_relayed=bool(args.shape or args.trace),
        )
        outcome = run_one_task(task_of(args, arrays), open_engine, cloud, choice, show)
    document = outcome.to_dict() if args.json else {}
    if args.deadline_ms:
        best_ms, measured_ms = outcome.plan.best.stages.total_ms, outcome.measured.total_ms
        show.deadline(args.deadline_ms, best_ms, measured_ms)
        document |= {
            "deadline_ms": args.deadline_ms,
            "deadline_in_reach": best_ms <= args.deadline_ms,
            "deadline_met": measured_ms <= args.deadline_ms,
        }
    if args.json:
        print_json(document)
    if outcome.verdict and not outcome.verdict.is_equal:
        share = outcome.verdict.relative
        raise VerificationError(
            f"the output differs from that of the user's module by {share:.2g} of its largest value"
        )
    return 0


def given_inputs(args: argparse.Namespace, open_engine: Callable[[], Engine]) -> tuple[Array, ...] | None:
    """Return the inputs of the command line; None without any: the network's example. Raises: InputError."""
    if args.input:
        return inputs_of(open_engine(), args.type).read(args.input)
    return drawn_inputs(open_engine().graph(args.type).inputs, *args.input_range) if args.input_range else None


def check_given(args: argparse.Namespace, catalogue: Catalogue) -> None:
    """Check the values of the flags before any connection is opened.

    Raises: UsageError.
    """
    if args.pretrained and not args.weights:
        check_pretrained(args.type)
    if args.device == "cuda":
        from neurosurgeon.engine.torch_engine import check_device

        check_device(args.device)
    if args.local_cloud and args.tls_ca:
        raise UsageError("--local-cloud starts a cloud on this machine, without TLS: leave --tls-ca out")
    if args.point is not None:
        name = args.type
        layers = ZOO[name].layers if name in ZOO else len(find_engine()(catalogue).graph(name).layers)
        check_point(name, args.point, layers)


def model_of(args: argparse.Namespace, catalogue: Catalogue) -> str:
    """Return the canonical name of the model, with the number of classes of its weights file.

    Raises: UsageError: there is no such model, or the file does not fit it.
    """
    name = catalogue.choose(args.type, args.input_size, args.classes)
    if not args.weights:
        return name
    fitting = fitted_name(catalogue, name, args.weights)
    if args.classes and fitting != name:
        raise WeightsError(f"{args.weights} fits {fitting}, not {args.classes} classes: leave out --classes")
    return fitting


def task_of(args: argparse.Namespace, arrays: tuple[Array, ...] | None) -> TaskSettings:
    """Return the task of the command line. ``arrays``: its inputs; None: the network's example."""
    return TaskSettings(
        model=args.type,
        weights=WeightsSource(args.weights, args.pretrained),
        device=args.device,
        threads=args.threads,
        labels=labels_of(args.labels),
        arrays=arrays,
        point=args.point,
        predictor=args.predictor,
        learns=not args.no_correction,
        edge_config=args.edge_config,
        cloud_config=args.cloud_config,
        repeat=args.repeat,
        verify=args.verify,
        on_cloud_loss=OnCloudLoss(args.on_cloud_loss),
        strategy=Strategy(args.strategy),
        max_edge_bytes=mb_to_bytes(args.max_edge_memory) if args.max_edge_memory else math.inf,
    )


@contextlib.contextmanager
def cloud_of(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield host, port and bandwidth port of the cloud. With --local-cloud it is a child that ends with the block."""
    if not args.local_cloud:
        yield args.ip, args.port, args.monitor_port
        return
    command = ["-m", "neurosurgeon", "cloud", "-p", "0", "--monitor-port", "0"]
    if args.weights:
        command += ["--weights", f"{args.type}={args.weights.resolve()}"]
    if args.pretrained:
        command += ["--pretrained"]
    if args.key_file:
        command += ["--key-file", str(args.key_file.absolute())]
    for file in args.model_file:
        command += ["--model-file", str(file.resolve())]
    with ServiceProcess(command, services=2) as cloud:
        yield DEFAULT_IP, cloud.ports[0], cloud.ports[1]
