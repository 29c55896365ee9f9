"""The outcome of a task: its plan, its runs, its output, and the JSON document of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neurosurgeon.edge.records import Guess
from neurosurgeon.engine.base import Partition, Verdict
from neurosurgeon.graph.spec import Array, as_floats, dtype_of, holds_scores
from neurosurgeon.graph.trees import Leaf, described, put_together, take_apart
from neurosurgeon.planner.plan import Candidate, SplitPlan, needless_link
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import StageTimes, Timing, stage_timings
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s

TOP_GUESSES = 5
MAX_LISTED = 64  # values of an array that are listed in JSON


@dataclass(frozen=True, slots=True)
class Run:
    """One inference: its outputs, and the measured durations of its stages."""

    outputs: tuple[Array, ...]  # of the network, in the order of its graph
    times: StageTimes
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished task: the plan, every run of it, and its output."""

    partition: Partition  # of the edge
    plan: SplitPlan
    candidate: Candidate
    link: LinkEstimate | None  # infinitely fast if it was not measured; None if the cloud disconnected before
    runs: Sequence[Run]
    guesses: Sequence[Guess]
    verdict: Verdict | None  # with --verify

    @property
    def where(self) -> str:
        """Where its layers ran: "edge", "cloud" or "split"."""
        if is_whole(self.partition):
            return "edge"
        return "split" if len(self.partition.edge_nodes) > 1 else "cloud"

    @property
    def measured(self) -> StageTimes:
        """The durations of the run with the median total."""
        return sorted((run.times for run in self.runs), key=lambda times: times.total_ms)[len(self.runs) // 2]

    @property
    def max_abs_diff(self) -> float | None:
        """The largest difference from the output of the user's own module; None without --verify."""
        return self.verdict and self.verdict.max_abs_diff

    @property
    def output(self) -> Any:
        """The network's output in the last run: an array, or a tree of arrays."""
        return put_together(self.partition.network.graph.output_template, self.runs[-1].outputs)

    @property
    def timings(self) -> dict[str, Timing]:
        """The median and spread of every stage over the runs, by its name in the JSON interface."""
        return stage_timings([run.times for run in self.runs])

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        network, candidate, link = self.partition.network, self.candidate, self.link
        is_known = link is not None and math.isfinite(link.rate_bytes_per_s)
        document = {
            "model": network.name,
            "layers": len(network.graph.layers),
            "partition_point": candidate.point,
            "partition_layer": candidate.layer,
            **self.plan.cut_dict(candidate),
            "edge_parameter_bytes": self.partition.parameter_bytes,  # as loaded
            "device": self.partition.device,
            "where": self.where,
            "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(link.rate_bytes_per_s) if link and is_known else None,
            "rtt_ms": link and link.rtt_ms,
            "predicted": candidate.stages.as_dict(),
            "interval_ms": list(self.plan.interval(candidate)),
            "too_close_to_call": self.plan.is_too_close_to_call,
            "predictor": {"edge": self.plan.edge.source, "cloud": self.plan.cloud.source},
            "predicted_from": self.plan.origins,
            "measured": self.measured.as_dict(),
            "sent_bytes": self.runs[-1].sent_bytes,
            "weights_digest": network.weights_digest,
            "output": output_document(network.graph.output_template, self.runs[-1].outputs, self.guesses),
        }
        if link and not is_known:
            document["link_not_measured"] = needless_link(self.plan, link.rtt_ms)
        elif link and link.source is LinkSource.LAST:
            document["link_age_s"] = link.age_s
        if self.verdict is not None:
            document["max_abs_diff"] = self.verdict.max_abs_diff
            document["verified"] = self.verdict.is_equal
        if len(self.runs) > 1:
            document["repeat"] = {stage: asdict(timing) for stage, timing in self.timings.items()}
        return document


def is_whole(partition: Partition) -> bool:
    """Return whether an edge partition is the whole network."""
    return len(partition.edge_nodes) == len(partition.network.graph.nodes)


def main_output(outputs: Sequence[Array]) -> Array | None:
    """Return the output that may hold the scores of classes: the first one of two dimensions; None without any."""
    return next((output for output in outputs if holds_scores(output.ndim, dtype_of(output))), None)


def top_guesses(output: Array | None, labels: Sequence[str] | None, count: int = TOP_GUESSES) -> list[Guess]:
    """Return the most probable classes of logits (1, classes), best first; none for an output of another shape.

    Args: labels: the names of the classes; None: unknown.
    """
    if output is None or not output.size:
        return []
    logits = as_floats(output)[0].astype(np.float64)
    with np.errstate(all="ignore"):  # infinite logits give NaN
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
    best = np.argsort(-logits, kind="stable")[:count].tolist()
    return [Guess(index, labels[index] if labels else None, float(probabilities[index])) for index in best]


def top_class(outputs: Sequence[Array]) -> int | None:
    """Return the index of the largest score of a class; None if there are no scores."""
    scores = main_output(outputs)
    if scores is None and len(outputs) == 1 and outputs[0].dtype.kind != "c":
        scores = outputs[0]
    return None if scores is None or not scores.size else int(as_floats(scores).argmax())


def outputs_digest(outputs: Sequence[Array]) -> str:
    """Return the SHA-256 of the bytes of all outputs: outputs that differ in one bit have different digests."""
    total = hashlib.sha256()
    for output in outputs:
        total.update(output.tobytes())
    return total.hexdigest()


def output_document(template: Any, outputs: Sequence[Array], guesses: Sequence[Guess]) -> Any:
    """Return an output in the JSON interface: a tree of the same structure, with the fields of each array.

    Classes are beside the fields of the array that has their scores.
    """
    scores = main_output(outputs)

    def describe(value: Any) -> Any:
        if not isinstance(value, Leaf):
            return value if isinstance(value, int | float | str | None) else str(value)
        array = outputs[value.index]
        document = {"shape": list(array.shape), "dtype": dtype_of(array), "digest": outputs_digest([array])}
        if array is not scores and array.size <= MAX_LISTED and array.dtype.kind != "c":
            document["values"] = as_floats(array).tolist()
        if array is scores or len(outputs) == 1:
            document["top5"] = [
                {"index": guess.index, "label": guess.label, "probability": guess.probability} for guess in guesses
            ]
        return document

    return described(template, describe)


def tree_document(output: Any, labels: Sequence[str] | None) -> Any:
    """Return the output of a network, an array or a tree of arrays, in the JSON interface.

    Args: labels: the names of the classes; None: unknown.
    """
    template, arrays = take_apart(output, lambda value: isinstance(value, np.ndarray))
    return output_document(template, arrays, top_guesses(main_output(arrays), labels))
