"""Tracing of a module to a torch.fx program with the shape of every result, without running it on data.

torch.fx is tried first: it keeps modules whole, so that batch norms can be folded. If it fails, because a decision
depends on a shape, torch.export is tried, which knows all shapes. If both fail, control flow depends on data, and the
error names the line.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from neurosurgeon.models.shapes import ShapeRecorder, function_name, record_result
from neurosurgeon.utils.errors import InputSizeError, TraceError

log = logging.getLogger(__name__)

_TRACING_LOCK = threading.Lock()  # tracing replaces nn.Module.__call__ for the whole process
_LIBRARY = str(Path(torch.__file__).parent)
ASSERTIONS = ("_assert", "_assert_tensor_metadata", "_guards_fn")  # of shapes, which are the same at every run
ADVICE = (
    "choose between tensors with torch.where, decide outside of the network, or mark the function that decides with "
    "torch.fx.wrap"
)


def trace_program(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """Return the program of ``model`` for one input, with a ``TensorSpec`` of every tensor in ``meta["spec"]``.

    Dead code and assertions are removed; no tensor is changed in place that is read elsewhere. Its modules are on the
    meta device: they have shapes, but no memory. May block while another thread traces.

    Raises: TraceError: the module's control flow depends on its data, or it has not one input and one output.
            InputSizeError: the module cannot take an input of this size.
    """
    try:
        skeleton = meta_copy(model)
        with _TRACING_LOCK:
            traced = fx.GraphModule(skeleton, _Tracer().trace(skeleton))
    except Exception as symbolic:  # a module may fail in any way on a tensor without a value
        log.debug("torch.fx cannot trace %s (%s); trying torch.export", name, symbolic)
        try:
            traced = _exported(model, input_shape)
        except Exception as exc:
            log.debug("torch.export cannot, either: %s", exc)
            raise TraceError(_explanation(name, symbolic)) from exc
    else:
        _record_shapes(traced, name, input_shape)
    _check_output(traced.graph, name)
    _separate_in_place(traced, name)
    _drop_dead(traced.graph)
    return traced


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
    return _copy_with(model, lambda tensor: tensor.detach().to("meta"))


def _copy_with(model: nn.Module, replacement: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {id(buffer): replacement(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(replacement(parameter), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


# ---------------------------------------------------------------- tracing


class _Tracer(fx.Tracer):
    """Traces a module with one input; modules that other threads call at the same time run as usual."""

    proxy_buffer_attributes = True  # buffers have no data here, so no value may be computed from them

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make the first argument the input; the others keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call, or run it if another thread makes it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _exported(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """Return the program of torch.export, with all shapes.

    Its operators change nothing in place, and its parameters are attributes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake_model = _copy_with(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        image = torch.empty(input_shape)
    with _TRACING_LOCK, torch.no_grad(), _silence():
        program: Any = torch.export.export(fake_model, (image,), strict=False).run_decompositions({}).module()
    for node in program.graph.nodes:
        made = node.meta.get("val")
        if node.op == "get_attr":
            made = _move_to_meta(program, node.target)
        elif node.target is torch.ops.aten.view.default:  # it would fail for another memory layout
            node.target = torch.ops.aten.reshape.default
        record_result(node, made)
    output = program.graph.output_node()
    if isinstance(output.args[0], tuple | list) and len(output.args[0]) == 1:
        output.args = (output.args[0][0],)
    program.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(program, program.graph)


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


def _move_to_meta(root: nn.Module, target: str) -> Any:
    path, _, leaf = target.rpartition(".")
    owner = root.get_submodule(path)
    value = getattr(owner, leaf)
    if isinstance(value, Tensor):
        empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
        value = nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
        setattr(owner, leaf, value)
    return value


def _record_shapes(traced: fx.GraphModule, name: str, input_shape: tuple[int, ...]) -> None:
    recorder = ShapeRecorder(traced)
    try:
        with torch.inference_mode(), torch.device("meta"):
            recorder.run(torch.empty(input_shape))
    except Exception as exc:
        where, reason = recorder.current, _first_line(exc)
        if isinstance(exc, NotImplementedError):  # the shape of a result depends on data
            raise TraceError(f"{name} cannot be traced: {where}: {reason}; {ADVICE}") from exc
        size = "x".join(map(str, input_shape[2:]))
        raise InputSizeError(f"{name} cannot take an input of {size}: {where}: {reason}") from exc


def _check_output(program: fx.Graph, name: str) -> None:
    result = program.output_node().args[0]
    if not isinstance(result, fx.Node):
        kind = type(result).__name__
        raise TraceError(f"{name} returns a {kind}; a network that returns one tensor is needed: wrap it in one")


def _explanation(name: str, exc: BaseException) -> str:
    """Return the message of a module that cannot be traced, with the last line of the traceback outside of torch."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith(_LIBRARY)]
    where = f"{own[-1].filename}, line {own[-1].lineno}, `{own[-1].line}`: " if own else ""
    return f"{name} cannot be traced: {where}{_first_line(exc)}; {ADVICE}"


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0].rstrip(".") if text else type(exc).__name__


# ---------------------------------------------------------------- cleaning


def _drop_dead(program: fx.Graph) -> None:
    """Remove checks of shapes and unread results, which would otherwise look like the output."""
    for node in reversed(list(program.nodes)):
        if function_name(node) in ASSERTIONS and not node.users:
            program.erase_node(node)
    program.eliminate_dead_code()


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
