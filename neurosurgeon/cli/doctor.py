"""Find out why edge and cloud do not get on: checks in the order in which things fail, one line each with a cure.

    python -m neurosurgeon doctor -i 127.0.0.1 -p 9999
    python -m neurosurgeon doctor -i cloud.example --tls-ca certs/ca.pem -t vgg_net --weights vgg.pth

Exit code: 0 where all is well, else that of the first error (2 usage, 3 network, 4 not let in, 1 other).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

from neurosurgeon.cli.parser import access_of_edge, add_weights, address_parser, typed
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights import parse_weights
from neurosurgeon.net.access import Access
from neurosurgeon.net.messages import Prepare
from neurosurgeon.net.monitor_client import measure_link, ping_link
from neurosurgeon.net.net_utils import format_rate
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import reach, resolve
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
FAR_OFF = 1.5  # predicted / measured, or the other way round
SLOW_CPU = ("DEFAULT", "NO AVX")  # of get_cpu_capability: torch finds none of the vector units of its fast kernels


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    WARNING = "warn"
    FAILED = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """The line of one check."""

    check: str
    verdict: Verdict
    detail: str
    cure: str = ""
    exit_code: int = 0

    def line(self) -> str:
        """Return the line for people."""
        cure = f" -> {self.cure}" if self.cure else ""
        return f"{self.verdict:<5}{self.check:<22}{' '.join(self.detail.split())}{cure}"


class CheckError(Exception):
    """A check failed; what depends on it is skipped."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.detail)
        self.finding = finding


class Doctor:
    """Checks one cloud, seen from this edge."""

    def __init__(self, args: argparse.Namespace, access: Access) -> None:
        self._args = args
        self._access = access
        self._host, self._port, self._monitor_port = args.ip, args.port, args.monitor_port

    def findings(self) -> Iterator[Finding]:
        """Yield what each check finds, as soon as it is found."""
        yield self.cpu()
        try:
            yield self.name()
            yield from self.conversation()
        except CheckError as exc:
            yield exc.finding
        try:
            yield self.bandwidth_port()
            yield self.link()
        except CheckError as exc:
            yield exc.finding

    def cpu(self) -> Finding:
        """Look for the vector units that torch's fast kernels need."""
        import torch

        found = torch.backends.cpu.get_cpu_capability()
        detail = f"torch {torch.__version__} computes with {found}"
        if found in SLOW_CPU:
            cure = "a CPU with AVX2 is several times faster; a virtual machine must pass it on"
            return Finding("CPU of this side", Verdict.WARNING, detail, cure)
        return Finding("CPU of this side", Verdict.OK, detail)

    def name(self) -> Finding:
        """Resolve the cloud's name."""
        try:
            addresses = resolve(self._host, self._port)
        except NeurosurgeonError as exc:
            _fail("name resolves", exc, "check the spelling, /etc/hosts and DNS, or pass an IP address to -i")
        return Finding("name resolves", Verdict.OK, f"{self._host} is {', '.join(addresses)}")

    def conversation(self) -> Iterator[Finding]:
        """Go as far as a task would go, without sending one."""
        try:
            connect_ms = reach(self._host, self._port)
        except NeurosurgeonError as exc:
            cure = f"start cloud_api.py there with -i and -p {self._port}, and let its firewall pass that port"
            _fail("task port", exc, cure)
        yield Finding("task port", Verdict.OK, f"port {self._port} answers after {connect_ms:.1f} ms")
        how = " and ".join(name for name, used in (("TLS", self._access.tls), ("a key", self._access.key)) if used)
        try:
            session = EdgeSession.open(self._host, self._port, access=self._access)
        except AccessError as exc:
            _fail("TLS and key", exc, "give both sides the same --key-file, or certificates of one CA (make certs)")
        except NetworkError as exc:
            cure = "see that port and -p are those of cloud_api.py, and update the older side to the other's version"
            _fail("protocol, version", exc, cure)
        with session:
            yield Finding("TLS and key", Verdict.OK, f"let in with {how}" if how else "let in; neither is asked for")
            device, threads = session.cloud.get("device"), session.cloud.get("threads")
            yield Finding("protocol, version", Verdict.OK, f"a cloud on {device} with {threads} threads")
            yield from self.models(session)

    def models(self, session: EdgeSession) -> Iterator[Finding]:
        """Compare graphs and weights of every model."""
        from neurosurgeon.engine.base import SEEDED, find_engine
        from neurosurgeon.graph.cut import pack_nodes

        catalogue = Catalogue()
        sources = parse_weights(catalogue, self._args.weights, self._args.pretrained)
        engine = find_engine()(catalogue)
        compared = False
        for model in self._args.type:
            check = f"weights of {model}"
            try:
                network = engine.open(model, sources.get(model, SEEDED))
                graph = network.ref.graph
                session.ask_to_prepare(Prepare(model, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
                session.wait_until_ready(network.ref.weights_digest)
            except WeightsError as exc:
                yield _failed(check, exc, "start both sides with the same --weights or --pretrained")
            except UnknownModelError as exc:
                yield _failed(check, exc, "choose what it serves with -t, or add the model to --models at the cloud")
            except NetworkError as exc:
                finding = _failed(check, exc, "see the log of the cloud")
                if is_connection_loss(exc):
                    raise CheckError(finding) from exc
                yield finding
            except NeurosurgeonError as exc:
                yield _failed(check, exc, "run the same version of this project on both sides")
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
        from neurosurgeon.graph.spec import synthetic_input

        name, graph = network.ref.name, network.ref.graph
        task, array = TaskSettings(name, WeightsSource()), synthetic_input(graph.input)
        predicted = edge_latencies(task, engine, graph)  # sets the threads that it is for
        whole = network.partition(graph.edge_nodes(0), Side.CLOUD)
        runs = [whole.run([array.copy("K")]) for _ in range(COMPARED_RUNS)]
        yield _compared("edge", name, predicted, min(run.compute_ms for run in runs if run))
        request, predicted = request_of(network.ref, graph.edge_nodes(0)), cloud_latencies(task, session, graph)
        measured_ms = min(session.infer(request, [array]).compute_ms for _ in range(COMPARED_RUNS))
        yield _compared("cloud", name, predicted, measured_ms)

    def bandwidth_port(self) -> Finding:
        """Talk to the bandwidth service."""
        check, port = "bandwidth port", self._monitor_port
        try:
            ping_link(self._host, port, self._access)
        except AccessError as exc:
            _fail(check, exc, "it takes the key and certificates of its cloud: restart that")
        except NeurosurgeonError as exc:
            cure = (
                f"let the firewall pass port {port}, or give --monitor-port as at the cloud; --bandwidth does without"
            )
            _fail(check, exc, cure)
        return Finding(check, Verdict.OK, f"the service on port {port} answers")

    def link(self) -> Finding:
        """Measure rate and RTT."""
        try:
            link = measure_link(self._host, self._monitor_port, self._access)
        except NeurosurgeonError as exc:
            _fail("rate and RTT", exc, "the link is lost or too slow to measure: pass --bandwidth and --rtt")
        return Finding("rate and RTT", Verdict.OK, f"{format_rate(link.rate_bytes_per_s)} up, {link.rtt_ms:.2f} ms")


def _compared(side: str, model: str, predicted: LayerLatencies, measured_ms: float) -> Finding:
    """Return the finding about a prediction: a warning where it is off by more than `FAR_OFF`."""
    predicted_ms = predicted.total()
    detail = (
        f"{model}: predicted {predicted_ms:.4g} ms, measured {measured_ms:.4g} ms; predicted from {predicted.origin}"
    )
    if 1 / FAR_OFF <= predicted_ms / measured_ms <= FAR_OFF:
        return Finding(f"prediction, {side}", Verdict.OK, detail)
    cure = f"stop what else runs there; start the {side} with --remeasure-machine, or collect data of its own "
    cure += f"(python -m predictor.collect --side {side})"
    return Finding(f"prediction, {side}", Verdict.WARNING, detail, cure)


def _failed(check: str, exc: NeurosurgeonError, cure: str) -> Finding:
    return Finding(check, Verdict.FAILED, str(exc), cure, exc.exit_code)


def _fail(check: str, exc: NeurosurgeonError, cure: str) -> NoReturn:
    raise CheckError(_failed(check, exc, cure)) from exc


def report(findings: Iterator[Finding], say: Callable[[str], None]) -> list[Finding]:
    """Say each finding as it comes; return all."""
    kept = []
    for finding in findings:
        say(finding.line())
        kept.append(finding)
    return kept


def main(argv: Sequence[str] | None = None, prog: str = "doctor.py") -> int:
    parser = address_parser(prog, __doc__, monitor_port=True)
    parser.add_argument(
        "-t",
        "--type",
        type=typed(Catalogue().canonical_name),
        nargs="+",
        default=list(ZOO),
        metavar="MODEL",
        help="models whose weights are compared (default: all)",
    )
    add_weights(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout (default: lines)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    out = sys.stderr if args.json else sys.stdout
    doctor = Doctor(args, access_of_edge(args))
    findings = report(doctor.findings(), lambda line: print(line, file=out, flush=True))
    if args.json:
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}))
    return next((finding.exit_code for finding in findings if finding.exit_code), 0)
