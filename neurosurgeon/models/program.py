"""The traced program of a module: operations with the shape of every result, inputs and outputs, and its tensors."""

from __future__ import annotations

import operator
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves

from neurosurgeon.graph.spec import (
    COLOURS,
    ITEM_BYTES,
    NO_TENSOR,
    UNKNOWN,
    TensorSpec,
)
from neurosurgeon.graph.trees import Leaf, map_leaves, take_apart
from neurosurgeon.models.preprocess import random_input
from neurosurgeon.utils.errors import TraceError

Symbol = SymInt | SymFloat | SymBool  # a number that is known only when the program runs
READS_DATA = ("item", "tolist", "numpy", "nonzero")  # methods whose result depends on the values of a tensor
ASSERTIONS = (
    *"_assert _assert_async _assert_tensor_metadata _assert_scalar _guards_fn".split(),
    *"sym_constrain_range sym_constrain_range_for_size".split(),
)  # of shapes, which are the same at every run
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@dataclass(frozen=True)
class Example:
    """The arguments with which a module is traced: a template of (args, kwargs), and its tensors."""

    template: Any
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]  # of the tensors, as a user names them
    is_image: bool = False  # one image of noise, because the user gave no example

    @classmethod
    def of(cls, inputs: Any) -> Example:
        """Return the example of a tuple or list of arguments, of a dict of keyword arguments, or of one argument.

        Raises: TraceError: there is no tensor in them.
        """
        if isinstance(inputs, dict):
            arguments: Any = ((), inputs)
        else:
            arguments = (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})
        template, tensors = take_apart(arguments, lambda value: isinstance(value, Tensor))
        if not tensors:
            raise TraceError("the example of the inputs holds no tensor: return the arguments of forward")
        return cls(template, tuple(tensors), tuple(_names(arguments, tensors)))

    @classmethod
    def of_image(cls, size: int) -> Example:
        """Return the example of a network that takes one image, (1, 3, size, size): noise."""
        values = random_input((1, COLOURS, size, size))
        return cls(((Leaf(0),), {}), (values,), ("0",), is_image=True)

    def drawn(self, seed: int) -> list[Tensor]:
        """Return other tensors of the same shapes, types and ranges.

        Of an image, noise; of other tensors, their own values: integers and truth values in another order, others
        with the same mean and deviation.
        """
        generator = torch.Generator().manual_seed(seed)
        return [_drawn_like(tensor, generator) for tensor in self.tensors]


def _drawn_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.numel():
        return tensor.clone()
    if tensor.is_floating_point():
        values = tensor.double()
        deviation = values.std().item() if tensor.numel() > 1 else 0.0
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * deviation + values.mean()
        return drawn.clamp(values.min(), values.max()).to(tensor.dtype)
    order = torch.randperm(tensor.numel(), generator=generator)
    return tensor.reshape(-1)[order].reshape(tensor.shape).clone()


def _names(arguments: tuple[tuple[Any, ...], Mapping[str, Any]], tensors: Sequence[Tensor]) -> list[str]:
    """Return a name for each tensor: its keyword, or its position."""
    places = [(str(number), value) for number, value in enumerate(arguments[0])] + list(arguments[1].items())
    names: dict[int, str] = {}
    for place, value in places:
        inside = take_apart(value, lambda each: isinstance(each, Tensor))[1]
        for number, tensor in enumerate(inside):
            names.setdefault(id(tensor), place if len(inside) == 1 else f"{place}.{number}")
    return [names[id(tensor)] for tensor in tensors]


CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, Enum)


def outputs_apart(made: Any, kinds: tuple[type, ...] = (Tensor,)) -> tuple[Any, list[Any]]:
    """Return the template of what a module returned, and its tensors.

    Containers that others have registered with torch's pytree become lists, and other objects (caches of language
    models, say) dicts of their attributes.

    Args:   kinds: what counts as a tensor.
    Raises: TraceError: there is an object in it that is no tensor, container or constant.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (*kinds, *CONSTANTS)):
            return value
        if registered := SUPPORTED_NODES.get(type(value)):
            return map_leaves(list(registered.flatten_fn(value)[0]), plain)
        if hasattr(value, "__dict__") and not callable(value) and id(value) not in seen:
            seen.add(id(value))
            return map_leaves({name: item for name, item in vars(value).items() if not name.startswith("_")}, plain)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TraceError(f"the network returns a {kind}: expected tensors, numbers, and containers of them")

    seen: set[int] = set()

    return take_apart(map_leaves(made, plain), lambda value: isinstance(value, kinds))


@dataclass(frozen=True)
class Program:
    """The program of a module; the results of its operations are in their ``meta``, see `record_result`.

    ``values`` holds what the operation ``get_attr`` reads, by target. No operation changes a tensor in place that is
    read elsewhere.
    """

    graph: fx.Graph
    root: nn.Module  # holds the modules that the program calls
    values: Mapping[str, Any]
    constants: Mapping[str, Any]  # those of ``values`` that the module does not have: made while it was traced
    input_template: Any
    output_template: Any
    tracer: str  # "torch.fx" or "torch.export"

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The operations of its inputs."""
        return tuple(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The operations of its outputs, in the order of the template."""
        return outputs_of(self.graph)

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that an operation calls; None if it calls a function."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def outputs_of(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Return the operations of the outputs of a program."""
    outputs: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
    return outputs


def attribute_named(root: nn.Module, target: str) -> Any:
    """Return the attribute of a module with a dotted name."""
    return operator.attrgetter(target)(root)


def has_attribute(root: nn.Module, target: str) -> bool:
    """Return whether a module has an attribute with a dotted name."""
    try:
        attribute_named(root, target)
    except AttributeError:
        return False
    return True


# ---------------------------------------------------------------- operations and their results


def function_name(node: fx.Node) -> str:
    """Return the name of a function, the same for torch's function, method, operator and torch.export's operator."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name if node.op == "call_module" else name.split(".")[0]


def spec_of(fx_node: fx.Node) -> TensorSpec:
    """Return the spec of the tensor that a traced operation makes; `NO_TENSOR` for any other result."""
    spec: TensorSpec = fx_node.meta.get("spec", NO_TENSOR)
    return spec


def is_known(fx_node: fx.Node) -> bool:
    """Return whether the result of an operation is known without running it: a size, a type, or None."""
    if "value" not in fx_node.meta or function_name(fx_node) in READS_DATA:
        return False
    return not any(isinstance(leaf, Tensor | nn.Module | Symbol) for leaf in tree_leaves(fx_node.meta["value"]))


def tensor_spec(tensor: Tensor) -> TensorSpec:
    """Return the shape and the type of a tensor; a size that depends on data is `UNKNOWN`."""
    sizes = (size if isinstance(size, int) else size.node.maybe_as_int() for size in tensor.shape)
    shape = tuple(UNKNOWN if size is None else int(size) for size in sizes)
    return TensorSpec(shape, str(tensor.dtype).removeprefix("torch."))


def record_result(node: fx.Node, result: Any) -> None:
    """Store the `TensorSpec` of a tensor in its node's ``meta["spec"]``, any other result in ``meta["value"]``."""
    if isinstance(result, Tensor):
        node.meta["spec"] = spec = tensor_spec(result)
        if spec.dtype not in ITEM_BYTES or result.layout is not torch.strided:
            kind = spec.dtype if spec.dtype not in ITEM_BYTES else str(result.layout).removeprefix("torch.")
            raise TraceError(f"{node.name}{line_of(node)} makes a tensor of {kind}, which cannot be sent: convert it")
    else:
        node.meta["value"] = result


# ---------------------------------------------------------------- lines of the user's code


def line_of(node: fx.Node) -> str:
    """Return the last line of the user's own code that led to an operation, as " (FILE, line N: `code`)"; or ""."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    return _last_own_line(lines)


def line_of_error(exc: BaseException) -> str:
    """Return the last line of the user's own code that an error passed, as `line_of`."""
    frames = traceback.extract_tb(exc.__traceback__)
    return _last_own_line([(frame.filename, frame.lineno, frame.line) for frame in frames])


def _last_own_line(lines: Iterable[tuple[str, Any, str | None]]) -> str:
    known = [entry for entry in lines if not entry[0].startswith(_LIBRARIES)]
    own = [entry for entry in known if "site-packages" not in entry[0]] or known  # or of another package
    if not own:
        return ""
    file, number, code = own[-1]
    return f" ({file}, line {number}: `{(code or '').strip()}`)"


def first_line(exc: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    text = str(exc).strip()
    return text.splitlines()[0].rstrip(".") if text else type(exc).__name__


# ---------------------------------------------------------------- cleaning and checks


RANDOM = re.compile(
    "_?(rand|normal|bernoulli|multinomial|binomial|poisson|uniform|exponential|geometric|cauchy|log_normal|"
    "(native_|alpha_|feature_|fused_)?dropout|rrelu_with_noise)"
)


def _draws(node: fx.Node) -> bool:
    """Return whether an operation draws random numbers; a dropout may be switched off by an argument."""
    name = function_name(node)
    if not RANDOM.match(name):
        return False
    return "dropout" not in name or any(argument is True for argument in (*node.args[1:], *node.kwargs.values()))


def drop_dead(graph: fx.Graph) -> None:
    """Remove checks of shapes and results that are not read."""
    for node in reversed(list(graph.nodes)):
        if function_name(node) in ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def check_no_chance(graph: fx.Graph, name: str) -> None:
    """Check that a program draws no random numbers. Raises: TraceError: names the operation and its line."""
    for node in graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise TraceError(
                f"{name} draws random numbers in forward: {function_name(node)}{line_of(node)}; its answer is another "
                "one at every run: draw them outside, and pass them as an input"
            )
