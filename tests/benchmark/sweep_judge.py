"""The judge of the sweep: does a network, cut by the engine, compute what the user's module computes eagerly?

Everything that knows the engine's interface is in `Subject`. The comparison shares no code with the engine's own check.
"""

from __future__ import annotations

import copy
import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurosurgeon.engine.base import Side
from neurosurgeon.engine.torch_engine import TorchEngine, as_array, as_tensor
from neurosurgeon.graph import trees
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.own_models import CONSTRUCTION_SEED
from neurosurgeon.net.header import pack_array, unpack_array
from neurosurgeon.planner.dag_search import DagCosts, DagSearch
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.utils.errors import InternalError, NeurosurgeonError
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import ms_to_s, s_to_ms
from tests.models.hard.table import REFUSED, RIGHT, Hard

BY_NAME = "by name"  # the family of networks that the engine knows
RANDOM_CUTS = 5
RATE_BYTES_PER_S, RTT_MS, SLOWER_EDGE = 5e6, 10.0, 8.0  # 40 Mbit/s, and a small edge: most best cuts lie inside
TOLERANCE = 1e-4  # of the largest value of an output
HALF_TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 3e-2}  # their numbers have three digits, or two
FLOAT64_TOLERANCE = 1e-6  # rounding of 1e-16, enlarged by a sensitive network
MOVED = 1 + 1e-6  # factor of an input, to see how sensitive a network is
SENSITIVE = 100  # times the effect of that factor: the largest difference that rounding explains
LINE = re.compile(r"line \d+|\.py:\d+")
CURE = re.compile(
    r"[;:,] (and |or |please )?(add|build|call|choose|compute|convert|decide|draw|give|initiali[sz]e|keep|leave|load"
    r"|make|pass|remove|rename|return|run|save|set|start|use|write)\b",
    re.IGNORECASE,
)
MODEL_FILE = """
import copy
from tests.benchmark.sweep_families import find as _find
_network = _find({family!r}, {name!r})
def mine():
    module = _network.build()
    return module.double() if {is_double} else module
def example():
    from tests.benchmark.sweep_judge import doubled
    return doubled(_network.inputs) if {is_double} else copy.deepcopy(_network.inputs)
"""


class Subject:
    """A network under test, opened by the engine as its user would: from a model file, or as a module."""

    def __init__(self, family: str, network: Hard, *, as_file: bool, is_double: bool = False) -> None:
        inputs = doubled(network.inputs) if is_double else copy.deepcopy(network.inputs)
        self._name = network.name if family == BY_NAME else "mine"
        if family == BY_NAME:
            catalogue = Catalogue()
        elif as_file:
            file = Path(tempfile.mkdtemp(prefix="sweep_")) / "sweep_net.py"
            file.write_text(MODEL_FILE.format(family=family, name=network.name, is_double=is_double))
            catalogue = Catalogue([file])
        else:
            catalogue = Catalogue(modules={"mine": built(network)}, examples={"mine": inputs})
        self._engine = TorchEngine(catalogue)

    def trace(self) -> LayerGraph:
        """Trace the network to a graph. Raises: NeurosurgeonError."""
        return self._engine.graph(self._name)

    def open(self) -> None:
        """Load the network. Raises: NeurosurgeonError."""
        self._network = self._engine.open(self._name)
        self.graph = self._network.graph

    def cuts(self) -> list[frozenset[int]]:
        """Return the best cut for a slow edge, and cuts at random partition points."""
        points = range(len(self.graph.layers) + 1)
        drawn = random.Random(0).sample(points, min(RANDOM_CUTS, len(points)))
        return [self._best_cut(), *map(self.graph.edge_nodes, drawn)]

    def _best_cut(self) -> frozenset[int]:
        graph = self.graph
        edge, cloud = (np.array([0.0, *find_predictor(side).predict(graph).latency_ms]) for side in ("edge", "cloud"))
        send_ms = np.array([s_to_ms(node.sent_bytes / RATE_BYTES_PER_S) for node in graph.nodes])
        if len(edge) != len(graph.nodes):  # the layers of a chain have several nodes
            return graph.edge_nodes(len(graph.layers) // 2)
        search = DagSearch([node.inputs for node in graph.nodes])
        return search.best(DagCosts(SLOWER_EDGE * edge, send_ms, cloud, RTT_MS)).edge_nodes

    def answer(self, edge_nodes: frozenset[int], inputs: Any) -> Any:
        """Return the tree of outputs of a cut; the boundary tensors become bytes and tensors again."""
        graph = self.graph
        tensors = trees.take_apart(arguments_of(inputs), lambda value: isinstance(value, Tensor))[1]
        given = [as_array(tensor.clone()) for tensor in tensors]
        edge = self._network.partition(edge_nodes, Side.EDGE).run(given)
        assert edge is not None
        sent = sum(len(node.outputs) for node in graph.boundary(edge_nodes))
        replied: Sequence[Any] = ()
        if len(edge_nodes) < len(graph.nodes):
            received = [unpack_array(*_packed(array)) for array in edge.arrays[:sent]]
            cloud = self._network.partition(edge_nodes, Side.CLOUD).run(received)
            assert cloud is not None
            replied = cloud.arrays
        arrays = graph.assemble(edge_nodes, edge.arrays[sent:], replied)
        return trees.put_together(graph.output_template, [as_tensor(array) for array in arrays])


def _packed(array: Any) -> tuple[Any, memoryview]:
    spec, content = pack_array(array)
    return spec, memoryview(bytearray(content))


# ---------------------------------------------------------------- the verdict


def judge(family: str, network: Hard, *, as_file: bool = True) -> dict[str, Any]:
    """Return the row of one network: what came out, and whether it is what its user wants.

    Raises: Exception: the module itself does not work, although it should.
    """
    truth = eager_answer(network)
    if isinstance(truth, Exception) and network.wanted != REFUSED:
        raise truth
    row: dict[str, Any] = {"family": family, "name": network.name, "wanted": network.wanted}
    try:
        row |= _judged(family, network, truth, as_file)
    except InternalError as exc:
        row |= {"verdict": "crash", "message": f"InternalError: {exc}"}
    except NeurosurgeonError as exc:
        row |= {"verdict": "refused", "message": f"{type(exc).__name__}: {exc}", "lacks": lacking(str(exc))}
    except Exception as exc:  # a defect of any kind
        row |= {"verdict": "crash", "message": f"{type(exc).__name__}: {exc}"[:500]}
    row["as_wanted"] = _is_wanted(network, row)
    return row


def _judged(family: str, network: Hard, truth: Any, as_file: bool) -> dict[str, Any]:
    subject = Subject(family, network, as_file=as_file)
    start_ms = now_ms()
    graph = subject.trace()
    row = {"trace_s": round(ms_to_s(now_ms() - start_ms), 2), "nodes": len(graph.nodes), "tracer": graph.tracer}
    start_ms = now_ms()
    subject.open()
    row["open_s"] = round(ms_to_s(now_ms() - start_ms), 2)
    if isinstance(truth, Exception):
        subject.answer(subject.graph.edge_nodes(0), network.inputs)
        return row | {"verdict": "wrong", "message": f"the module itself raises {type(truth).__name__}: {truth}"[:500]}
    cuts = subject.cuts()
    worst, reason, cut, inputs = _worst(subject, network, cuts, truth)
    row |= {"difference": worst, "cuts": len(cuts), "on_edge": len(cut)}
    if worst <= tolerance_of(network, truth):
        return row | {"verdict": "right"}
    if math.isfinite(worst) and _is_sensitive(family, replace(network, inputs=inputs), cut, worst, as_file):
        return row | {"verdict": "right", "sensitive": True}
    return row | {"verdict": "wrong", "message": reason}


def _worst(subject: Subject, network: Hard, cuts: list[frozenset[int]], truth: Any) -> tuple[Any, ...]:
    """Return the largest difference, where it is, its cut and its inputs.

    The best cut gets the example and other inputs of the same shapes; the random cuts get them by turns.
    """
    pairs = [(network.inputs, truth)]
    drawn = others(network.inputs)
    expected = eager_answer(replace(network, inputs=drawn))
    if not isinstance(expected, Exception):  # lengths, say, cannot have any values
        pairs.append((drawn, expected))
    runs = [(cuts[0], pair) for pair in pairs]
    runs += [(cut, pairs[number % len(pairs)]) for number, cut in enumerate(cuts[1:])]
    found = [(*difference(answer, subject.answer(cut, inputs)), cut, inputs) for cut, (inputs, answer) in runs]
    return max(found, key=lambda run: run[0])


def _is_sensitive(family: str, network: Hard, cut: frozenset[int], apart: float, as_file: bool) -> bool:
    """Return whether rounding alone explains a difference: the module enlarges it, and in float64 there is none."""
    moved = difference(eager_answer(network), eager_answer(network, moved=True))[0]
    if apart > SENSITIVE * moved or family == BY_NAME:  # the engine opens no known name in float64
        return apart <= SENSITIVE * moved
    try:
        subject = Subject(family, network, as_file=as_file, is_double=True)
        subject.open()
        expected = eager_answer(network, is_double=True)
        return difference(expected, subject.answer(cut, doubled(network.inputs)))[0] <= FLOAT64_TOLERANCE
    except Exception:  # a network may have constants of its own type
        return False


def _is_wanted(network: Hard, row: Mapping[str, Any]) -> bool:
    if row["verdict"] == "right":
        return network.wanted != REFUSED
    is_named = re.search(network.refusal, row.get("message", ""), re.IGNORECASE) is not None
    return row["verdict"] == "refused" and network.wanted != RIGHT and is_named


def lacking(message: str) -> list[str]:
    """Return what a refusal does not name, of the line of the user's code and the cure."""
    return [part for part, pattern in (("line", LINE), ("cure", CURE)) if not pattern.search(message)]


# ---------------------------------------------------------------- the user's module


def built(network: Hard) -> nn.Module:
    """Return a new module in evaluation mode; its random parameters are those that the engine draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONSTRUCTION_SEED)
        return network.build().eval()


def eager_answer(network: Hard, *, moved: bool = False, is_double: bool = False) -> Any:
    """Return what the user's module returns, or the error that it raises.

    Args: moved: change the input a little. is_double: compute in float64.
    """
    try:
        module = built(network)
        module = module.double() if is_double else module
        inputs = doubled(network.inputs) if is_double else copy.deepcopy(network.inputs)
        args, named = _changed(arguments_of(inputs), lambda tensor: tensor * MOVED) if moved else arguments_of(inputs)
        with torch.inference_mode():
            return _kept(module(*args, **named))
    except Exception as exc:
        return exc


def _kept(answer: Any) -> Any:
    """Return a copy of an answer, which a later run may change; itself if it cannot be copied."""
    try:
        return copy.deepcopy(answer)
    except Exception:  # a generator, say
        return answer


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of forward, by position and by name."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def doubled(inputs: Any) -> Any:
    """Return inputs with their floating-point tensors in float64."""
    return _changed(inputs, Tensor.double)


def others(inputs: Any) -> Any:
    """Return other inputs of the same shapes and types: negative numbers, and the rest in the reverse order."""
    template, tensors = trees.take_apart(inputs, lambda value: isinstance(value, Tensor))
    return trees.put_together(
        template, [tensor.flip(-1) if tensor.dim() else tensor for tensor in map(_negated, tensors)]
    )


def _negated(tensor: Tensor) -> Tensor:
    return tensor * -1.5 if tensor.is_floating_point() or tensor.is_complex() else tensor


def _changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    template, tensors = trees.take_apart(tree, lambda value: isinstance(value, Tensor))
    return trees.put_together(
        template, [change(tensor) if tensor.is_floating_point() else tensor.clone() for tensor in tensors]
    )


# ---------------------------------------------------------------- comparison


def tolerance_of(network: Hard, truth: Any) -> float:
    """Return the largest difference of equal outputs in the types of a network."""
    tensors = trees.take_apart((truth, network.inputs), lambda value: isinstance(value, Tensor))[1]
    types = {tensor.dtype for tensor in (*tensors, *built(network).state_dict().values()) if isinstance(tensor, Tensor)}
    return max((HALF_TOLERANCES.get(dtype, TOLERANCE) for dtype in types), default=TOLERANCE)


def difference(expected: Any, given: Any, place: str = "output") -> tuple[float, str]:
    """Return the largest relative difference of two trees, and where it is; infinite if anything else differs."""
    if isinstance(expected, Tensor) and isinstance(given, Tensor):
        return _tensor_difference(expected, given, place)
    if type(expected) is not type(given):
        return math.inf, f"{place} is a {type(given).__name__}, expected a {type(expected).__name__}"
    pairs = _parts(expected), _parts(given)
    if pairs[0] is None or pairs[1] is None:
        is_same = expected == given or repr(expected) == repr(given)
        return (0.0, "") if is_same else (math.inf, f"{place} is {given!r}, expected {expected!r}"[:300])
    if list(pairs[0]) != list(pairs[1]):
        return math.inf, f"{place} has the parts {list(pairs[1])}, expected {list(pairs[0])}"[:300]
    found = [difference(part, pairs[1][key], f"{place}[{key!r}]") for key, part in pairs[0].items()]
    return max(found, default=(0.0, ""))


def _parts(tree: Any) -> dict[Any, Any] | None:
    """Return the parts of a container by key; None for anything else."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, set | frozenset):
        return dict(enumerate(sorted(tree, key=repr)))
    return dict(enumerate(tree)) if isinstance(tree, tuple | list) else None


def _tensor_difference(expected: Tensor, given: Tensor, place: str) -> tuple[float, str]:
    if (expected.shape, expected.dtype) != (given.shape, given.dtype):
        return math.inf, (
            f"{place} is {given.dtype} {tuple(given.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    if not expected.numel():
        return 0.0, ""
    if not (expected.is_floating_point() or expected.is_complex()):
        share = (expected != given).double().mean().item()
        return share, f"{place}: {share:.2g} of its integers differ"
    one, other = (tensor.to(torch.complex128) for tensor in (expected, given))
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)) or repr(one[~finite].tolist()) != repr(other[~finite].tolist()):
        return math.inf, f"{place} has values that are not finite at other places"
    if not finite.any():
        return 0.0, ""
    absolute = (one - other)[finite].abs().max().item()
    largest = one[finite].abs().max().item()
    relative = absolute / largest if largest else absolute
    return relative, f"{place} differs by {relative:.2g} of the largest value"
