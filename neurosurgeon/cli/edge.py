"""The edge: measure the link, choose the partition point, run one task with the cloud, show the answer.

python edge_api.py -i 127.0.0.1 -p 9999 -d cpu -t vgg_net
python edge_api.py --local-cloud -t mobile_net --input docs/photo.jpg --verify
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.cli.parser import (
    DEFAULT_IP,
    access_of_edge,
    add_deadline,
    add_device,
    add_link,
    add_model,
    add_no_correction,
    add_on_cloud_loss,
    add_predictor_choice,
    add_strategy,
    address_parser,
    forget_if_asked,
    non_negative_int,
    positive_int,
)
from neurosurgeon.cli.process import ServiceProcess, run_main
from neurosurgeon.cli.relay import add_shaping, shaped
from neurosurgeon.edge.inputs import read_image
from neurosurgeon.models.sources import chosen_model
from neurosurgeon.models.zoo import WeightsSource, check_point, check_pretrained, check_weights_file, input_size
from neurosurgeon.net.bandwidth import LinkEstimate, LinkSource
from neurosurgeon.net.monitor_client import (
    YOUNG_S,
    LinkMeasurement,
    estimate_link,
    given_or_measured,
    measure_link,
    young_link,
)
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, new_edge_id
from neurosurgeon.reports.text import EdgeReport, needless_link, output_document, print_json
from neurosurgeon.utils.errors import NetworkError, UsageError
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s, mb_to_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neurosurgeon.edge.task import Outcome, Task


def main(argv: Sequence[str] | None = None, prog: str = "edge_api.py") -> int:
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser)
    add_model(parser, "run")
    parser.add_argument(
        "--input", type=Path, metavar="IMAGE", help="image to classify (default: a fixed image of noise)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint or safetensors (default: fixed-seed weights)"
    )
    parser.add_argument("--pretrained", action="store_true", help="use torchvision's pretrained weights (default: off)")
    parser.add_argument("--point", type=non_negative_int, help="force this partition point (default: the best one)")
    add_on_cloud_loss(parser)
    add_link(parser)
    parser.add_argument(
        "--measure",
        choices=("always", "auto"),
        default="always",
        help="measure the link for every task, or only where that can change the plan, and no estimate of the last "
        f"{YOUNG_S:g} s is kept (default: always)",
    )
    add_shaping(parser)
    add_deadline(parser)
    add_predictor_choice(parser, "forest", "linear", "measured")
    add_strategy(parser)
    add_no_correction(parser)
    parser.add_argument(
        "--local-cloud", action="store_true", help="start a cloud on this machine for this task (default: off)"
    )
    parser.add_argument(
        "--repeat",
        type=positive_int,
        default=1,
        help="infer this often, after one cold run, and show median and spread (default: 1)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="also run the whole network here and compare (default: off)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout (default: lines)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    show = EdgeReport(sys.stderr if args.json else sys.stdout)
    args.type = chosen_model(args.type, args.model_file, args.input_size)
    pixels = read_image(args.input, input_size(args.type)) if args.input else None
    check_given(args)
    access = access_of_edge(args)
    forget_if_asked(args)
    with contextlib.ExitStack() as stack:
        host, port, monitor_port = stack.enter_context(cloud_of(args))
        network = stack.enter_context(shaped(host, (port, monitor_port), args.shape, args.trace))
        network.begin()
        access, host = dataclasses.replace(access, cloud_name=host), network.host
        kept = kept_link(args, host, monitor_port)
        measure = measure_link if args.local_cloud else estimate_link  # a local cloud's port is used once
        measurement = stack.enter_context(LinkMeasurement(partial(measure, host, monitor_port, access)))
        if args.measure == "always" and args.bandwidth is None:
            measurement.start()
        reopen = partial(EdgeSession.open, host, port, new_edge_id() if args.repeat == 1 else None, access)
        session = stack.enter_context(reopen())
        find_link = partial(link_of, args, session, kept, measurement, show)
        ideal = None if args.measure == "always" or args.bandwidth is not None or kept else ideal_link(args, session)
        from neurosurgeon.edge.task import run_task  # torch takes a second: only when the cloud has answered

        outcome = run_task(task_of(args, pixels), session, find_link, show, reopen, ideal)
    if args.deadline_ms:
        show.deadline(args.deadline_ms, outcome.plan.best.stages.total_ms, outcome.measured.total_ms)
    if args.json:
        print_json(document_of(outcome, args))
    return 0


# ---------------------------------------------------------------- before the task


def check_given(args: argparse.Namespace) -> None:
    """Check what the user gave before anybody else is bothered.

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
        check_point(args.type, args.point)
    if args.weights:
        check_weights_file(args.type, args.weights)


def weights_of(args: argparse.Namespace) -> WeightsSource:
    """Return where the model's weights come from."""
    return WeightsSource(args.weights, args.pretrained)


def task_of(args: argparse.Namespace, pixels: NDArray[np.uint8] | None) -> Task:
    """Return the task that the command line describes."""
    from neurosurgeon.edge.task import Task
    from neurosurgeon.planner.strategies import Strategy

    return Task(
        model=args.type,
        weights=weights_of(args),
        device=args.device,
        threads=args.threads,
        pixels=pixels,
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


def kept_link(args: argparse.Namespace, host: str, monitor_port: int) -> LinkEstimate | None:
    """Return the kept estimate that stands in for a measurement; None where there is none, or the flags forbid it.

    A local cloud's port is used once: what is kept of it was another cloud's.
    """
    if args.measure == "always" or args.bandwidth is not None or args.local_cloud:
        return None
    return young_link(host, monitor_port)


def ideal_link(args: argparse.Namespace, session: EdgeSession) -> LinkEstimate:
    """Return the best that the link to this cloud can be: infinitely fast, with the least round trip."""
    if args.rtt is not None:
        return LinkEstimate(math.inf, args.rtt)
    is_relayed = args.shape or args.trace  # then the kernel's round trip is that to the relay
    return LinkEstimate(math.inf, session.rtt_ms if is_relayed else session.least_rtt_ms())


def link_of(
    args: argparse.Namespace,
    session: EdgeSession,
    kept: LinkEstimate | None,
    measurement: LinkMeasurement,
    show: EdgeReport,
) -> LinkEstimate | None:
    """Return, and print, the link, given, kept or measured. May block.

    It is None where the whole cloud is gone, and the task may run here.

    Raises: NetworkError: the bandwidth service alone is away, and there is no last value.
    """
    if kept:
        print(f"link not measured : the estimate of {kept.age_s:.0f} s ago is used", file=sys.stderr)
    try:
        measure = (lambda: kept) if kept else measurement.result
        link = given_or_measured(args.bandwidth, args.rtt, session.rtt_ms, measure)
    except NetworkError:
        if args.on_cloud_loss != OnCloudLoss.LOCAL or session.is_alive():
            raise
        return None
    show.bandwidth(link)
    return link


@contextlib.contextmanager
def cloud_of(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield host, port and bandwidth port of the cloud; with --local-cloud it is a child that ends with the block."""
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


# ---------------------------------------------------------------- after it


def document_of(outcome: Outcome, args: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON interface's object."""
    half, candidate, link = outcome.half, outcome.candidate, outcome.link
    is_known = link is not None and math.isfinite(link.rate_bytes_per_s)
    document = {
        "model": half.name,
        "layers": len(half.graph.layers),
        "partition_point": candidate.point,
        "partition_layer": candidate.layer,
        **outcome.plan.cut_dict(candidate),
        "edge_parameter_bytes": outcome.half.parameter_bytes,  # those that it really has
        "device": args.device,
        "where": outcome.where,
        "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(link.rate_bytes_per_s) if link and is_known else None,
        "rtt_ms": link and link.rtt_ms,
        "predicted": candidate.stages.as_dict(),
        "interval_ms": list(outcome.plan.interval(candidate)),
        "too_close_to_call": outcome.plan.is_too_close_to_call,
        "predictor": {"edge": outcome.plan.edge.source, "cloud": outcome.plan.cloud.source},
        "predicted_from": outcome.plan.origins,
        "measured": outcome.measured.as_dict(),
        "sent_bytes": outcome.runs[-1].sent_bytes,
        "weights_digest": half.weights_digest,
        "output": output_document(outcome.runs[-1].output, outcome.guesses),
    }
    if link and not is_known:
        document["link_not_measured"] = needless_link(outcome.plan, link.rtt_ms)
    elif link and link.source is LinkSource.LAST:
        document["link_age_s"] = link.age_s
    if args.deadline_ms:
        document["deadline_ms"] = args.deadline_ms
        document["deadline_in_reach"] = outcome.plan.best.stages.total_ms <= args.deadline_ms
        document["deadline_met"] = outcome.measured.total_ms <= args.deadline_ms
    if outcome.max_abs_diff is not None:
        document["max_abs_diff"] = outcome.max_abs_diff
    if len(outcome.runs) > 1:
        document["repeat"] = {stage: dataclasses.asdict(timing) for stage, timing in outcome.timings.items()}
    return document
