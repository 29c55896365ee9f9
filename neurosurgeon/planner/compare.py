"""Strategies beside each other over bandwidth, and the rates at which the best cut changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.planner.crossovers import Crossover, crossovers
from neurosurgeon.planner.plan import SplitPlan
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.utils.errors import PlanningError

PlanAt = Callable[[float, Strategy], SplitPlan]  # a rate in bytes/s, and how to cut


@dataclass(frozen=True, slots=True)
class Comparison:
    """What every strategy is predicted to take over bandwidth, and where the best cut changes."""

    graph: LayerGraph
    rates_bytes_per_s: Sequence[float]
    plans: Mapping[Strategy, Sequence[SplitPlan | None]]  # one for each rate; None: no cut fits
    crossovers: Sequence[Crossover[SplitPlan]]

    @property
    def origins(self) -> dict[str, str]:
        """Whose data the predictions of each side come from."""
        return next((plan.origins for plans in self.plans.values() for plan in plans if plan), {})


def compare(graph: LayerGraph, plan_at: PlanAt, rates_bytes_per_s: Sequence[float]) -> Comparison:
    """Plan with every strategy at every rate, and find the rates at which the best cut of the graph changes.

    Raises: PlanningError: nothing fits on the edge.
    """
    changes = crossovers(
        lambda rate: plan_at(rate, Strategy.DADS),
        min(rates_bytes_per_s),
        max(rates_bytes_per_s),
        lambda plan: plan.edge_nodes(plan.best),
    )
    return Comparison(graph, rates_bytes_per_s, plans_of_all(plan_at, rates_bytes_per_s), changes)


def plans_of_all(plan_at: PlanAt, rates_bytes_per_s: Sequence[float]) -> dict[Strategy, list[SplitPlan | None]]:
    """Return the plan of every strategy at every rate."""
    return {strategy: [_plan_or_none(plan_at, rate, strategy) for rate in rates_bytes_per_s] for strategy in Strategy}


def _plan_or_none(plan_at: PlanAt, rate_bytes_per_s: float, strategy: Strategy) -> SplitPlan | None:
    try:
        return plan_at(rate_bytes_per_s, strategy)
    except PlanningError:
        return None
