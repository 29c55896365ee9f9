"""A missing package is named in one line by every script; a missing module of ours is an internal error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neurosurgeon.utils.packages import PACKAGES, missing_package

ROOT = Path(__file__).resolve().parent.parent.parent
HIDING = """
import os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ["HIDDEN"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
SCRIPTS = {
    "cloud_api.py": ["-p", "0", "--monitor-port", "0"],
    "tasks_cloud_api.py": ["-p", "0", "--monitor-port", "0"],
    "edge_api.py": ["-t", "le_net"],
    "tasks_edge_api.py": [],
    "deployment.py": ["-t", "le_net", "-b", "10"],
    "layers_api.py": ["-t", "le_net"],
    "demo.py": [],
    "-m neurosurgeon doctor": [],
    "-m predictor.collect": [],
    "-m predictor.predictor_utils": [],
    "-m predictor.evaluate": [],
}
ALONE = ("-m neurosurgeon certs", "-m net.monitor_server", "-m net.monitor_test", "-m net.monitor_client")


def run_without(hidden: str, script: str, arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that does not find some modules."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    environment = {**os.environ, "HIDDEN": hidden, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *script.split(), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_known_packages_are_the_required_ones() -> None:
    required = re.findall(r"^(\S+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(PACKAGES.values()) == sorted(required)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_without_packages_names_one(script: str, tmp_path: Path) -> None:
    done = run_without(" ".join(PACKAGES), script, SCRIPTS[script], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    here = re.escape(sys.executable)
    line = rf"\S+(\.py| doctor): error: the package \S+ is not installed in this Python \({here}\): .*\n"
    assert re.fullmatch(line, done.stderr)


@pytest.mark.parametrize("script", ALONE)
def test_a_script_that_needs_no_package_starts_without(script: str, tmp_path: Path) -> None:
    done = run_without(" ".join(PACKAGES), script, ["--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("hidden", ["torch", "numpy", "apscheduler"])
def test_the_package_that_is_missing_is_the_one_that_is_named(hidden: str, address: list[str], tmp_path: Path) -> None:
    done = run_without(hidden, "tasks_edge_api.py", address, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tasks_edge_api.py: error: the package {hidden} is not installed")


def test_other_networks_without_torchvision_are_one_line(tmp_path: Path) -> None:
    done = run_without("torchvision", "deployment.py", ["-t", "resnet18", "-b", "10"], tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"deployment\.py: error: .*pip install torchvision\n", done.stderr)


@pytest.mark.parametrize("hidden", ["neurosurgeon.models.names", "neurosurgeon.cli.process"])
def test_a_module_of_ours_that_is_missing_stays_an_internal_error(hidden: str, tmp_path: Path) -> None:
    done = run_without(hidden, "edge_api.py", ["--help"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"ModuleNotFoundError: No module named {hidden!r}\n")
    assert "not installed" not in done.stderr


@pytest.mark.parametrize(
    "error", [ImportError("no", name="numpy"), ModuleNotFoundError("no", name="numpy.linalg"), KeyError("numpy")]
)
def test_other_errors_are_no_missing_package(error: Exception) -> None:
    assert missing_package(error) is None
