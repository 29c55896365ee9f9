"""The user's own networks: modules, and functions in Python files that return modules, named ``file:function``.

Only files that the user names are run. A name, also one from a peer, is only looked up among the functions that these
files define: it never reaches an import.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

CONSTRUCTION_SEED = 0  # random parameters that a function draws are the same in every process

EXAMPLE, PREPARE, DRAW = "example", "prepare", "draw"  # functions of a model file that are no networks
OBJECTS = "module"  # stands for the file in the names of modules that are given as objects


class OwnModels:
    """The user's networks by full name: functions of model files (``FILE:FUNCTION``), and given modules.

    Raises: UsageError: a file is missing, raises or defines no function without arguments, or two files have one name.
    """

    def __init__(
        self,
        files: Iterable[Path] = (),
        modules: Mapping[str, nn.Module] | None = None,
        examples: Mapping[str, Any] | None = None,
    ) -> None:
        self._paths: dict[str, Path] = {}  # by stem
        self._functions: dict[str, Callable[[], Any]] = {
            f"{OBJECTS}:{name}": partial(copy.deepcopy, module) for name, module in (modules or {}).items()
        }
        self._examples: dict[str, Callable[[], Any]] = {}  # by the full name of a module, or the stem of a file
        for name, inputs in (examples or {}).items():
            self._examples[f"{OBJECTS}:{name}"] = partial(copy.deepcopy, inputs)
        self._helpers: dict[tuple[str, str], Callable[..., Any]] = {}  # by stem, and by name
        for path in {path.resolve(): path for path in files}.values():
            self._add_file(path)

    @property
    def names(self) -> list[str]:
        """The full names of all networks."""
        return list(self._functions)

    def full_name(self, name: str) -> str | None:
        """Return the full name of a function, given with its file or alone; None if there is none.

        Raises: UsageError: two files have a function of that name.
        """
        stem, _, function = name.rpartition(":")
        stem = stem.removesuffix(".py")
        found = [
            known for known in self._functions if known.endswith(f":{function}") and stem in ("", known.split(":")[0])
        ]
        if len(found) > 1:
            raise UsageError(f"{name} is in several model files: choose {' or '.join(found)}")
        return found[0] if found else None

    def build(self, name: str) -> nn.Module:
        """Return a new module from the function of a full name, in its mode; its random parameters are always the same.

        Raises: UsageError: the function raises, or does not return a module.
        """
        from torch import nn

        module = self._call(name, self._functions[name])
        if not isinstance(module, nn.Module):
            raise UsageError(f"{name} returns a {type(module).__name__}, not a torch.nn.Module")
        return module

    def example(self, name: str) -> Any:
        """Return the example of a network's inputs: a tuple, a dict of arguments by name, or one; None without any.

        Raises: UsageError: the function raises.
        """
        function = self._examples.get(name) or self._examples.get(name.split(":")[0])
        return None if function is None else self._call(name, function)

    def source(self, name: str) -> str:
        """Return the text of the model file of a network; nothing for a module, and for a network known by name."""
        path = self._paths.get(name.split(":")[0])
        return "" if path is None else path.read_text("utf-8", "replace")

    def helper(self, name: str, kind: str) -> Callable[..., Any] | None:
        """Return a function of a network's model file, `PREPARE` or `DRAW`; None if the file has none.

        What it raises becomes a UsageError.
        """
        function = self._helpers.get((name.split(":")[0], kind))
        return None if function is None else lambda *args: self._call(name, partial(function, *args))

    def _call(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function of the user; its random numbers are always the same."""
        import torch

        with torch.random.fork_rng(devices=[]), _one_line(self._paths.get(name.split(":")[0], Path())):
            torch.manual_seed(CONSTRUCTION_SEED)
            return function()

    def _add_file(self, path: Path) -> None:
        if path.stem in self._paths:
            raise UsageError(f"two model files are called {path.stem}: {self._paths[path.stem]} and {path}; rename one")
        module = _run_file(path)
        found = {f"{path.stem}:{name}": function for name, function in _defined_in(module)}
        if not found:
            raise UsageError(f"model file {path} defines no function or module that takes no arguments")
        self._paths[path.stem] = path
        self._functions.update(found)
        if callable(example := getattr(module, EXAMPLE, None)):
            self._examples[path.stem] = example
        for kind in (PREPARE, DRAW):
            if callable(function := getattr(module, kind, None)):
                self._helpers[path.stem, kind] = function


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
            import_torchvision()  # with a CPU build of torch, a plain import fails
        spec.loader.exec_module(module)
    return module


def _defined_in(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the functions and module classes that a file itself defines, if they need no arguments."""
    from torch import nn

    for name, value in vars(module).items():
        if name.startswith("_") or name in (EXAMPLE, PREPARE, DRAW):
            continue
        is_class = inspect.isclass(value) and issubclass(value, nn.Module)
        if not (is_class or inspect.isfunction(value)) or value.__module__ != module.__name__:
            continue
        parameters = inspect.signature(value).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in parameters):
            yield name, value


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn any error of a user's file into one line with its file and line number. Raises: UsageError."""
    try:
        yield
    except (Exception, SystemExit) as exc:
        lines = [frame.lineno for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename) == path]
        line = exc.lineno if isinstance(exc, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        text = str(exc).strip().splitlines()
        raise UsageError(f"model file {path}{where}: {type(exc).__name__}{': ' + text[0] if text else ''}") from exc
