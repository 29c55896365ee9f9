"""Tracing of a module to a torch.fx program with the shape of every result.

Modules of the user are traced by `torch.export`, which has one meaning for all that Python can do (`exporting`). If it
fails, torch.fx is tried, which records what the module's code does with symbols. Networks that are known by name are
traced by torch.fx: it keeps modules whole and runs them without data, and does not import torch.export's compiler.
"""

from __future__ import annotations

import copy
import logging
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from neurosurgeon.graph.trees import put_together, take_apart
from neurosurgeon.models.exporting import explain, exported
from neurosurgeon.models.program import (
    CONSTANTS,
    Example,
    Program,
    attribute_named,
    check_no_chance,
    drop_dead,
    first_line,
    function_name,
    has_attribute,
    is_known,
    line_of_error,
    outputs_apart,
    outputs_of,
    record_result,
)
from neurosurgeon.models.shapes import ResultRecorder, ShapeRecorder
from neurosurgeon.utils.errors import InputSizeError, TraceError

log = logging.getLogger(__name__)

_TRACING_LOCK = threading.Lock()  # tracing replaces nn.Module.__call__ for the whole process


def trace_known(model: nn.Module, name: str, example: Example) -> Program:
    """Return the program of a network that is known by name; the module may be on the meta device.

    May block while another thread traces. Raises: TraceError. InputSizeError: it cannot take an input of this size.
    """
    skeleton = meta_copy(model)
    with _TRACING_LOCK:
        tracer = _Tracer(example, has_data=False)
        traced = _traced(skeleton, tracer)
    recorder = ShapeRecorder(traced)
    try:
        with torch.inference_mode(), torch.device("meta"):
            recorder.run(*(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in example.tensors))
    except Exception as exc:
        raise InputSizeError(f"{_cannot_take(name, example)}: {recorder.current}: {first_line(exc)}") from exc
    return _symbolic_program(traced, skeleton, name, example, tracer)


def trace_own(model: nn.Module, name: str, example: Example) -> Program:
    """Return the program of a module of the user, as it is: with its weights and in its mode. It is not changed.

    May block while another thread traces.

    Raises: TraceError: its control flow depends on data, it keeps state, or draws random numbers; names the line.
            InputSizeError: the module itself fails on this input.
    """
    _check_complete(model, name)
    with _TRACING_LOCK:
        try:
            program = exported(model, name, example)
        except TraceError:
            raise
        except Exception as failure:  # a module may fail in any way on a tensor without a value
            log.debug("torch.export cannot trace %s (%s); trying torch.fx", name, failure)
            _check_runs(model, name, example)
            program = _traced_on_data(model, name, example, failure)
    check_no_chance(program.graph, name)
    return program


def _check_complete(model: nn.Module, name: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"{name} is TorchScript, which cannot be split: give the Python module from which it was made")
    for part, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise TraceError(
                f"{name} has no weights: {part} is on the meta device or not initialised; build it in full"
            )


def _check_runs(model: nn.Module, name: str, example: Example) -> None:
    """Run a module once, to tell a module that fails from one that cannot be traced. Raises: InputSizeError."""
    try:
        run_module(model, example.template, [tensor.clone() for tensor in example.tensors])
    except Exception as exc:
        part = _failing_part(model, exc)
        raise InputSizeError(f"{_cannot_take(name, example)}{line_of_error(exc)}: {part}{first_line(exc)}") from exc


def _failing_part(model: nn.Module, exc: BaseException) -> str:
    """Return the name of the innermost part of a module in which an error was raised, as "NAME: "; or ""."""
    names = {id(part): name for name, part in model.named_modules()}
    found, step = "", exc.__traceback__
    while step is not None:
        found = names.get(id(step.tb_frame.f_locals.get("self")), found)
        step = step.tb_next
    return f"{found}: " if found else ""


def run_module(model: nn.Module, template: Any, tensors: list[Tensor]) -> Any:
    """Return what a module returns for the tensors of its arguments."""
    args, kwargs = put_together(template, tensors)
    with torch.inference_mode():
        return model(*args, **kwargs)


def _cannot_take(name: str, example: Example) -> str:
    tensors = example.tensors
    if len(tensors) == 1 and tensors[0].dim() == 4:
        return f"{name} cannot take an input of {'x'.join(map(str, tensors[0].shape[2:]))}"
    said = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors)
    return f"{name} cannot take an input of {said}"


# ---------------------------------------------------------------- modules without memory


class _WithoutStorage(TorchFunctionMode):
    """Allocates uninitialised memory, which modules use for their parameters, on the meta device.

    Tensors that modules compute while they are built (indices, masks) have data.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that ``build`` makes, with parameters that have shapes but no memory."""
    with _WithoutStorage():
        return build().eval()


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose parameters and buffers are on the meta device; no memory is copied."""
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


# ---------------------------------------------------------------- torch.fx


class _Tracer(fx.Tracer):
    """Traces a module with the arguments of an example; modules that other threads call run as usual."""

    def __init__(self, example: Example, *, has_data: bool) -> None:
        super().__init__()
        # Without data, no value may be computed from a buffer. With it, decisions by a buffer can be followed.
        self.proxy_buffer_attributes = not has_data
        self._thread = threading.get_ident()
        self._example = example
        self.output_template: Any = None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make each tensor of the example an input, and return the tensors of the outputs."""
        names = [f"x{number}" if number else "x" for number in range(len(self._example.tensors))]
        root: Any = self.root

        def run(*proxies: Any) -> tuple[Any, ...]:
            args, kwargs = put_together(self._example.template, proxies)
            made = root._call_impl(*args, **kwargs)  # with its hooks
            self.output_template, outputs = outputs_apart(made, (fx.Proxy, Tensor))
            return tuple(outputs)

        return run, [self.create_proxy("placeholder", name, (), {}) for name in names]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call, or run it if another thread makes it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole."""
        return isinstance(m, torch.jit.ScriptModule) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, tracer: _Tracer) -> fx.GraphModule:
    """Return the program of a module, with the tensors that forward makes; torch.fx leaves them in the module, too."""
    before = set(vars(model))
    try:
        return fx.GraphModule(model, tracer.trace(model))
    finally:
        for name in vars(model).keys() - before:
            delattr(model, name)


def _traced_on_data(model: nn.Module, name: str, example: Example, failure: Exception) -> Program:
    """Return the program of torch.fx, with the shapes of a run on the example.

    Raises: TraceError: explains why torch.export failed.
    """
    try:
        tracer = _Tracer(example, has_data=True)
        traced = _traced(model, tracer)
        with torch.inference_mode():
            ResultRecorder(traced).run(*(tensor.clone() for tensor in example.tensors))
        return _symbolic_program(traced, model, name, example, tracer)
    except Exception as exc:
        log.debug("torch.fx cannot trace %s, either: %s", name, exc)
        raise TraceError(explain(failure, name)) from failure


def _symbolic_program(traced: fx.GraphModule, root: nn.Module, name: str, example: Example, tracer: _Tracer) -> Program:
    graph = traced.graph
    template = _flat_outputs(graph, tracer.output_template)
    _separate_in_place(traced, name)
    drop_dead(graph)
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    values = {target: attribute_named(traced, target) for target in targets}
    constants = {target: value for target, value in values.items() if not has_attribute(root, target)}
    return Program(graph, traced, values, constants, example.template, template, "torch.fx")


def _flat_outputs(graph: fx.Graph, template: Any) -> Any:
    """Let a program return tensors alone, and return the template of all outputs.

    The result of a module that stays whole may be a tuple. Raises: TraceError: it is anything else without a tensor.
    """
    output = graph.output_node()
    flat: list[fx.Node] = []
    parts: list[Any] = []
    with graph.inserting_before(output):
        for node in outputs_of(graph):
            part = _taken_apart(graph, node)
            part, tensors = take_apart(part, lambda value: isinstance(value, fx.Node))
            parts.append(put_together(part, [_Position(len(flat) + index) for index in range(len(tensors))]))
            flat += tensors
    output.args = (tuple(flat),)
    tree = put_together(template, parts)
    return take_apart(tree, lambda value: isinstance(value, _Position))[0]


class _Position(int):
    """The position of a tensor in the outputs of a program."""


def _taken_apart(graph: fx.Graph, node: fx.Node) -> Any:
    """Return the operations of the tensors of a result, in its own lists and tuples."""
    if "spec" in node.meta:
        return node
    value = node.meta.get("value")
    if isinstance(value, CONSTANTS) and not is_known(node):
        raise TraceError(f"the network returns a number that depends on data: {node.name}; return it as a tensor")
    if isinstance(value, CONSTANTS):
        return value
    if not isinstance(value, tuple | list):
        raise TraceError(f"{node.name} returns a {type(value).__name__}, which cannot be taken apart")
    items = []
    for index, item in enumerate(value):
        taken = graph.call_function(operator.getitem, (node, index))
        record_result(taken, item)
        items.append(_taken_apart(graph, taken))
    return type(value)(items) if type(value) in (tuple, list) else tuple(items)


# ---------------------------------------------------------------- changes in place


def _separate_in_place(traced: fx.GraphModule, name: str) -> None:
    """Let in-place operations work on a copy if their operand is read elsewhere; later readers read the result.

    Partitions on two machines share no memory, so no operation may rely on shared memory.

    Raises: TraceError: a part of a tensor is changed, and another part of it is read later.
    """
    order = {node: position for position, node in enumerate(traced.graph.nodes)}
    bases = {node: _base(node, traced) for node in order}
    for node in list(order):
        operand = node.args[0] if node.args else None
        if not isinstance(operand, fx.Node) or not _works_in_place(node, traced):
            continue
        base = bases[operand]
        aliases = [other for other in order if bases[other] is base]
        readers = {user for alias in aliases for user in alias.users if bases.get(user) is not base} - {node}
        later = {user for user in readers if order.get(user, -1) > order[node]}
        for user in later:
            for read in user.all_input_nodes:
                if bases[read] is base and _base(read, traced, IDENTITIES) is not _base(operand, traced, IDENTITIES):
                    raise TraceError(
                        f"{name} cannot be split: {node.name} changes a tensor in place of which {user.name} reads "
                        "another part; make a new tensor instead"
                    )
                if bases[read] is base:
                    user.replace_input_with(read, node)
        if readers - later or base.op in ("placeholder", "get_attr"):
            with traced.graph.inserting_before(node):
                copied = traced.graph.call_method("clone", (operand,))
            copied.meta.update(operand.meta)
            node.replace_input_with(operand, copied)


IDENTITIES = ("identity", "dropout", "stochastic_depth", "stochasticdepth", "detach")
VIEWS = (
    *IDENTITIES,
    *"view reshape flatten permute transpose swapaxes movedim squeeze unsqueeze expand chunk split unbind".split(),
    *"getitem narrow select slice contiguous unflatten t".split(),
)
IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv")


def _name_of_call(node: fx.Node, traced: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))).__name__.lower()
    return function_name(node)


def _works_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    name = function_name(node)
    is_method = name.endswith("_") and not name.endswith("__")
    is_requested = node.kwargs.get("inplace") is True or (name in ("relu", "relu6") and node.args[1:2] == (True,))
    return "spec" in node.meta and (is_method or is_requested or name in IN_PLACE_OPERATORS)


def _base(node: fx.Node, traced: fx.GraphModule, names: tuple[str, ...] = VIEWS) -> fx.Node:
    """Return the node whose memory a node may share, through operations with those names."""
    while node.args and isinstance(node.args[0], fx.Node) and _name_of_call(node, traced) in names:
        node = node.args[0]
    return node
