"""The user's own networks: Python files with functions that return modules, each known as ``file:function``.

Only files that this process's own command line names are ever run. A name, wherever it comes from, is looked up
among what they define, and never reaches an import.
"""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

CONSTRUCTION_SEED = 0  # what a function draws at random is the same in every process

_functions: dict[str, Callable[[], Any]] = {}  # by file:function
_files: dict[str, Path] = {}  # by stem


def register_files(paths: Iterable[Path]) -> None:
    """Run model files, once each, and remember the functions and modules that need no arguments.

    Raises: UsageError: a file is missing, raises or defines no such function, or two files have one name.
    """
    for path in paths:
        resolved = path.resolve()
        if _files.get(path.stem) == resolved:
            continue
        if path.stem in _files:
            raise UsageError(f"two model files are called {path.stem}: {_files[path.stem]} and {path}; rename one")
        found = {f"{path.stem}:{name}": function for name, function in _defined_in(_run_file(path))}
        if not found:
            raise UsageError(f"model file {path} defines no function or module that takes no arguments")
        _files[path.stem] = resolved
        _functions.update(found)


def own_names() -> list[str]:
    """Return the names of all functions in the registered files."""
    return list(_functions)


def own_name(name: str) -> str | None:
    """Return the full name that ``name`` stands for: of a function, with its file or alone; None where there is none.

    Raises: UsageError: two files have a function of that name.
    """
    stem, _, function = name.rpartition(":")
    stem = stem.removesuffix(".py")
    found = [known for known in _functions if known.endswith(f":{function}") and stem in ("", known.split(":")[0])]
    if len(found) > 1:
        raise UsageError(f"{name} is in several model files: choose {' or '.join(found)}")
    return found[0] if found else None


def build_own(name: str) -> nn.Module:
    """Return a new module of the function of that full name; its random parameters are the same in every process.

    Raises: UsageError: the function raises, or returns something else.
    """
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), _one_line(_files[name.split(":")[0]]):
        torch.manual_seed(CONSTRUCTION_SEED)
        module = _functions[name]()
    if not isinstance(module, nn.Module):
        raise UsageError(f"{name} returns a {type(module).__name__}, not a torch.nn.Module")
    return module.eval()


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"model file {path} does not exist")
    from neurosurgeon.models.torchvision_compat import import_torchvision

    spec = importlib.util.spec_from_file_location(f"model_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"model file {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    with _one_line(path):
        if b"torchvision" in path.read_bytes():
            import_torchvision()  # beside a CPU build of torch, it does not import by itself
        spec.loader.exec_module(module)
    return module


def _defined_in(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a file itself defines and can be called without arguments; a class, if it is a module."""
    from torch import nn

    for name, value in vars(module).items():
        is_class = inspect.isclass(value) and issubclass(value, nn.Module)
        if name.startswith("_") or not (is_class or inspect.isfunction(value)) or value.__module__ != module.__name__:
            continue
        parameters = inspect.signature(value).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in parameters):
            yield name, value


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn whatever a user's file raises into one line that says where.

    Raises: UsageError.
    """
    try:
        yield
    except (Exception, SystemExit) as exc:
        lines = [frame.lineno for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename) == path]
        line = exc.lineno if isinstance(exc, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        text = str(exc).strip().splitlines()
        raise UsageError(f"model file {path}{where}: {type(exc).__name__}{': ' + text[0] if text else ''}") from exc
