"""Who may import whom: the rules of the design, read from the syntax tree of every module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "net", "predictor", "utils")  # of neurosurgeon; at the top, their names of the reference
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FOUNDATIONS = (
    "neurosurgeon.utils.errors",
    "neurosurgeon.utils.files",
    "neurosurgeon.utils.machine",
    "neurosurgeon.utils.packages",
    "neurosurgeon.utils.units",
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that run-time code imports, wherever it stands; ``from a import b`` gives a.b."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported(child)


def imports_of(source: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(source)))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SOURCES = {
    name_of(path): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *(ROOT / "neurosurgeon").rglob("*.py")]
}
IMPORTS = {name: imports_of(source) for name, source in SOURCES.items()}


def ours(*packages: str) -> tuple[str, ...]:
    return tuple(f"neurosurgeon.{package}" for package in packages)


def uses(module: str, *targets: str) -> set[str]:
    """Return what ``module`` imports of the target modules or packages."""
    return {name for name in IMPORTS[module] for target in targets if f"{name}.".startswith(f"{target}.")}


def modules(*prefixes: str) -> list[str]:
    return sorted(name for name in SOURCES if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes))


def test_the_reader_of_imports_sees_functions_and_skips_type_hints() -> None:
    source = """
import a
if TYPE_CHECKING:
    import hint
else:
    import c
def f():
    from d.e import g
"""
    assert imports_of(source) == {"a", "d.e.g"}


def test_all_modules_are_read() -> None:
    assert {
        "cloud_api",
        "edge_api",
        "deployment",
        "neurosurgeon.models.zoo",
        "neurosurgeon.net.transport",
        "neurosurgeon.utils.cli",
    } <= set(SOURCES)
    assert uses("neurosurgeon.deployment", "neurosurgeon.models") >= {"neurosurgeon.models.zoo.model_graph"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_nobody_imports_a_script(module: str) -> None:
    assert not uses(module, *SCRIPTS)


@pytest.mark.parametrize("module", modules(*ours(*PACKAGES)))
def test_only_scripts_import_the_deployment(module: str) -> None:
    assert not uses(module, *ours("deployment"))


@pytest.mark.parametrize("module", modules(*ours("predictor", "deployment")))
def test_planning_does_not_know_the_network(module: str) -> None:
    assert not uses(module, *ours("net"))


@pytest.mark.parametrize("module", modules(*ours("net")))
def test_the_network_does_not_know_planning(module: str) -> None:
    assert not uses(module, *ours("predictor", "deployment"))


@pytest.mark.parametrize("module", modules(*ours("models")))
def test_models_import_torch_and_the_foundations_only(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "safetensors"}
    others = {name for name in IMPORTS[module] if name.split(".")[0] not in allowed}
    assert others <= uses(module, "neurosurgeon.models", *FOUNDATIONS)


@pytest.mark.parametrize(
    "module", [*FOUNDATIONS, "neurosurgeon.utils.timing", "neurosurgeon.utils.logs", "neurosurgeon.utils.cli"]
)
def test_the_foundations_import_nothing_above_them(module: str) -> None:
    assert not uses(module, *ours("models", "net", "predictor", "deployment"))
    assert uses(module, "neurosurgeon.utils") <= uses(module, *FOUNDATIONS, "neurosurgeon.utils.logs")


@pytest.mark.parametrize("module", modules(*ours("utils")))
def test_shared_parts_do_not_know_network_or_planning(module: str) -> None:
    assert not uses(module, *ours("net", "predictor"))


def test_only_the_transport_and_the_monitor_touch_sockets() -> None:
    allowed = (
        "neurosurgeon.net.transport",
        "neurosurgeon.net.datagrams",
        "neurosurgeon.net.monitor_server",
        "neurosurgeon.net.shaper",
    )
    touching = {name for name in SOURCES if uses(name, "socket", "select", "socketserver", "asyncio")}
    hinting = {name for name in touching - set(allowed) if only_hints(SOURCES[name], "socket")}
    assert touching - hinting <= set(allowed)


def only_hints(source: str, module: str) -> bool:
    """Return whether every use of ``module`` in the code is a type hint: nothing of it is called."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return not any(ast.unparse(call.func).startswith(f"{module}.") for call in calls)


@pytest.mark.parametrize(
    "module", sorted(set(SOURCES) - {"neurosurgeon.utils.report", "neurosurgeon.utils.queue_report"})
)
def test_only_scripts_and_the_reports_print(module: str) -> None:
    calls = (node for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.Call))
    prints = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "print"]
    has_command = "if __name__ ==" in SOURCES[module]  # python -m predictor.collect is a script, too
    assert has_command or module == "neurosurgeon.utils.cli" or not prints
