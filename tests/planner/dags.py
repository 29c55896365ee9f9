"""Small graphs with costs, and all their cuts: the oracle of the searches."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator

import numpy as np
from hypothesis import strategies as st

from neurosurgeon.planner.dag_search import DagCosts

Reads = list[list[int]]
COSTS = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e3))  # zeros and ties, too


@st.composite
def dags(draw: st.DrawFn, most: int = 12) -> Reads:
    """The inputs of every node of a graph; the last node reads all results without another reader."""
    size = draw(st.integers(1, most))
    reads: Reads = [[]]
    for node in range(1, size):
        reads.append(sorted(draw(st.sets(st.integers(0, node - 1), min_size=1, max_size=3))))
    read = {index for inputs in reads for index in inputs}
    reads[-1] = sorted({*reads[-1], *(node for node in range(size - 1) if node not in read)})
    return reads


@st.composite
def costs_of(draw: st.DrawFn, size: int, send: st.SearchStrategy[float] = COSTS) -> DagCosts:
    """The costs of every node; the input costs no computation."""

    def values(strategy: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(strategy, min_size=size, max_size=size))

    edge, cloud = ([0.0, *values(COSTS)[1:]] for _ in range(2))
    return DagCosts(np.array(edge), np.array(values(send)), np.array(cloud), draw(COSTS))


def random_case(seed: int) -> tuple[Reads, DagCosts]:
    """Return a random graph of 5 to 10 nodes, and costs; the cloud is at least as fast as the edge."""
    draw = random.Random(seed)
    size = draw.randint(5, 10)
    reads = [[], *(sorted({draw.randrange(max(0, node - 4), node) for _ in range(2)}) for node in range(1, size))]
    read = {index for inputs in reads for index in inputs}
    reads[-1] = sorted({*reads[-1], *(node for node in range(size - 1) if node not in read)})
    edge, send = (np.array([draw.expovariate(1) for _ in range(size)]) for _ in range(2))
    edge[0] = 0
    return reads, DagCosts(edge, send, edge * draw.choice([0.1, 0.3, 1]))


def closed_sets(reads: Reads) -> Iterator[frozenset[int]]:
    """Yield every set of nodes that contains the input and the inputs of its members."""
    for flags in itertools.product((False, True), repeat=len(reads) - 1):
        edge = frozenset((0, *itertools.compress(range(1, len(reads)), flags)))
        if all(index in edge for node in edge for index in reads[node]):
            yield edge


def stages_of(edge: Collection[int], reads: Reads, costs: DagCosts) -> tuple[float, float, float]:
    """Return the times for which a cut keeps edge, link and cloud busy, by definition."""
    wanted = {index for node in range(len(reads)) if node not in edge for index in reads[node] if index in edge}
    return (
        math.fsum(costs.edge_ms[node] for node in edge),
        math.fsum(costs.send_ms[node] for node in wanted),
        math.fsum(costs.cloud_ms[node] for node in range(len(reads)) if node not in edge),
    )


def cost_of(edge: Collection[int], reads: Reads, costs: DagCosts) -> float:
    """Return the cost of a cut, by definition."""
    is_sent = len(edge) < len(reads)
    return math.fsum((*stages_of(edge, reads, costs), costs.fixed_ms if is_sent else 0.0))
