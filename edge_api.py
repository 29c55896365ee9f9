"""The edge: measure the link, choose the partition point, run one task with the cloud, show the answer.

python edge_api.py -i 127.0.0.1 -p 9999 -d cpu -t vgg_net
python edge_api.py --local-cloud -t mobile_net --input photo.jpg --verify
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from models.zoo import (
    WeightsSource,
    canonical_name,
    check_point,
    check_pretrained,
    imagenet_labels,
    load_network,
    model_graph,
)
from net.bandwidth import LinkEstimate, LinkSource
from net.monitor_client import estimate_link, measure_link
from net.session import EdgeSession, stage_times
from utils.cli import (
    DEFAULT_IP,
    ServiceProcess,
    add_device,
    add_predictor_files,
    address_parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    run_main,
    typed,
)
from utils.images import read_image
from utils.report import EdgeReport, output_document, print_json, stage_timings
from utils.timing import StageTimes, Timing
from utils.units import bytes_per_s_to_mb_per_s, mb_per_s_to_bytes_per_s

if TYPE_CHECKING:  # what needs torch is imported when the cloud has answered: a missing cloud is reported at once
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deployment import Candidate
    from models.zoo import Network
    from predictor.predictor_utils import LatencyPredictor
    from utils.inference_utils import Guess

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = address_parser("edge_api.py", __doc__, monitor_port=True)
    add_device(parser)
    parser.add_argument("-t", "--type", type=typed(canonical_name), required=True, metavar="MODEL", help="model to run")
    parser.add_argument(
        "--input", type=Path, metavar="IMAGE", help="image to classify (default: a fixed random tensor)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="checkpoint or safetensors (default: fixed-seed weights)"
    )
    parser.add_argument("--pretrained", action="store_true", help="use torchvision's pretrained weights (default: off)")
    parser.add_argument("--point", type=non_negative_int, help="force this partition point (default: the best one)")
    parser.add_argument("--bandwidth", type=positive_float, help="uplink rate, MB/s (default: measured)")
    parser.add_argument("--rtt", type=non_negative_float, help="round-trip time, ms (default: measured)")
    add_predictor_files(parser)
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
    pixels = read_image(args.input) if args.input else None
    check_given(args)
    with contextlib.ExitStack() as stack:
        host, port, monitor_port = stack.enter_context(cloud_of(args))
        session = stack.enter_context(EdgeSession.open(host, port))
        link = find_link(args, session, host, monitor_port)
        show.bandwidth(link)
        outcome = run_task(args, session, link, pixels, show)
    if args.json:
        print_json(document_of(outcome, args, link))
    return 0


# ---------------------------------------------------------------- before the task


def check_given(args: argparse.Namespace) -> None:
    """Check what the user gave before anybody else is bothered.

    Raises: UsageError.
    """
    if args.pretrained and not args.weights:
        check_pretrained(args.type)
    if args.device == "cuda":
        from utils.inference_utils import check_device

        check_device(args.device)
    if args.point is not None:
        check_point(args.type, args.point)
    if args.weights:
        load_network(args.type, weights_of(args), args.device)


def weights_of(args: argparse.Namespace) -> WeightsSource:
    """Return where the model's weights come from."""
    return WeightsSource(args.weights, args.pretrained)


@contextlib.contextmanager
def cloud_of(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield host, port and bandwidth port of the cloud; with --local-cloud it is a child that ends with the block."""
    if not args.local_cloud:
        yield args.ip, args.port, args.monitor_port
        return
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0"]
    if args.weights:
        command += ["--weights", f"{args.type}={args.weights.resolve()}"]
    if args.pretrained:
        command += ["--pretrained"]
    with ServiceProcess(command, services=2) as cloud:
        yield DEFAULT_IP, cloud.ports[0], cloud.ports[1]


def find_link(args: argparse.Namespace, session: EdgeSession, host: str, monitor_port: int) -> LinkEstimate:
    """Return the link: what the user says, else what the bandwidth service measures.

    Raises: NetworkError: neither is to be had.
    """
    if args.bandwidth is None:
        measure = measure_link if args.local_cloud else estimate_link  # a local cloud's port is used once
        measured = measure(host, monitor_port)
        return measured if args.rtt is None else dataclasses.replace(measured, rtt_ms=args.rtt)
    rtt_ms = session.rtt_ms if args.rtt is None else args.rtt
    return LinkEstimate(mb_per_s_to_bytes_per_s(args.bandwidth), rtt_ms, LinkSource.GIVEN)


# ---------------------------------------------------------------- the task


@dataclass(frozen=True, slots=True)
class Run:
    """One inference: its answer, and what it took."""

    output: Tensor
    times: StageTimes
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished task: the plan, every run of it, and the answer."""

    network: Network
    candidate: Candidate
    runs: Sequence[Run]
    guesses: Sequence[Guess]
    max_abs_diff: float | None

    @property
    def measured(self) -> StageTimes:
        """The stages of the run with the median total."""
        return sorted((run.times for run in self.runs), key=lambda times: times.total_ms)[len(self.runs) // 2]

    @property
    def timings(self) -> dict[str, Timing]:
        """Median and spread of every stage."""
        return stage_timings([run.times for run in self.runs])


def run_task(
    args: argparse.Namespace,
    session: EdgeSession,
    link: LinkEstimate,
    pixels: NDArray[np.float32] | None,
    show: EdgeReport,
) -> Outcome:
    """Plan, run and report one task."""
    from deployment import load_predictors, plan_split
    from utils.inference_utils import image_input, random_input, run_whole, top_guesses, use_threads

    edge, cloud = load_predictors(args.edge_config, args.cloud_config, args.device, str(session.cloud.get("device")))
    threads = use_threads(args.threads or edge.threads)
    warn_of_other_machines(edge, {"device": args.device, "threads": threads}, "edge")
    warn_of_other_machines(cloud, session.cloud, "cloud")
    plan = plan_split(model_graph(args.type), edge, cloud, link.rate_bytes_per_s, link.rtt_ms)
    candidate = plan.best if args.point is None else plan.candidates[args.point]
    show.plan(plan.best, candidate)
    network = prepare(args, session, candidate.point, show)
    tensor = random_input() if pixels is None else image_input(pixels)
    runs = [run_once(session, network, candidate.point, tensor, show)]
    show.finished()
    if args.repeat > 1:  # the first run was cold: it is shown, and does not count
        turns = tqdm(range(args.repeat), desc="repeat", unit="run", disable=None)
        runs = [run_once(session, network, candidate.point, tensor, None) for _ in turns]
    labels = imagenet_labels() if network.knows_imagenet else None
    guesses = top_guesses(runs[-1].output, labels)
    difference = None
    if args.verify:
        difference = (runs[-1].output - run_whole(network, tensor)).abs().max().item()
    outcome = Outcome(network, candidate, runs, guesses, difference)
    show_outcome(outcome, show)
    return outcome


def warn_of_other_machines(predictor: LatencyPredictor, machine: Mapping[str, Any], side: str) -> None:
    """Say that predictions are for another device or number of threads than the one that computes."""
    measured = {"device": predictor.device, "threads": predictor.threads}
    actual = {name: machine.get(name) for name in measured}
    if actual["device"] == "cuda":
        del measured["threads"], actual["threads"]
    if measured != actual:
        log.warning(
            "the %s computes with %s, but its predictors were measured with %s: collect its own with "
            "python -m predictor.collect --side %s, and pass --%s-config",
            side,
            actual,
            measured,
            side,
            side,
        )


def prepare(args: argparse.Namespace, session: EdgeSession, point: int, show: EdgeReport) -> Network:
    """Return the network; where anything crosses, the cloud gets its half ready in the same time."""
    crosses = point < len(model_graph(args.type).layers)
    if crosses:
        session.ask_to_prepare(args.type, point)
    network = load_network(args.type, weights_of(args), args.device)
    network.cut(point)
    if crosses:
        session.wait_until_ready(network.weights_digest)
        show.prepared()
    return network


def run_once(session: EdgeSession, network: Network, point: int, tensor: Tensor, show: EdgeReport | None) -> Run:
    """Run one inference; ``show`` gets its lines as they become true."""
    from utils.inference_utils import check_crossing, run_half

    half = run_half(network.cut(point).edge, [tensor], network.device)
    if show:
        show.edge_done(network.name, half.latency_ms)
    if point == len(network.graph.layers):
        return Run(half.tensors[0], stage_times(half.latency_ms, None), 0)
    on_sent = show.sent if show else lambda: None
    remote = session.infer(network.name, point, network.weights_digest, half.tensors, on_sent)
    check_crossing([network.graph.output], remote.tensors)
    times = stage_times(half.latency_ms, remote)
    if show:
        show.cloud_done(network.name, times)
    return Run(remote.tensors[0], times, remote.sent_bytes)


def show_outcome(outcome: Outcome, show: EdgeReport) -> None:
    """Print the answer and the figures behind the contract's lines."""
    show.answer(outcome.guesses, outcome.network.source.seeded)
    show.comparison(outcome.candidate.stages, outcome.measured, len(outcome.runs))
    if len(outcome.runs) > 1:
        show.repeats(outcome.timings)
    if outcome.max_abs_diff is not None:
        show.verified(outcome.max_abs_diff)


def document_of(outcome: Outcome, args: argparse.Namespace, link: LinkEstimate) -> dict[str, Any]:
    """Return the JSON interface's object."""
    network, candidate = outcome.network, outcome.candidate
    document = {
        "model": network.name,
        "layers": len(network.graph.layers),
        "partition_point": candidate.point,
        "partition_layer": candidate.layer,
        "device": args.device,
        "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(link.rate_bytes_per_s),
        "rtt_ms": link.rtt_ms,
        "predicted": candidate.stages.as_dict(),
        "measured": outcome.measured.as_dict(),
        "sent_bytes": outcome.runs[-1].sent_bytes,
        "weights_digest": network.weights_digest,
        "output": output_document(outcome.runs[-1].output, outcome.guesses),
    }
    if outcome.max_abs_diff is not None:
        document["max_abs_diff"] = outcome.max_abs_diff
    if len(outcome.runs) > 1:
        document["repeat"] = {stage: dataclasses.asdict(timing) for stage, timing in outcome.timings.items()}
    return document


if __name__ == "__main__":
    sys.exit(main())
