"""Find out why edge and cloud do not work together: one line for each check, with a cure if it fails.

    python -m neurosurgeon doctor -i 127.0.0.1 -p 9999
    python -m neurosurgeon doctor -i cloud.example --tls-ca certs/ca.pem -t vgg_net --weights vgg.pth

Exit code: 0 if all checks pass, else that of the first error (2 usage, 3 network, 4 not authenticated, 1 other).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from neurosurgeon.cli.parser import access_of_edge, add_weights, address_parser
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights_sources import parse_weights
from neurosurgeon.net.access import Access
from neurosurgeon.net.messages import Prepare
from neurosurgeon.net.monitor_client import measure_link, ping_link
from neurosurgeon.net.net_utils import format_rate
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import connect_time_ms, resolve
from neurosurgeon.reports.text import print_json
from neurosurgeon.utils.errors import (
    AccessError,
    NetworkError,
    NeurosurgeonError,
    UnknownModelError,
    WeightsError,
    is_connection_loss,
)

if TYPE_CHECKING:
    from neurosurgeon.engine.base import Engine, Network
    from neurosurgeon.predictor.latencies import LayerLatencies

COMPARED_RUNS = 7  # the first builds kernels
FAR_OFF = 1.5  # largest ratio of predicted and measured, either way, without a warning
SLOW_CPU = ("DEFAULT", "NO AVX")  # of get_cpu_capability: torch finds none of the vector units of its fast kernels
MODEL_CURES: dict[type[Exception], str] = {  # the first class of an error counts
    WeightsError: "start both sides with the same --weights or --pretrained",
    UnknownModelError: "choose with -t a model that it serves, or add this one to --models at the cloud",
    NetworkError: "see the log of the cloud",
    NeurosurgeonError: "run the same version of this project on both sides",
}


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warn"
    FAILED = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, for one line."""

    check: str
    verdict: Verdict
    detail: str
    cure: str = ""
    exit_code: int = 0

    def line(self) -> str:
        """Return the line."""
        cure = f" -> {self.cure}" if self.cure else ""
        return f"{self.verdict:<5}{self.check:<22}{' '.join(self.detail.split())}{cure}"


class CheckError(Exception):
    """A check failed. The checks that depend on it are skipped."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.finding = finding


@contextlib.contextmanager
def checking(check: str, cure: str, cures: Mapping[type[Exception], tuple[str, str]] | None = None) -> Iterator[None]:
    """Turn a typed error of the block into a `CheckError` with a cure.

    Args: cures: for some classes of errors, another name of the check and another cure.
    """
    try:
        yield
    except NeurosurgeonError as exc:
        named = next((named for kind, named in (cures or {}).items() if isinstance(exc, kind)), (check, cure))
        raise CheckError(_failed(*named, exc)) from exc


class Doctor:
    """Checks one cloud from this edge."""

    def __init__(self, args: argparse.Namespace, access: Access) -> None:
        self._args = args
        self._access = access
        self._host, self._port, self._monitor_port = args.ip, args.port, args.monitor_port

    def findings(self) -> Iterator[Finding]:
        """Yield the finding of each check, as soon as it is made. May block for seconds."""
        yield self.cpu()
        for checks in (self.task_port, self.bandwidth_port):
            try:
                yield from checks()
            except CheckError as exc:
                yield exc.finding

    def cpu(self) -> Finding:
        """Check the vector units that torch's fast kernels need."""
        import torch

        found = torch.backends.cpu.get_cpu_capability()
        detail = f"torch {torch.__version__} computes with {found}"
        if found in SLOW_CPU:
            cure = "a CPU with AVX2 is several times faster; a virtual machine must pass it on"
            return Finding("CPU of this side", Verdict.WARNING, detail, cure)
        return Finding("CPU of this side", Verdict.OK, detail)

    def task_port(self) -> Iterator[Finding]:
        """Check the name of the cloud, its port, and each step of a task up to its request, which is not sent."""
        with checking("name resolves", "check the spelling, /etc/hosts and DNS, or pass an IP address to -i"):
            addresses = resolve(self._host, self._port)
        yield Finding("name resolves", Verdict.OK, f"{self._host} is {', '.join(addresses)}")
        with checking("task port", f"start cloud_api.py there with -i and -p {self._port}, and open its firewall"):
            connect_ms = connect_time_ms(self._host, self._port)
        yield Finding("task port", Verdict.OK, f"port {self._port} answers after {connect_ms:.1f} ms")
        how = " and ".join(name for name, used in (("TLS", self._access.tls), ("a key", self._access.key)) if used)
        key_cure = "give both sides the same --key-file, or certificates of one CA (make certs)"
        cure = "see that port and -p are those of cloud_api.py, and update the older side to the other's version"
        with checking("protocol, version", cure, {AccessError: ("TLS and key", key_cure)}):
            session = EdgeSession.open(self._host, self._port, access=self._access)
        with session:
            detail = f"authenticated with {how}" if how else "not required by this cloud"
            yield Finding("TLS and key", Verdict.OK, detail)
            device, threads = session.cloud.get("device"), session.cloud.get("threads")
            yield Finding("protocol, version", Verdict.OK, f"a cloud on {device} with {threads} threads")
            yield from self.models(session)

    def models(self, session: EdgeSession) -> Iterator[Finding]:
        """Compare graphs and weights of every model, and the predictions of the first that agrees."""
        from neurosurgeon.engine.base import find_engine
        from neurosurgeon.graph.cut import pack_nodes

        catalogue = Catalogue()
        sources = parse_weights(catalogue, self._args.weights, self._args.pretrained)
        engine = find_engine()(catalogue)
        compared = False
        for model in map(sources.named, self._args.type):
            check = f"weights of {model}"
            try:
                network = engine.open(model, sources.get(model, WeightsSource()))
                graph = network.ref.graph
                session.ask_to_prepare(Prepare(model, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
                session.wait_until_ready(network.ref.weights_digest)
            except NeurosurgeonError as exc:
                finding = _failed(check, next(cure for kind, cure in MODEL_CURES.items() if isinstance(exc, kind)), exc)
                if is_connection_loss(exc):
                    raise CheckError(finding) from exc
                yield finding
            else:
                yield Finding(check, Verdict.OK, f"the same on both sides ({network.ref.weights_digest[:12]})")
                if not compared:
                    yield from self.predictions(session, engine, network)
                    compared = True

    def predictions(self, session: EdgeSession, engine: Engine, network: Network) -> Iterator[Finding]:
        """Compare the predicted latency of a whole network on each side with the fastest of a few runs there."""
        from neurosurgeon.edge.settings import TaskSettings
        from neurosurgeon.edge.stages import cloud_latencies, edge_latencies
        from neurosurgeon.edge.task import request_of
        from neurosurgeon.engine.base import Side

        name, graph = network.ref.name, network.ref.graph
        task, arrays = TaskSettings(name, WeightsSource()), engine.example(name)
        predicted = edge_latencies(task, engine, graph)  # also sets the number of threads that it is for
        whole = network.partition(graph.edge_nodes(0), Side.CLOUD)
        runs = [whole.run([array.copy("K") for array in arrays]) for _ in range(COMPARED_RUNS)]
        yield _compared("edge", name, predicted, min(run.compute_ms for run in runs if run))
        request, predicted = request_of(network.ref, graph.edge_nodes(0)), cloud_latencies(task, session, graph)
        measured_ms = min(session.infer(request, arrays).compute_ms for _ in range(COMPARED_RUNS))
        yield _compared("cloud", name, predicted, measured_ms)

    def bandwidth_port(self) -> Iterator[Finding]:
        """Check the bandwidth service, then measure rate and round-trip time with it."""
        check, port = "bandwidth port", self._monitor_port
        cure = f"open the firewall for port {port}, or give the cloud's --monitor-port; or pass --bandwidth and --rtt"
        key_cure = "the service has the key and certificates of its cloud: restart that"
        with checking(check, cure, {AccessError: (check, key_cure)}):
            ping_link(self._host, port, self._access)
        yield Finding(check, Verdict.OK, f"the service on port {port} answers")
        with checking("rate and RTT", "the link is lost or too slow to measure: pass --bandwidth and --rtt"):
            link = measure_link(self._host, port, self._access)
        yield Finding("rate and RTT", Verdict.OK, f"{format_rate(link.rate_bytes_per_s)} up, {link.rtt_ms:.2f} ms")


def _compared(side: str, model: str, predicted: LayerLatencies, measured_ms: float) -> Finding:
    """Return the finding about a prediction: a warning if it is wrong by more than a factor of `FAR_OFF`."""
    predicted_ms = predicted.total()
    detail = (
        f"{model}: predicted {predicted_ms:.4g} ms, measured {measured_ms:.4g} ms; predicted from {predicted.origin}"
    )
    if 1 / FAR_OFF <= predicted_ms / measured_ms <= FAR_OFF:
        return Finding(f"prediction, {side}", Verdict.OK, detail)
    cure = f"stop other programs there; start the {side} with --remeasure-machine, or collect data of its own "
    cure += f"(python -m predictor.collect --side {side})"
    return Finding(f"prediction, {side}", Verdict.WARNING, detail, cure)


def _failed(check: str, cure: str, exc: NeurosurgeonError) -> Finding:
    return Finding(check, Verdict.FAILED, str(exc), cure, exc.exit_code)


def main(argv: Sequence[str] | None = None, prog: str = "doctor.py") -> int:
    """Run this command; return its exit code."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    parser.add_argument(
        "-t",
        "--type",
        nargs="+",
        default=list(ZOO),
        metavar="MODEL",
        help="models whose graphs and weights are compared (default: the four classic ones)",
    )
    add_weights(parser)
    parser.add_switch("--json", "print one JSON object on stdout, and all lines on stderr")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    args.type = [Catalogue().canonical_name(name) for name in args.type]
    findings = []
    for finding in Doctor(args, access_of_edge(args)).findings():
        print(finding.line(), file=sys.stderr if args.json else sys.stdout, flush=True)
        findings.append(finding)
    if args.json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)
