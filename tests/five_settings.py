"""Run the tests under five settings, in which a machine may compute in another way or be busy; print a line for each.

    python -m tests.five_settings [--twice] [PYTEST ARGUMENT ...]
    python -m tests.five_settings --twice tests/test_faults.py -x

Failures are printed after the line of their setting. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from neurosurgeon.cli.process import ROOT
from tests.benchmark.common import busy_loops

BUSY_LOOPS = 2


class Setting(NamedTuple):
    """A difference of another machine: variables of the environment, and other programs."""

    name: str
    environment: dict[str, str]
    busy_loops: int = 0


SETTINGS = (
    Setting("as is", {}),
    Setting("OMP_NUM_THREADS=1", {"OMP_NUM_THREADS": "1"}),
    Setting("ATEN_CPU_CAPABILITY=default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("MKL_CBWR=COMPATIBLE", {"MKL_CBWR": "COMPATIBLE"}),
    Setting(f"beside {BUSY_LOOPS} busy loops", {}, BUSY_LOOPS),
)


class Outcome(NamedTuple):
    """The outcome of a run of the tests."""

    passed: int
    failed: int
    skipped: int
    duration_s: float
    failures: list[str]  # the text of pytest about each


def run_tests(setting: Setting, arguments: Sequence[str]) -> Outcome:
    """Run pytest under a setting."""
    with tempfile.TemporaryDirectory() as directory, busy_loops(setting.busy_loops):
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        start_s = time.monotonic()
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **setting.environment}, capture_output=True, text=True, check=False
        )
        duration_s = time.monotonic() - start_s
        outcome = outcome_of(report, duration_s)
    if ended.returncode and not outcome.failed:  # pytest could not run any
        return outcome._replace(failed=1, failures=[ended.stdout + ended.stderr])
    return outcome


def outcome_of(report: Path, duration_s: float) -> Outcome:
    """Return the outcome in a JUnit file of pytest; an empty one without that file."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314  # pytest's own
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failures = [
        f"{case.get('classname')}::{case.get('name')}\n{''.join(part.text or '' for part in case)}" for case in failed
    ]
    return Outcome(len(cases) - len(failed) - skipped, len(failed), skipped, duration_s, failures)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("five_settings", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--twice", action="store_true", help="run each setting twice (default: once)")
    args, pytest_arguments = parser.parse_known_args(argv)
    failed = 0
    print(f"{'setting':<30}{'passed':>8}{'failed':>8}{'skipped':>9}{'duration s':>12}", flush=True)
    for setting in SETTINGS:
        for _ in range(1 + args.twice):
            outcome = run_tests(setting, pytest_arguments)
            failed += outcome.failed
            print(
                f"{setting.name:<30}{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}"
                f"{outcome.duration_s:>12.0f}",
                *outcome.failures,
                sep="\n",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
