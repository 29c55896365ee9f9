"""Allowed imports: the table of docs/design.md, against the syntax tree of every module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "neurosurgeon"
MEASURING = {"collect", "evaluate", "layer_timing", "machine_speed", "profile", "sampling", "whole_networks"}
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
REFERENCE = ("models", "net", "predictor", "utils")  # folders with the contract's names
MAX_LINES = 9  # of a file that only re-exports

# Imports that the table forbids and that still exist. This list may only shrink.
STILL_THERE = {
    ("utils.machine", "torch"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in (ROOT / PACKAGE).rglob("*.py")}


def imported(source: str) -> Iterator[str]:
    """Yield the modules that a file imports, wherever it does so, also for type checking."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in SOURCES else str(node.module)


IMPORTS = {name: frozenset(imported(source)) for name, source in SOURCES.items()}


def table() -> dict[str, tuple[list[str], set[str]]]:
    """Return the allowed imports of each package: of this project, and of others."""
    rules = {}
    for line in (ROOT / "docs" / "design.md").read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| \d \| (.+) \| (.+) \| (.+) \|", line)
        if row:
            ours, others = ([part.strip("– ") for part in cell.split(",")] for cell in row.groups()[1:])
            rules[row[1]] = [part for part in ours if part], {part for part in others if part}
    return rules


RULES = table()


def group_of(module: str) -> str:
    """Return the row of the table that a module belongs to."""
    _, package, *rest = module.split(".")
    if (package, rest) == ("engine", ["base"]):
        return "engine.base"
    return "predictor (measuring)" if package == "predictor" and rest and rest[0] in MEASURING else package


def lies_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def forbidden(module: str) -> Iterator[str]:
    """Yield the imports of a module that the table forbids."""
    group = group_of(module)
    ours, others = RULES[group]
    own = group.split()[0]
    for target in IMPORTS[module]:
        if not lies_in(target, PACKAGE):
            top = target.split(".")[0]
            if top not in sys.stdlib_module_names and top not in others and others != {"all"}:
                yield top
            continue
        short = target.removeprefix(f"{PACKAGE}.")
        measuring = target in SOURCES and target != PACKAGE and group_of(target) == "predictor (measuring)"
        if measuring and group not in ("cli", "predictor (measuring)"):
            if "predictor (measuring)" not in ours:
                yield short
            continue
        is_own = lies_in(short, own) and not (group_of(target) != group and group == own)
        if short != PACKAGE and not is_own and ours != ["all"] and not any(lies_in(short, each) for each in ours):
            yield short


MODULES = sorted(module for module in SOURCES if module.count(".") > 1)


def test_imported_finds_functions_and_type_hints() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import hint\ndef f():\n    from d.e import g\n"
    assert set(imported(source)) == {"a", "hint", "d.e"}


def test_every_package_has_a_row_in_the_table() -> None:
    assert {group_of(module) for module in MODULES} == set(RULES)
    assert RULES["utils"] == ([], {"prometheus_client"})


def test_imports_follow_the_table() -> None:
    found = {(module.removeprefix(f"{PACKAGE}."), target) for module in MODULES for target in forbidden(module)}
    assert found == STILL_THERE


def test_no_circles() -> None:
    edges = {module: IMPORTS[module] & set(SOURCES) for module in SOURCES}
    while edges:
        free = [module for module, targets in edges.items() if not targets & set(edges)]
        if not free:
            break
        for module in free:
            del edges[module]
    assert sorted(edges) == []  # the others are on a circle, or import one


def test_only_these_files_use_sockets() -> None:
    names = ("net.wire", "net.sockets", "net.connection", "net.datagrams", "net.monitor_server", "net.shaper")
    allowed = {f"{PACKAGE}.{name}" for name in names}
    touching = {name for name in SOURCES if IMPORTS[name] & {"socket", "select", "socketserver", "asyncio"}}
    hinting = {name for name in touching - allowed if only_hints(SOURCES[name], "socket")}
    assert touching - hinting <= allowed | {f"{PACKAGE}.cli.process", f"{PACKAGE}.cli.relay"}


def only_hints(source: str, module: str) -> bool:
    """Return whether every use of ``module`` in the code is a type hint: nothing of it is called."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return not any(ast.unparse(call.func).startswith(f"{module}.") for call in calls)


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_and_reports_print(module: str) -> None:
    calls = (node for node in ast.walk(ast.parse(SOURCES[module])) if isinstance(node, ast.Call))
    prints = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "print"]
    assert not prints or group_of(module) in ("cli", "reports")


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_import_argparse(module: str) -> None:
    assert group_of(module) == "cli" or "argparse" not in IMPORTS[module]


@pytest.mark.parametrize(
    "path", [*SCRIPTS, *(f"{folder}/{path.name}" for folder in REFERENCE for path in (ROOT / folder).glob("*.py"))]
)
def test_names_of_the_contract_hold_no_code(path: str) -> None:
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr | ast.If) for node in body)
    assert len(body) <= MAX_LINES


NEED_TORCH = {"cli.collect", "cli.deployment", "cli.evaluate", "cli.layers"}  # commands that compute by themselves


def test_edge_cloud_and_planner_import_without_torch() -> None:
    packages = ("graph", "planner", "net", "edge", "cloud", "reports", "cli")
    names = [
        name
        for name in SOURCES
        if name.split(".")[1:2]
        and name.split(".")[1] in packages
        and name.removeprefix(f"{PACKAGE}.") not in NEED_TORCH
    ]
    code = "import importlib, sys\nsys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code, *names, f"{PACKAGE}.engine.base"], cwd=ROOT, check=True)
