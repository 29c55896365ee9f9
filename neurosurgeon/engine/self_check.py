"""The check of a network before its first answer: do its partitions compute what the user's own module computes?

The user's module runs as it is, eagerly, on three inputs, and on the first of them again: its answer must not change.
Then the traced program runs whole, and at two cuts. A network that was found equal is remembered by its digests and
that of the code that cuts it, so that the check runs once.

Rounding. Folded norms and another memory order round differently. Seeded deep networks enlarge that beyond any
tolerance, as they do with the last bit of their input. So a difference is also looked for in float64: there a network
that is only sensitive agrees, and a wrong one does not.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from neurosurgeon.engine.base import Partition, Side, Verdict
from neurosurgeon.graph.compare import Difference, largest_difference, tolerance_of
from neurosurgeon.graph.spec import Array, Arrays, dtype_of
from neurosurgeon.graph.trees import described
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.partition import program_module
from neurosurgeon.models.preprocess import as_array
from neurosurgeon.models.program import Example, first_line, outputs_apart
from neurosurgeon.models.tracing import run_module
from neurosurgeon.utils.errors import MismatchError
from neurosurgeon.utils.files import cache_directory, replace_file

log = logging.getLogger(__name__)

CUTS_AT = (1 / 3, 2 / 3)  # of the partition points
DRAWN = 2  # inputs beside the example
SCALE = 1 + 1e-6  # of an input: a sensitive network enlarges even that
FLOAT64_TOLERANCE = 1e-6  # a sensitive network enlarges rounding of 1e-16 by far less than 1e10


class Checkable(Protocol):
    """A network that can be checked."""

    @property
    def graph(self) -> TracedGraph: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def build(self) -> Callable[[], nn.Module]:
        """A function that returns the user's own module with its weights, not optimised."""

    def partition(self, edge_nodes: frozenset[int], side: Side) -> Partition:
        """See `engine.base.Network`."""


class Truth(NamedTuple):
    """What the user's own module returned for some inputs."""

    inputs: list[list[Tensor]]
    outputs: list[Arrays]


def observe(module: nn.Module, name: str, graph: TracedGraph, example: Example) -> Truth:
    """Run the user's module on the example and on drawn inputs, and on the example again.

    Raises: MismatchError: its answer changes from run to run, or has another structure than when it was traced.
    """
    before = _settings(module)
    inputs, outputs = [list(example.tensors)], [run_whole(module, graph, example.tensors)]
    for seed in range(1, DRAWN + 1):
        drawn = example.drawn(seed)
        try:
            outputs.append(run_whole(module, graph, drawn))
        except MismatchError:
            raise
        except Exception as exc:  # a rule that the example keeps, and other values do not
            log.info("%s does not take drawn inputs: %s", name, first_line(exc))
            drawn = [tensor.clone() for tensor in example.tensors]
            outputs.append(outputs[0])
        inputs.append(drawn)
    again = largest_difference(outputs[0], run_whole(module, graph, inputs[0]))
    if again.relative > tolerance_of(_types(module)):
        changed = [key for key, value in _settings(module).items() if before.get(key) != value]
        cause = f"changes its attribute {changed[0]}" if changed else "keeps state, or draws random numbers"
        raise MismatchError(
            f"{name} gives another answer when it runs again with the same input (difference {again.relative:.2g}): "
            f"forward{_line_of_forward(module)} {cause}; pass that as an input: a partition keeps no state"
        )
    return Truth(inputs, outputs)


def run_whole(module: nn.Module, graph: TracedGraph, tensors: Sequence[Tensor]) -> Arrays:
    """Return the outputs of the user's module.

    Raises: MismatchError: they have another structure than when the module was traced.
    """
    made = run_module(module, graph.input_template, [tensor.clone() for tensor in tensors])
    template, outputs = outputs_apart(made)
    if described(template, repr) != described(graph.output_template, repr):
        raise MismatchError(
            f"{graph.model} returns another structure than when it was traced: {template}, then {graph.output_template}"
        )
    return tuple(map(as_array, outputs))


def _settings(module: nn.Module) -> dict[str, str]:
    """Return the plain attributes of all parts of a module, as text; of tensors, how often they were changed."""
    return {
        f"{part}.{name}".lstrip("."): str(value._version) if isinstance(value, Tensor) else repr(value)
        for part, owner in module.named_modules()
        for name, value in {**vars(owner), **owner._buffers}.items()
        if _may_be_state(value) and not name.startswith("_")
    }


def _may_be_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_inference()  # whose changes are not counted
    return isinstance(value, bool | int | float | str | list | dict | set)


def _types(module: nn.Module) -> list[str]:
    return [str(value.dtype).removeprefix("torch.") for value in (*module.parameters(), *module.buffers())]


# ---------------------------------------------------------------- comparison


def check(network: Checkable, truth: Truth) -> None:
    """Compare a network, whole and at two cuts, with what the user's module returned.

    Raises: MismatchError: they differ; names the largest difference, the first part where it appears, and the cause.
    """
    tolerance = tolerance_of([*_types(network.module), *(dtype_of(array) for array in truth.outputs[0])])
    graph = network.graph
    everything = frozenset(range(len(graph.nodes)))
    wholes = [run_cut(network, everything, tensors) for tensors in truth.inputs]
    worst = max(map(largest_difference, truth.outputs, wholes))
    if worst.relative > tolerance and not _agrees_in_float64(network, truth):
        raise MismatchError(_explained(network, worst, truth.inputs[0]))
    for share, tensors, whole in zip(CUTS_AT, truth.inputs[1:], wholes[1:], strict=True):
        cut = graph.edge_nodes(round(share * len(graph.layers)))
        apart = largest_difference(whole, run_cut(network, cut, tensors))
        if apart.relative > tolerance and worst.relative <= tolerance:
            raise MismatchError(
                f"{graph.model} cut after {graph.nodes[max(cut)].name} gives another answer than whole: they differ by "
                f"{apart.relative:.2g} of the largest value; make no tensor depend on the memory of another one"
            )


def verify(network: Checkable, tensors: Sequence[Tensor], outputs: Sequence[Array]) -> Verdict:
    """Compare outputs with those of the user's own module for these inputs."""
    module = network.build()
    expected = run_whole(module, network.graph, tensors)
    found = largest_difference(expected, outputs)
    allowed = tolerance_of([*_types(module), *map(dtype_of, expected)])
    if found.relative > allowed:  # a sensitive network moves as much by itself
        moved = [tensor * SCALE if tensor.is_floating_point() else tensor for tensor in tensors]
        allowed = largest_difference(expected, run_whole(module, network.graph, moved)).relative
    return Verdict(found.absolute, found.relative, found.relative <= allowed)


def run_cut(network: Checkable, edge_nodes: frozenset[int], tensors: Sequence[Tensor]) -> Arrays:
    """Return the outputs of both partitions of a cut, one after the other. Raises: MismatchError: a partition fails."""
    try:
        return _run_cut(network, edge_nodes, tensors)
    except Exception as exc:  # an operation may fail in any way on another memory order, or on a device
        raise MismatchError(
            f"{network.graph.model} cannot be cut after {network.graph.nodes[max(edge_nodes)].name}"
            f"{_line_of_forward(network.module)}: a partition fails: {first_line(exc)}; run it whole, or report this"
        ) from exc


def _run_cut(network: Checkable, edge_nodes: frozenset[int], tensors: Sequence[Tensor]) -> Arrays:
    graph = network.graph
    edge = network.partition(edge_nodes, Side.EDGE).run([as_array(tensor.clone()) for tensor in tensors])
    assert edge is not None  # noqa: S101  # for mypy: without keep_going it always ends
    sent, made = graph.split(edge_nodes, edge.arrays)
    if len(edge_nodes) == len(graph.nodes):
        return graph.assemble(edge_nodes, made)
    cloud = network.partition(edge_nodes, Side.CLOUD).run([array.copy("K") for array in sent])
    assert cloud is not None  # noqa: S101  # likewise
    return graph.assemble(edge_nodes, made, cloud.arrays)


def _agrees_in_float64(network: Checkable, truth: Truth) -> bool:
    """Return whether module and program agree in float64: then the difference is rounding that the network enlarges."""
    try:
        module, graph = network.build().double(), network.graph
        program = program_module(module, graph, graph.output_nodes)
        for tensors in truth.inputs:
            doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
            expected = run_whole(module, graph, doubled)
            with torch.inference_mode():
                given = program.run(*(tensor.clone() for tensor in doubled))
            apart = largest_difference(expected, tuple(map(as_array, given)))
            log.info("%s in float64: they differ by %.2g", graph.model, apart.relative)
            if apart.relative > FLOAT64_TOLERANCE:
                return False
    except Exception as exc:  # a module may have constants of its own type
        log.info("%s cannot run in float64: %s", network.graph.model, first_line(exc))
        return False
    return True


def _explained(network: Checkable, worst: Difference, tensors: Sequence[Tensor]) -> str:
    graph, module = network.graph, network.build()
    try:
        part = first_difference(module, graph, tensors)
    except Exception as exc:  # it is only the better message
        log.info("the first difference of %s is not found: %s", graph.model, first_line(exc))
        part = None
    where = f"first in {part}" if part else "in forward itself, outside of its parts"
    cause = (
        "it decides by the type of its arguments, or changes tensors that have two names; use tensors alone"
        if graph.tracer == "torch.fx"
        else "it makes numbers of tensors (item, tolist, numpy), or asks whether it is traced; use tensors alone"
    )
    return (
        f"{graph.model}, traced by {graph.tracer}, computes something else than the module itself"
        f"{_line_of_forward(module)}: they differ by {worst.relative:.2g} of the largest value, {where}; "
        f"probably {cause}"
    )


def _line_of_forward(module: nn.Module) -> str:
    """Return the file and the line of a module's forward, as " (FILE, line N)"; nothing if it is not the user's own."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    is_own = type(module).__module__.split(".")[0] != "torch"
    return f" ({code.co_filename}, line {code.co_firstlineno})" if code and is_own else ""


def first_difference(module: nn.Module, graph: TracedGraph, tensors: Sequence[Tensor]) -> str | None:
    """Return the first part of a module whose result differs from that of the program; None if no part's does."""
    last = {}  # the last operation of each part
    for node in graph.program.nodes:
        path = str(node.target) if node.op == "call_module" else _part_of(node)
        if path and "spec" in node.meta:
            last[path] = node
    results: dict[str, Array] = {}
    for path, part in module.named_modules():
        if path in last:
            part.register_forward_hook(lambda _, __, made, path=path: _keep(results, path, made))
    run_module(module, graph.input_template, [tensor.clone() for tensor in tensors])
    paths = [path for path in last if path in results]
    program = program_module(module, graph, [last[path] for path in paths])
    with torch.inference_mode():
        made = program.run(*(tensor.clone() for tensor in tensors))
    for path, tensor in zip(paths, made, strict=True):
        if largest_difference([results[path]], [as_array(tensor)]).relative > tolerance_of(()):
            return f"{path} ({type(module.get_submodule(path)).__name__})"
    return None


def _part_of(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _keep(results: dict[str, Array], path: str, made: Any) -> None:
    if isinstance(made, Tensor):
        results[path] = as_array(made.clone())


# ---------------------------------------------------------------- kept results


def is_checked(key: str) -> str | None:
    """Return the memory order in which a network was found equal; None if it was not checked."""
    try:
        return _path(key).read_text().strip() or None
    except OSError:
        return None


def keep_checked(key: str, order: str) -> None:
    """Remember that a network was found equal in a memory order."""
    try:
        replace_file(_path(key), order + "\n")
    except OSError as exc:
        log.warning("the check of the network cannot be kept: %s", exc)


def check_key(graph: TracedGraph, weights_digest: str, source: str, device: str) -> str:
    """Return a digest of everything on which the check depends.

    Args: source: of the user's code.
    """
    parts = (graph.digest, weights_digest, source, device, torch.__version__, _code_digest())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@lru_cache(1)
def _code_digest() -> str:
    """Return a digest of the code that traces, cuts and runs networks."""
    total = hashlib.sha256()
    here = Path(__file__).parent
    for directory in (here.parent / "models", here):
        for file in sorted(directory.glob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


def _path(key: str) -> Path:
    return cache_directory() / "checks" / key
