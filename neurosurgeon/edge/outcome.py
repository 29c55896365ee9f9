"""The outcome of a task: its plan, its runs, its output, and the JSON document of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neurosurgeon.edge.records import Guess
from neurosurgeon.engine.base import Partition
from neurosurgeon.graph.spec import Array, as_floats, dtype_of
from neurosurgeon.planner.plan import Candidate, SplitPlan, needless_link
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import StageTimes, Timing, stage_timings
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s

TOP_GUESSES = 5


@dataclass(frozen=True, slots=True)
class Run:
    """One inference: its output, and the measured durations of its stages."""

    output: Array
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
    max_abs_diff: float | None

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
    def output(self) -> Array:
        """The network's output in the last run."""
        return self.runs[-1].output

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
            "output": output_document(self.output, self.guesses),
        }
        if link and not is_known:
            document["link_not_measured"] = needless_link(self.plan, link.rtt_ms)
        elif link and link.source is LinkSource.LAST:
            document["link_age_s"] = link.age_s
        if self.max_abs_diff is not None:
            document["max_abs_diff"] = self.max_abs_diff
        if len(self.runs) > 1:
            document["repeat"] = {stage: asdict(timing) for stage, timing in self.timings.items()}
        return document


def is_whole(partition: Partition) -> bool:
    """Return whether an edge partition is the whole network."""
    return len(partition.edge_nodes) == len(partition.network.graph.nodes)


def top_guesses(output: Array, labels: Sequence[str] | None, count: int = TOP_GUESSES) -> list[Guess]:
    """Return the most probable classes of logits (1, classes), best first; none for an output of another shape.

    Args: labels: the names of the classes; None: unknown.
    """
    if output.ndim != 2 or output.dtype.kind == "c":
        return []
    logits = as_floats(output)[0].astype(np.float64)
    with np.errstate(all="ignore"):  # infinite logits give NaN
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
    best = np.argsort(-logits, kind="stable")[:count].tolist()
    return [Guess(index, labels[index] if labels else None, float(probabilities[index])) for index in best]


def top_class(output: Array) -> int | None:
    """Return the index of the largest value; None if there is none."""
    return None if not output.size or output.dtype.kind == "c" else int(as_floats(output).argmax())


def max_difference(one: Array, other: Array) -> float:
    """Return the largest absolute difference of two outputs of one shape."""
    return float(np.abs(as_floats(one).astype(np.complex128) - as_floats(other)).max())


def output_digest(output: Array) -> str:
    """Return the SHA-256 of an output's bytes: outputs that differ in one bit have different digests."""
    return hashlib.sha256(output.tobytes()).hexdigest()


def output_document(output: Array, guesses: Sequence[Guess]) -> dict[str, Any]:
    """Return the fields of an output in the JSON interface."""
    return {
        "shape": list(output.shape),
        "dtype": dtype_of(output),
        "digest": output_digest(output),
        "top5": [{"index": guess.index, "label": guess.label, "probability": guess.probability} for guess in guesses],
    }
