"""Every classification network of torchvision: traced, its best cut found, and its partitions compared with the whole.

Networks over `MOST_GIGAFLOPS` run on meta tensors only: shapes are compared, bits are not.

python -m tests.benchmark.all_models [NAME ...]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurosurgeon.engine.torch_engine import as_tensor, use_threads
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.names import Catalogue, input_size, torchvision_names
from neurosurgeon.models.tracing import meta_copy
from neurosurgeon.planner.dag_search import DagCosts, DagSearch
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms
from tests.benchmark.common import save
from tests.equality import are_equal
from tests.models.cuts_of import cut_module, random_cuts, split_output
from tests.networks import ENGINE, pixels, run_whole, skeleton, trace_module

MOST_GIGAFLOPS = 200.0  # 100 giga multiply-adds; beyond are ViT-H/14 at 518 pixels and RegNet-Y-128GF at 384
RANDOM_CUTS = 5
RATE_BYTES_PER_S, RTT_MS, SLOWER_EDGE = 5e6, 10.0, 8.0  # 40 Mbit/s, and a small edge: most best cuts lie inside
SEARCHES = 30
HEAD = (
    f"{'network':<20}{'size':>5}{'traced':>8}{'trace s':>9}{'nodes':>7}{'blocks':>8}{'search ms':>11}{'cutting ms':>12}"
    f"{'on edge':>9}{'cross':>7}{'edge MB':>9}{'cloud MB':>10}  same output"
)


def main(names: Sequence[str] = ()) -> None:
    use_threads(2)
    rows = {}
    print(HEAD, flush=True)
    for name in names or torchvision_names():
        rows[name] = row = examine(name)
        print(line(name, row), flush=True)
    equal = sum(row["equal_cuts"] == row["cuts"] and not row["meta_only"] for row in rows.values())
    meta = sum(row["meta_only"] for row in rows.values())
    searches = [row["search_ms"] for row in rows.values()]
    print(
        f"{len(rows)} traced; {equal} give the same bits at every cut tried, {meta} the same shapes on meta tensors; "
        f"search median {statistics.median(searches):.2f} ms, longest {max(searches):.2f} ms"
    )
    save("all_models", {"networks": rows})


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    outcome = f"{row['equal_cuts']}/{row['cuts']} cuts{', shapes on meta tensors only' if row['meta_only'] else ''}"
    return (
        f"{name:<20}{row['size']:>5}{row['traced_by']:>8}{row['trace_s']:>9.2f}{row['nodes']:>7}{row['blocks']:>8}"
        f"{row['search_ms']:>11.2f}{row['cutting_ms']:>12.0f}{row['edge_nodes']:>9}{row['crossing']:>7}"
        f"{row['edge_parameter_mb']:>9.1f}{row['cloud_parameter_mb']:>10.1f}  {outcome}"
    )


def examine(name: str) -> dict[str, Any]:
    """Return the row of one network."""
    name = Catalogue().canonical_name(name)
    architecture = skeleton(name)
    start_ms = now_ms()
    graph = trace_module(architecture, (1, 3, input_size(name), input_size(name)), name, is_own=False)
    trace_ms = now_ms() - start_ms
    edge_nodes, search_ms = best_cut(graph)
    start_ms = now_ms()
    cut_module(meta_copy(architecture), graph, edge_nodes)
    cutting_ms = now_ms() - start_ms
    meta_only = sum(node.flops for node in graph.nodes) / 1e9 > MOST_GIGAFLOPS
    cuts = [edge_nodes, *random_cuts(graph, RANDOM_CUTS)]
    equal = same_shapes(architecture, graph, cuts) if meta_only else same_bits(name, cuts)
    everything = frozenset(range(len(graph.nodes)))
    return {
        "size": graph.inputs[0].shape[-1],
        "traced_by": graph.tracer.removeprefix("torch."),
        "trace_s": trace_ms / s_to_ms(1),
        "operations": len(graph.program.nodes),
        "nodes": len(graph.nodes),
        "blocks": len(graph.block_points),
        "search_ms": search_ms,
        "cutting_ms": cutting_ms,
        "edge_nodes": len(edge_nodes),
        "crossing": len(graph.boundary(edge_nodes)),
        "edge_parameter_mb": graph.parameter_bytes(edge_nodes) / 1e6,
        "cloud_parameter_mb": graph.parameter_bytes(everything - edge_nodes) / 1e6,
        "meta_only": meta_only,
        "cuts": len(cuts),
        "equal_cuts": sum(equal),
    }


def best_cut(graph: LayerGraph) -> tuple[frozenset[int], float]:
    """Return the minimum cut over a link of 40 Mbit/s, and how long finding it takes with all else known, ms."""
    search = DagSearch([node.inputs for node in graph.nodes])
    edge, cloud = (np.array([0.0, *find_predictor(side).predict(graph).latency_ms]) for side in ("edge", "cloud"))
    send_ms = np.array([s_to_ms(node.sent_bytes / RATE_BYTES_PER_S) for node in graph.nodes])
    times_ms = []
    for _ in range(SEARCHES):
        start_ms = now_ms()
        best = search.best(DagCosts(SLOWER_EDGE * edge, send_ms, cloud, RTT_MS))
        times_ms.append(now_ms() - start_ms)
    return best.edge_nodes, statistics.median(times_ms)


def same_bits(name: str, cuts: Iterable[frozenset[int]]) -> Iterator[bool]:
    """Yield for each cut whether its partitions give the output of the whole network, bit for bit."""
    network = ENGINE.open(name)
    images = pixels(network.graph.inputs[0].shape)
    whole = run_whole(network, images)
    for edge_nodes in cuts:
        output = split_output(network.module, network.graph, edge_nodes, as_tensor(images))
        yield are_equal(output, whole, same_setup=True) and bool(np.isfinite(whole).all())


def same_shapes(model: nn.Module, graph: TracedGraph, cuts: Iterable[frozenset[int]]) -> Iterator[bool]:
    """Yield for each cut whether its partitions fit together, and give an output of the whole's shape; without data."""
    empty = meta_copy(model)
    for edge_nodes in cuts:
        edge, cloud = cut_module(empty, graph, edge_nodes)
        made: tuple[Tensor, ...] = edge(torch.empty(graph.inputs[0].shape, device="meta"))
        (output,) = cloud(*made) if len(edge_nodes) < len(graph.nodes) else made
        yield tuple(output.shape) == graph.outputs[0].spec.shape


if __name__ == "__main__":
    main(sys.argv[1:])
