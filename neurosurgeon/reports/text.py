"""The printed output: the lines of the contract, tables, and JSON documents. Only scripts call this."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from neurosurgeon.edge.records import (
    Answered,
    EdgeComputed,
    Finished,
    Guess,
    LinkKnown,
    LinkNotNeeded,
    LinkReused,
    Planned,
    Prepared,
    Progress,
    Replied,
    Sent,
    TaskEvent,
)
from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.planner.plan import needless_link, tensor_documents
from neurosurgeon.predictor.kind_models import Score
from neurosurgeon.utils.timing import StageTimes
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s, readable_bytes

if TYPE_CHECKING:  # the lines before the plan are printed before torch is imported
    from neurosurgeon.cloud.events import CloudEvent
    from neurosurgeon.planner.compare import Comparison
    from neurosurgeon.planner.plan import Candidate, SplitPlan
    from neurosurgeon.predictor.latencies import LayerFeature

RULE = "-" * 106
FINISHED = "================= DNN Collaborative Inference Finished. ==================="

TASK_LINES: dict[type[TaskEvent], str] = {
    Prepared: "short message , model type has been sent successfully\n"
    "short message , partition strategy has been sent successfully",
    Sent: "get yes , edge output has been sent successfully",
    Finished: FINISHED,
}
CLOUD_LINES = {
    "CONNECTED": "successfully connection :{}",
    "MODEL_TYPE": "get model type successfully.",
    "PARTITION_POINT": "get partition point successfully.",
    "EDGE_OUTPUT": "get edge_output and transfer latency successfully.",
    "TRANSFER_LATENCY_SENT": "short message , transfer latency has been sent successfully",
    "CLOUD_LATENCY_SENT": "short message , cloud latency has been sent successfully",
    "FINISHED": FINISHED,
}

Json = dict[str, Any]


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(document, ensure_ascii=False))


# ---------------------------------------------------------------- lines of the edge


def bandwidth_line(rate_bytes_per_s: float) -> str:
    """Return the contract's line of the uplink's rate."""
    return f"get bandwidth value : {bytes_per_s_to_mb_per_s(rate_bytes_per_s)} MB/s"


def cut_lines(
    graph: LayerGraph | None,
    point: int,
    layer: str,
    edge_nodes: Collection[int],
    boundary: Iterable[Node],
    total_ms: float,
) -> list[str]:
    """Return the lines of a cut: for a chain the contract's line, else the number of nodes and each boundary tensor.

    Args: layer: the one before the cut. boundary: the nodes whose tensors are transferred. total_ms: predicted.
    """
    if graph is None or graph.is_chain:
        return [f"best latency : {total_ms:.2f} ms , best partition point : {point} - {layer}"]
    return [
        f"best latency : {total_ms:.2f} ms , edge nodes : {len(edge_nodes)} of {len(graph.nodes)}",
        *(f"transferred tensor : {_tensor_text(tensor)}" for tensor in tensor_documents(boundary)),
    ]


def best_lines(plan: SplitPlan) -> list[str]:
    """Return the lines of the best cut."""
    best = plan.best
    boundary = plan.boundary(best)
    return cut_lines(plan.graph, best.point, best.layer, plan.edge_nodes(best), boundary, best.stages.total_ms)


def _tensor_text(tensor: Json) -> str:
    shape = "x".join(map(str, tensor["shape"]))
    return f"{tensor['name']} , {shape} {tensor['dtype']} , {readable_bytes(tensor['bytes'])}"


class ProgressBar:
    """A bar on stderr, if that is a terminal, for the `Progress` events of long work."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._bar: tqdm[Any] | None = None

    def show(self, event: Progress) -> None:
        """Show the progress; the bar ends with the last event."""
        if self._bar is None:
            self._bar = tqdm(total=event.total, desc=event.name, unit=self._unit, leave=False, disable=None)
        self._bar.update(event.done - self._bar.n)
        if event.done == event.total:
            self._bar.close()
            self._bar = None


class EdgeReport:
    """Prints the lines of one task, to stdout unless a stream is given. An observer of `edge.records.TaskEvent`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._repeats = ProgressBar("run")

    def __call__(self, event: TaskEvent) -> None:
        """Print the lines of an event."""
        match event:
            case LinkReused(age_s):
                print(f"link not measured : the estimate of {age_s:.0f} s ago is used", file=sys.stderr)
            case LinkKnown(link):
                self.say(bandwidth_line(link.rate_bytes_per_s))
            case LinkNotNeeded(plan, rtt_ms):
                self.say(f"link not measured : {needless_link(plan, rtt_ms)}")
            case Planned(plan, chosen):
                self._plan(plan, chosen)
            case EdgeComputed(model, edge_ms):
                self.say(f"{model} 在边缘端设备上推理完成 - {edge_ms:.3f} ms")
            case Replied(model, times):
                self.say(f"{model} 传输完成 - {times.transfer_ms:.3f} ms")
                self.say(f"{model} 在云端设备上推理完成 - {times.cloud_ms:.3f} ms")
            case Progress():
                self._repeats.show(event)
            case Answered():
                self._answered(event)
            case _:
                self.say(TASK_LINES[type(event)])

    def say(self, line: str) -> None:
        """Print one line at once."""
        print(line, file=self._stream, flush=True)

    def deadline(self, deadline_ms: float, best_ms: float, measured_ms: float) -> None:
        """Print whether the task met its deadline, and whether the best cut was predicted to meet it."""
        met, effort = "met" if measured_ms <= deadline_ms else "missed", ""
        if best_ms > deadline_ms:
            effort = f" (no cut makes it: the best was predicted to take {best_ms:.2f} ms)"
        self.say(f"deadline {deadline_ms:g} ms {met}{effort}")

    def _plan(self, plan: SplitPlan, chosen: Candidate) -> None:
        for line in best_lines(plan):
            self.say(line)
        if chosen is not plan.best:
            self.say(f"forced partition point : {chosen.point} - {chosen.layer} , {chosen.stages.total_ms:.2f} ms")
        self.say(RULE)

    def _answered(self, event: Answered) -> None:
        self._guesses(event.guesses, event.is_seeded)
        self._times(event.predicted, event.measured, event.runs)
        for line in origin_lines(event.origins):
            self.say(line)
        self.say(f"answered by {event.where}")
        for stage, timing in event.timings.items() if event.runs > 1 else ():
            self.say(
                f"{stage.removesuffix('_ms'):<10}median {timing.median_ms:.3f} ms, min {timing.min_ms:.3f}, "
                f"max {timing.max_ms:.3f}, interquartile {timing.iqr_ms:.3f} ({timing.samples} runs)"
            )
        if event.verdict is not None:
            self.say(f"largest difference to the unsplit network on this machine: {event.verdict.max_abs_diff:g}")

    def _guesses(self, guesses: Sequence[Guess], is_seeded: bool) -> None:
        if not guesses:
            return
        meaning = " (weights of a fixed seed: the classes mean nothing)" if is_seeded else ""
        self.say(f"top-5 classes{meaning}:")
        for guess in guesses:
            self.say(f"  {guess.probability:7.2%}  {guess.label or f'class {guess.index}'}")

    def _times(self, predicted: StageTimes, measured: StageTimes, runs: int) -> None:
        self.say(f"{'':<10}{'edge':>12}{'transfer':>12}{'cloud':>12}{'total':>12}")
        for name, times in (("predicted", predicted), ("measured", measured)):
            self.say(f"{name:<10}" + "".join(f"{value:>9.3f} ms" for value in times.as_dict().values()))
        if runs == 1:
            self.say("(the first inference of a process also builds its kernels; --repeat 20 measures warm ones)")


def origin_lines(origins: Mapping[str, str]) -> list[str]:
    """Return a line for each side that names the data of its predictions."""
    return [f"{side} predicted from {origin}" for side, origin in origins.items() if origin]


# ---------------------------------------------------------------- lines of the cloud


def cloud_lines(event: CloudEvent, sock: socket.socket) -> None:
    """Print the contract's line of an event in the cloud. Called on any thread: each line is written whole."""
    sys.stdout.write(CLOUD_LINES[event.name].format(sock) + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------- plans


def print_plan(plan: SplitPlan, bandwidth_mb_per_s: float, rtt_ms: float) -> None:
    """Print every candidate with its predicted stages, and the memory and interval of the best."""
    print(f"{plan.graph.model}: {len(plan.graph.layers)} layers, {bandwidth_mb_per_s:g} MB/s, RTT {rtt_ms:g} ms")
    stages = f"{'edge':>11}{'transfer':>12}{'cloud':>11}{'total':>12}  ms"
    print(f"{'point':>5}  {'after layer':<30}{'transferred':>11}{stages}")
    for candidate in plan.candidates:
        edge, transfer, cloud, total = candidate.stages.as_dict().values()
        layer = candidate.layer if len(candidate.layer) < 30 else f"{candidate.layer[:28]}…"
        print(
            f"{candidate.point:>5}  {layer:<30}{readable_bytes(candidate.boundary_bytes):>11}"
            f"{edge:>11.3f}{transfer:>12.3f}{cloud:>11.3f}{total:>12.3f}"
            f"{'  <- best' if candidate is plan.best else ''}"
        )
    print("\n".join(best_lines(plan)))
    memory = plan.memory(plan.best)
    print(
        f"memory of the edge partition : {readable_bytes(memory.parameter_bytes)} of parameters , "
        f"{readable_bytes(memory.activation_bytes)} of tensors at once"
    )
    print_confidence(plan)


def print_confidence(plan: SplitPlan) -> None:
    """Print the interval of the best cut, the runner-up, the layers outside of the data, and its origins."""
    low_ms, high_ms = plan.interval(plan.best)
    print(f"90 % interval of its latency : {low_ms:.2f} to {high_ms:.2f} ms")
    if plan.runner_up:
        verdict = (
            "too close to call" if plan.is_too_close_to_call else "slower by more than the error of the predictions"
        )
        runner_up = plan.runner_up
        print(f"runner-up : {runner_up.point} - {runner_up.layer} , {runner_up.stages.total_ms:.2f} ms , {verdict}")
    for side, latencies in (("edge", plan.edge), ("cloud", plan.cloud)):
        if latencies.extrapolated:
            names = ", ".join(latencies.extrapolated)
            print(f"outside of the {side}'s data, so less certain than the interval : {names}")
    print("\n".join(origin_lines(plan.origins)))


# ---------------------------------------------------------------- comparison of strategies


def print_comparison(comparison: Comparison, rtt_ms: float) -> None:
    """Print the predicted latency of every strategy at every rate, and the rates at which the best cut changes."""
    nodes = len(comparison.graph.nodes)
    print(f"{comparison.graph.model}: {nodes} nodes, RTT {rtt_ms:g} ms, predicted latency in ms")
    print(f"{'MB/s':>10}" + "".join(f"{strategy:>17}" for strategy in comparison.plans))
    for rate, *plans in zip(comparison.rates_bytes_per_s, *comparison.plans.values(), strict=True):
        totals = (f"{plan.best.stages.total_ms:.3f}" if plan else "does not fit" for plan in plans)
        print(f"{bytes_per_s_to_mb_per_s(rate):>10g}" + "".join(f"{total:>17}" for total in totals))
    for change in comparison.crossovers:
        below, above = (len(plan.edge_nodes(plan.best)) for plan in (change.below, change.above))
        print(
            f"best cut changes at {bytes_per_s_to_mb_per_s(change.rate):.6g} MB/s : {below} of {nodes} nodes on the "
            f"edge below, {above} above , cut after {change.above.best.layer}"
        )
    if not comparison.crossovers:
        print("the best cut is the same at all of these bandwidths")
    print("\n".join(origin_lines(comparison.origins)))


# ---------------------------------------------------------------- the layer study


def print_features(features: Sequence[LayerFeature]) -> None:
    """Print the layer study as a table."""
    print(f"{'layer':>5}  {'name':<18}{'kind':<12}{'output':<20}{'transfer':>11}{'latency':>12}{'accumulated':>13}  ms")
    for feature in features:
        shape = "x".join(map(str, feature.output_shape))
        print(
            f"{feature.index:>5}  {feature.name:<18}{feature.kind:<12}{shape:<20}"
            f"{readable_bytes(feature.output_bytes):>11}{feature.latency_ms:>12.3f}{feature.accumulated_ms:>13.3f}"
        )


def print_scores(scores: Mapping[str, Mapping[LayerKind, Score]]) -> None:
    """Print the errors of every predictor on held-out rows, a line for each kind of layer."""
    print(f"{'predictor':<11}{'kind':<12}{'held out':>9}{'mean error':>12}{'within 10 %':>13}{'within 20 %':>13}")
    for name, kinds in scores.items():
        for kind, score in kinds.items():
            shares = f"{score.mean_error:>12.1%}{score.within_10:>13.1%}{score.within_20:>13.1%}"
            print(f"{name:<11}{kind:<12}{score.rows:>9}{shares}")
