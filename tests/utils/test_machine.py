"""Set the waiting policy in time, and count the cores that other programs leave free."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from neurosurgeon.cli.process import ROOT
from neurosurgeon.utils.machine import SPIN_COUNT, CpuUse, free_cores

PACKAGES = (
    "neurosurgeon",
    "neurosurgeon.models.build",
    "neurosurgeon.predictor.collect",
    "neurosurgeon.net.session",
    "edge_api",
    "cloud_api",
)


@pytest.mark.parametrize("module", PACKAGES)
def test_the_waiting_policy_is_set_before_torch_is_imported(module: str) -> None:
    code = (
        "import builtins, os, sys\n"
        "real, seen = builtins.__import__, []\n"
        "def spy(name, *rest):\n"
        "    if name == 'torch' and not seen: seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = spy\n"
        f"import {module}\n"
        "print(seen or [os.environ.get('GOMP_SPINCOUNT')])\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    for given, expected in (({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment | given, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == str([expected])
        if module != "neurosurgeon":
            break  # one choice is enough of those that import torch


@pytest.mark.parametrize(
    ("idle_s", "own_s", "free"),
    [(20.0, 0.0, 2.0), (18.0, 2.0, 2.0), (10.0, 0.0, 1.0), (0.0, 5.0, 0.5)],
)
def test_free_cores_are_idle_or_used_by_this_process(idle_s: float, own_s: float, free: float) -> None:
    before, after = CpuUse(100.0, 50.0, 3.0), CpuUse(110.0, 50.0 + idle_s, 3.0 + own_s)
    assert before.free_cores_until(after) == pytest.approx(free)


def test_free_cores_are_no_more_than_there_are() -> None:
    assert 0 <= free_cores() <= (os.cpu_count() or 1) + 0.5
