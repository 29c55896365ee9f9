"""The wheel: it holds one package and the shipped data, and runs a task outside of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import neurosurgeon
from neurosurgeon.cli.process import ROOT

TIMEOUT_S = 300


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel of this checkout is installed, without its dependencies."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("installed")
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "tests", "__pycache__")
    )  # pip writes there
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=target)
    return target


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the installed package, in a folder that is not the checkout's."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=installed, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_the_wheel_holds_one_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"neurosurgeon", "bin"}
    assert (installed / "neurosurgeon" / "data" / "dataset" / "edge" / "conv_lat.csv").is_file()


def test_the_installed_package_answers_a_task(installed: Path) -> None:
    done = run(installed, "-m", "neurosurgeon", "edge", "--local-cloud", "-t", "le_net", "--verify", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model"] == "le_net"
    assert document["max_abs_diff"] < 1e-4


def test_the_console_command_knows_version_and_commands(installed: Path) -> None:
    assert run(installed, "bin/neurosurgeon", "--version").stdout == f"neurosurgeon {neurosurgeon.__version__}\n"
    unknown = run(installed, "bin/neurosurgeon", "no-such-command")
    assert unknown.returncode == 2
    assert re.fullmatch(r"neurosurgeon: error: .*no-such-command.*\n", unknown.stderr)
    assert "edge" in run(installed, "bin/neurosurgeon", "--help").stdout
