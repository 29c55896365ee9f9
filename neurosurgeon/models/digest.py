"""The digest of a network's structure: two networks that compute different things have different digests."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, device, dtype, fx, layout, memory_format, nn
from torch.fx.node import map_arg

from neurosurgeon.graph.spec import NO_TENSOR, Preprocessing
from neurosurgeon.models.program import Program

DIGEST_HEX_CHARS = 32  # 128 bits, as of the weights
HOOK_SETTINGS = ("hooks", "hooks_with_kwargs", "hooks_always_called")
PLAIN = (str, bytes, int, float, complex, range, slice, Path, Enum, dtype, layout, memory_format)
# Settings of modules that no answer depends on.
NO_SETTINGS = {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_is_full_backward_hook",
    "_non_persistent_buffers_set",
}


def graph_digest(program: Program, preprocessing: Preprocessing) -> str:
    """Return 128 bits of SHA-256 over a network's structure, without its weights.

    It covers the operations in their order, with their settings, constants and inputs, the shapes and types of their
    results, the outputs, and how pixels become values. Of a module that is called it covers all settings, and the
    code of its hooks; of a function of the user, its code.
    """
    total = hashlib.sha256()
    for line in _lines(program.graph, program.root, program.values):
        total.update(f"{line}\n".encode())
    total.update(f"{stable_text(program.input_template)} {stable_text(program.output_template)}".encode())
    total.update(f"{preprocessing.mean} {preprocessing.std}".encode())
    return total.hexdigest()[:DIGEST_HEX_CHARS]


def _lines(graph: fx.Graph, root: nn.Module | None, values: Mapping[str, Any]) -> Iterable[str]:
    positions = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        arguments = map_arg((node.args, node.kwargs), lambda read: positions[read])
        yield f"{_operation(node, root)} {stable_text(arguments)} {node.meta.get('spec', NO_TENSOR)}"
        value = values.get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, fx.GraphModule):  # a branch of torch.cond
            yield from _lines(value.graph, value, {})


def _operation(node: fx.Node, root: nn.Module | None) -> str:
    """Return the name of the function or module that a traced node calls, with its settings."""
    if node.op == "call_module" and root is not None:
        return f"{node.target} {stable_text(root.get_submodule(str(node.target)))}"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}" if node.op != "placeholder" else node.op
    return stable_text(node.target)


def stable_text(value: Any, inside: tuple[int, ...] = ()) -> str:
    """Return a text of a value, of a module its code and settings; it is the same in every process.

    Tensors are left to the digest of the weights.
    """
    if id(value) in inside:
        return "..."
    inside = (*inside, id(value))
    if value is None or isinstance(value, PLAIN):
        return repr(value)
    for kind, describe in _KINDS.items():
        if isinstance(value, kind):
            return describe(value, inside)
    if callable(value) and hasattr(value, "__name__"):  # of torch or Python
        return str(value.__name__)
    text = "" if " at 0x" in repr(value) else repr(value)
    return f"{type(value).__qualname__}{_mapping(getattr(value, '__dict__', {}), inside)} {text}"


def _mapping(mapping: Mapping[Any, Any], inside: tuple[int, ...]) -> str:
    return (
        f"{{{', '.join(f'{stable_text(key, inside)}: {stable_text(item, inside)}' for key, item in mapping.items())}}}"
    )


def _items(values: Iterable[Any], inside: tuple[int, ...]) -> str:
    return f"{type(values).__qualname__}({', '.join(stable_text(item, inside) for item in values)})"


def _module(module: nn.Module, inside: tuple[int, ...]) -> str:
    """Return the type and the settings of a module, and those of its parts; empty hooks are left out."""
    settings = {
        name: list(setting.values()) if name.endswith("hooks") and isinstance(setting, Mapping) else setting
        for name, setting in vars(module).items()
        if name not in NO_SETTINGS and not (name.startswith("_") and name.endswith(HOOK_SETTINGS) and not setting)
    }
    own = ", ".join(f"{name}={stable_text(setting, inside)}" for name, setting in sorted(settings.items()))
    parts = ", ".join(f"{name}: {stable_text(part, inside)}" for name, part in module.named_children())
    return f"{_type(type(module), inside)}({own})({parts})"


def _type(kind: type, inside: tuple[int, ...]) -> str:
    """Return the name of a type; of a type of the user also the code of its methods, and its bases."""
    if kind.__module__.split(".")[0] in ("torch", "torchvision", "builtins"):
        return kind.__qualname__
    members = [_plain_function(value) for value in vars(kind).values()]
    methods = [_function(member, inside) for member in members if inspect.isfunction(member)]
    bases = [_type(base, inside) for base in kind.__bases__]
    return f"{kind.__qualname__}({', '.join(bases)})<{', '.join(methods)}>"


def _plain_function(member: Any) -> Any:
    """Return the function of a method of any sort, and of a property."""
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def _function(function: Any, inside: tuple[int, ...]) -> str:
    """Return the name of a function; of a function of the user also its code, defaults, and what it closes over."""
    if str(function.__module__).split(".")[0] in ("torch", "torchvision", "neurosurgeon"):
        return str(function.__qualname__)
    cells = [_content(cell) for cell in function.__closure__ or ()]
    names = function.__code__.co_names
    values = {name: function.__globals__[name] for name in names if _is_value(function.__globals__.get(name))}
    parts = (_code(function), function.__defaults__, function.__kwdefaults__, cells, values)
    return f"{function.__qualname__} {' '.join(stable_text(part, inside) for part in parts)}"


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable without a value yet
        return None


def _is_value(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | tuple | list | dict) or inspect.isfunction(value)


def _code(function: Any) -> str:
    """Return the code of a function without its comments and lines; where there is no source, its bytes."""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, SyntaxError, TypeError):
        code = function.__code__
        return f"{code.co_code.hex()} {code.co_consts!r}"


_KINDS: dict[type, Callable[[Any, tuple[int, ...]], str]] = {
    Tensor: lambda value, inside: f"tensor {value.dtype} {tuple(value.shape)}",
    np.ndarray: lambda value, inside: f"array {value.dtype} {value.shape} {value.tobytes().hex()}",
    device: lambda value, inside: "device",  # of the partition
    nn.Module: lambda value, inside: _module(value, inside),
    partial: lambda value, inside: f"partial{_items((value.func, value.args, value.keywords), inside)}",
    Mapping: lambda value, inside: _mapping(value, inside),
    list: lambda value, inside: _items(value, inside),
    tuple: lambda value, inside: _items(value, inside),
    set: lambda value, inside: _items(sorted(value, key=repr), inside),
    frozenset: lambda value, inside: _items(sorted(value, key=repr), inside),
    MethodType: lambda value, inside: f"{_function(value.__func__, inside)} of {type(value.__self__).__qualname__}",
    FunctionType: lambda value, inside: _function(value, inside),
}
