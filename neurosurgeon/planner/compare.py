"""Comparison of strategies over bandwidth, and the rates at which the best cut changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.planner.crossovers import Crossover, crossovers
from neurosurgeon.planner.plan import SplitPlan
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.utils.errors import PlanningError
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s

PlanAt = Callable[[float, Strategy], SplitPlan]  # from a rate in bytes/s and a strategy


class ComparisonRow(NamedTuple):
    """The best cut of one strategy at one rate, and its predicted stages in ms."""

    model: str
    strategy: str
    mb_per_s: float
    edge_ms: float
    transfer_ms: float
    cloud_ms: float
    total_ms: float
    edge_nodes: int
    crossing_bytes: int
    cut: str  # the layer before it, or the nodes whose tensors are transferred

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Comparison:
    """The plan of every strategy at every rate, and the rates at which the best cut changes."""

    graph: LayerGraph
    rates_bytes_per_s: Sequence[float]
    plans: Mapping[Strategy, Sequence[SplitPlan | None]]  # one for each rate; None: no cut fits
    crossovers: Sequence[Crossover[SplitPlan]]

    @property
    def origins(self) -> dict[str, str]:
        """The source of the predictions of each side."""
        return next((plan.origins for plans in self.plans.values() for plan in plans if plan), {})

    def rows(self) -> list[ComparisonRow]:
        """Return a row for each strategy and rate, except those at which no cut of the strategy fits on the edge."""
        return [
            ComparisonRow(
                self.graph.model,
                str(strategy),
                bytes_per_s_to_mb_per_s(rate),
                *plan.best.stages,
                plan.best.stages.total_ms,
                len(plan.edge_nodes(plan.best)),
                plan.best.boundary_bytes,
                plan.best.layer,
            )
            for strategy, plans in self.plans.items()
            for rate, plan in zip(self.rates_bytes_per_s, plans, strict=True)
            if plan
        ]

    def to_dict(self, rtt_ms: float) -> dict[str, Any]:
        """Return it as a JSON object."""
        rows = [row.to_dict() for row in self.rows()]
        return {
            "model": self.graph.model,
            "rtt_ms": rtt_ms,
            "predicted_from": self.origins,
            "strategies": [{key: value for key, value in row.items() if key != "model"} for row in rows],
            "crossovers": [
                {
                    "mb_per_s": bytes_per_s_to_mb_per_s(change.rate),
                    "edge_nodes_below": len(change.below.edge_nodes(change.below.best)),
                    "edge_nodes_above": len(change.above.edge_nodes(change.above.best)),
                    "cut_below": change.below.best.layer,
                    "cut_above": change.above.best.layer,
                }
                for change in self.crossovers
            ],
        }


def compare(graph: LayerGraph, plan_at: PlanAt, rates_bytes_per_s: Sequence[float]) -> Comparison:
    """Plan with every strategy at every rate, and find the rates at which the best cut of the graph changes.

    Raises: PlanningError: no cut fits on the edge.
    """
    changes = crossovers(
        lambda rate: plan_at(rate, Strategy.DADS),
        min(rates_bytes_per_s),
        max(rates_bytes_per_s),
        lambda plan: plan.edge_nodes(plan.best),
    )
    return Comparison(graph, rates_bytes_per_s, plans_of_all(plan_at, rates_bytes_per_s), changes)


def plans_of_all(
    plan_at: PlanAt, rates_bytes_per_s: Sequence[float], strategies: Iterable[Strategy] = Strategy
) -> dict[Strategy, list[SplitPlan | None]]:
    """Return the plan of every strategy at every rate."""
    return {strategy: [_plan_or_none(plan_at, rate, strategy) for rate in rates_bytes_per_s] for strategy in strategies}


def _plan_or_none(plan_at: PlanAt, rate_bytes_per_s: float, strategy: Strategy) -> SplitPlan | None:
    try:
        return plan_at(rate_bytes_per_s, strategy)
    except PlanningError:
        return None
