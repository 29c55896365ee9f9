"""Tracing by torch.export, which runs the module's own code on tensors without data.

So it records what the module computes, with hooks, replaced methods, autocast and all. Its program has no modules, but
operators of PyTorch, and none of them changes a tensor in place: aliases and views have one meaning.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from neurosurgeon.graph.trees import put_together
from neurosurgeon.models.program import (
    Example,
    Program,
    attribute_named,
    drop_dead,
    first_line,
    function_name,
    has_attribute,
    line_of,
    line_of_error,
    outputs_apart,
    record_result,
)
from neurosurgeon.utils.errors import TraceError

ROOT = "network."  # before the names of the module's parts
CONSTANT_ADVICE = "a partition keeps no state from task to task: pass it as an input, or compute it from the input"
DECISION_ADVICE = "choose between tensors with torch.where, or decide outside of the network"
NORMS = {"_native_batch_norm_legit_no_training": False, "_native_batch_norm_legit_functional": True}
IDENTITIES = ("clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "lift")  # where nothing changes in place
# Operations that any memory order allows, in place of views, and of signs that a tensor only remembers.
DENSE = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}
READS_ORDER = ("view_as_complex", "_fft_r2c", "_fft_c2r", "_fft_c2c")  # operations that need contiguous tensors


class _Flat(nn.Module):
    """A module whose inputs and outputs are tuples of tensors."""

    def __init__(self, network: nn.Module, template: Any, outputs: list[Any]) -> None:
        super().__init__()
        self.network = network
        self._template = template
        self._outputs = outputs  # receives the template of the outputs: torch.export forbids new attributes

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Return the tensors of the outputs."""
        args, kwargs = put_together(self._template, tensors)
        template, outputs = outputs_apart(self.network(*args, **kwargs))
        self._outputs[:] = [template]
        return tuple(outputs)


def exported(model: nn.Module, name: str, example: Example) -> Program:
    """Return the program of a module in evaluation mode; its parameters are not changed.

    Raises: TraceError: it keeps state. Anything else: torch.export cannot trace it.
    """
    outputs: list[Any] = []
    flat = _Flat(model, example.template, outputs)
    flat.training = model.training  # without train(), which would change the mode of the parts
    with torch.no_grad(), _silence():
        tensors = tuple(tensor.detach().clone() for tensor in example.tensors)
        program = torch.export.export(flat, tensors, strict=False).run_decompositions({})
        traced: Any = program.module()
    graph: fx.Graph = traced.graph
    graph.set_codegen(fx.graph.CodeGen())
    values = _without_root(graph, traced)
    graph.owning_module = None  # whose attributes have other names
    for node in graph.nodes:
        record_result(node, values[node.target] if node.op == "get_attr" else node.meta.get("val"))
    output: Any = graph.output_node()
    output.args = (tuple(output.args[0]),)
    _drop_writes(graph, set(program.graph_signature.buffers_to_mutate.values()), name)
    _simplify(graph)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    values = {target: value for target, value in values.items() if target in read}
    constants = {target: value for target, value in values.items() if not has_attribute(model, target)}
    return Program(graph, model, values, constants, example.template, outputs[0], "torch.export")


def _without_root(graph: fx.Graph, traced: nn.Module) -> dict[str, Any]:
    """Name parts of the module as the module does; return what ``get_attr`` reads, by these names."""
    values = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}  # None where an output is an input
        node.meta["nn_module_stack"] = {
            key: (entry[0].removeprefix(ROOT.rstrip(".")).removeprefix("."), *entry[1:]) for key, entry in stack.items()
        }
        if node.op == "get_attr":
            value = attribute_named(traced, str(node.target))
            node.target = str(node.target).removeprefix(ROOT)
            values[node.target] = value
    return values


def _drop_writes(graph: fx.Graph, changed: set[str], name: str) -> None:
    """Remove the writes to inputs and buffers at the end; inputs are the program's own.

    Raises: TraceError: the answer depends on a buffer that a run changes.
    """
    changed = {target.removeprefix(ROOT) for target in changed}
    writes = {}
    for node in list(graph.nodes):
        if function_name(node) == "copy_":
            node.replace_all_uses_with(node.args[1])
            written = node.args[0]
            if written.op == "get_attr":
                writes[str(written.target)] = node.args[1]
            graph.erase_node(node)
    _simplify_norms(graph)
    drop_dead(graph)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in changed:
            change = writes.get(str(node.target))
            where = line_of(change) if isinstance(change, fx.Node) else ""
            raise TraceError(f"{name} keeps state: forward changes its buffer {node.target}{where}; {CONSTANT_ADVICE}")


def _simplify(graph: fx.Graph) -> None:
    """Remove copies, which are needed only where tensors change in place, and let views take any memory order."""
    for node in list(graph.nodes):
        called = function_name(node)
        if called in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in DENSE:
            node.target = DENSE[node.target]
        elif called in READS_ORDER or node.target is torch.ops.aten.view.dtype or _reads_strides(node):
            _make_contiguous(graph, node)
    drop_dead(graph)


def _reads_strides(node: fx.Node) -> bool:
    """Return whether an operation reads memory by strides, of a tensor that was contiguous when it was traced."""
    read: Any = node.args[0] if node.args else None
    made = read.meta.get("val") if isinstance(read, fx.Node) else None
    return function_name(node) == "as_strided" and isinstance(made, Tensor) and made.is_contiguous()


def _make_contiguous(graph: fx.Graph, node: fx.Node) -> None:
    read: Any = node.args[0]
    with graph.inserting_before(node):
        copy = graph.call_method("contiguous", (read,))
    copy.meta.update({key: read.meta[key] for key in ("val", "spec", "nn_module_stack") if key in read.meta})
    node.replace_input_with(read, copy)


def _simplify_norms(graph: fx.Graph) -> None:
    """Let a batch norm be one operation with one result: the statistics that it also returns are not read."""
    for node in list(graph.nodes):
        called = function_name(node)
        if called not in NORMS or any(function_name(user) != "getitem" for user in node.users):
            continue
        read = {user.args[1]: user for user in node.users if user.users}
        if set(read) != {0}:
            continue
        x, weight, bias, mean, variance = node.args[:5]
        is_training = NORMS[called]
        momentum, epsilon = node.args[-2:]
        if is_training:
            mean = variance = None  # it uses those of its input
        with graph.inserting_before(node):
            norm = graph.call_function(
                functional.batch_norm, (x, mean, variance, weight, bias, is_training, momentum, epsilon)
            )
        norm.meta.update(read[0].meta)
        read[0].replace_all_uses_with(norm)


# ---------------------------------------------------------------- errors


def explain(exc: BaseException, name: str) -> str:
    """Return one line about a failure of torch.export: its cause, the line of the user's code, and the cure."""
    text, where = first_line(exc), line_of_error(exc)
    if constant := re.search(r"Constant (\S+) is mutated", str(exc)):
        target = constant[1].removeprefix(ROOT)
        return f"{name} keeps state: forward changes its attribute {target}{where}; {CONSTANT_ADVICE}"
    if "data-dependent" in text.lower() or "DataDependent" in type(exc).__name__:
        return f"{name} cannot be traced: its control flow depends on data{where}; {DECISION_ADVICE}"
    if "ScriptModule" in str(exc):
        return f"{name} cannot be traced: it is TorchScript{where}; give the Python module from which it was made"
    return f"{name} cannot be traced{where}: {text}; {DECISION_ADVICE}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the warnings, logs and prints of torch.export; it raises all errors."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # its loggers have handlers of their own
    discarded = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
