"""A drawing of a cut network: the nodes on the edge, the nodes in the cloud, and every transferred tensor once.

Graphviz draws it. If Graphviz is missing, its input is written instead: text in the DOT language.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.utils.errors import UsageError, writing
from neurosurgeon.utils.units import readable_bytes

if TYPE_CHECKING:
    from neurosurgeon.graph.layer_graph import LayerGraph, Node

log = logging.getLogger(__name__)

EDGE_FILL, TENSOR_FILL, CLOUD_FILL = "#cfe8d8", "#f6dfb0", "#cddcf0"
DOT, DRAWN = ".dot", (".svg", ".png", ".pdf")
TRIVIAL_KINDS = {LayerKind.ACTIVATION, LayerKind.BATCHNORM, LayerKind.DROPOUT, LayerKind.FLATTEN, LayerKind.VIEW}
HINT = "Graphviz draws it: pip install graphviz, and its program dot from https://graphviz.org/download"


def draw_cut(path: Path, graph: LayerGraph, edge_nodes: Collection[int]) -> Path:
    """Draw a network and its cut; return the file that was written.

    Args:   path: its suffix is the format: .svg, .png, .pdf, or .dot for text. Without Graphviz, text is written
            to the same path with the suffix .dot.
    Raises: UsageError: another suffix, or the file cannot be written.
    """
    if path.suffix not in (DOT, *DRAWN):
        raise UsageError(f"cannot draw {path}: the suffix must be one of {', '.join((*DRAWN, DOT))}")
    text = dot_text(graph, edge_nodes)
    drawing = text.encode() if path.suffix == DOT else _rendered(text, path.suffix[1:])
    if drawing is None:
        path = path.with_suffix(DOT)
        log.warning("wrote %s, the drawing as text; %s", path, HINT)
        drawing = text.encode()
    with writing(path):
        path.write_bytes(drawing)
    return path


def _rendered(text: str, file_format: str) -> bytes | None:
    """Return a drawing; None if Graphviz is missing."""
    try:
        import graphviz
    except ImportError:
        return None
    try:
        drawing: bytes = graphviz.Source(text).pipe(format=file_format)
    except graphviz.ExecutableNotFound:
        return None
    except graphviz.CalledProcessError as exc:
        raise UsageError(f"Graphviz cannot draw this: {exc}") from exc
    return drawing


# ---------------------------------------------------------------- the text


def dot_text(graph: LayerGraph, edge_nodes: Collection[int]) -> str:
    """Return the drawing in the DOT language. Equal cuts give equal texts."""
    boxes = boxes_of(graph, edge_nodes)
    box_of = {index: number for number, box in enumerate(boxes) for index in box}
    is_cut = len(edge_nodes) < len(graph.nodes)
    transferred = graph.boundary(edge_nodes) if is_cut else ()
    on_edge, in_cloud = ([n for n, box in enumerate(boxes) if (box[0] in edge_nodes) is side] for side in (True, False))
    labels = [_box_label([graph.nodes[index] for index in box]) for box in boxes]
    lines = [
        f"digraph {_quoted(graph.model)} {{",
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10, margin="0.12,0.05"];',
        '  edge [color="#666666", arrowsize=0.7];',
        *_cluster("edge", EDGE_FILL, on_edge, labels),
        *_cluster("cloud", CLOUD_FILL, in_cloud, labels),
        *(f"  t{node.index} [shape=note, label={_tensor_label(node)}{_fill(TENSOR_FILL)}];" for node in transferred),
        *(f"  b{box_of[node.index]} -> t{node.index} [style=bold];" for node in transferred),
        *dict.fromkeys(_arrows(graph, edge_nodes, box_of)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def boxes_of(graph: LayerGraph, edge_nodes: Collection[int]) -> list[list[int]]:
    """Return the nodes of each box.

    A trivial node shares the box of the node whose output it reads, if it is the only reader and on the same side.
    """
    readers = [0] * len(graph.nodes)
    for node in graph.nodes:
        for index in node.inputs:
            readers[index] += 1
    boxes: list[list[int]] = []
    box_of: dict[int, list[int]] = {}
    for node in graph.nodes:
        source = node.inputs[0] if len(node.inputs) == 1 else 0
        joins = node.kind in TRIVIAL_KINDS and source and readers[source] == 1
        if joins and (source in edge_nodes) == (node.index in edge_nodes):
            box_of[node.index] = box_of[source]
            box_of[source].append(node.index)
        else:
            box_of[node.index] = [node.index]
            boxes.append(box_of[node.index])
    return boxes


def _cluster(side: str, fill: str, boxes: Sequence[int], labels: Sequence[str]) -> Iterator[str]:
    yield f"  subgraph cluster_{side} {{"
    yield f'    label="{side}"; fontname="Helvetica"; color="#999999"; style="rounded,dashed";'
    for box in boxes:
        yield f"    b{box} [label={labels[box]}{_fill(fill)}];"
    yield "  }"


def _arrows(graph: LayerGraph, edge_nodes: Collection[int], box_of: dict[int, int]) -> Iterator[str]:
    for node in graph.nodes:
        for index in node.inputs:
            is_transferred = index in edge_nodes and node.index not in edge_nodes
            start = f"t{index}" if is_transferred else f"b{box_of[index]}"
            if is_transferred or box_of[index] != box_of[node.index]:
                yield f"  {start} -> b{box_of[node.index]};"


def _box_label(nodes: Sequence[Node]) -> str:
    first = nodes[0]
    further = "".join(f" + {node.name.rpartition('.')[2]}" for node in nodes[1:] if not node.folded)
    kind = first.kind if first.index else "input"
    return _quoted(f"{first.name}{further}\n{kind} {_shape(nodes[-1])}")


def _tensor_label(node: Node) -> str:
    return _quoted(f"{node.name}\n{_shape(node)} {node.sent[0].dtype}\n{readable_bytes(node.sent_bytes)}")


def _shape(node: Node) -> str:
    return " + ".join("x".join(map(str, output.shape)) for output in node.outputs)


def _fill(colour: str) -> str:
    return f', fillcolor="{colour}"'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
