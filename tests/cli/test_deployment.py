"""The deployment command: the threads that each side's data is scaled to."""

from __future__ import annotations

import datetime

import pytest

from neurosurgeon.cli import deployment
from neurosurgeon.predictor import machine_speed
from neurosurgeon.predictor.machine_speed import MachineSpeed, reference_layers

COMMAND = ["-t", "le_net", "-b", "1", "--predictor", "linear"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads for which the speed of this machine is asked, the edge's first; nothing is measured."""
    asked: list[int] = []
    layers_ms = (1.0,) * len(reference_layers())
    speed = MachineSpeed(layers_ms, datetime.datetime.now(datetime.UTC).isoformat(), 0.0, 1.0, False)

    def known_speed(device: str, threads: int) -> MachineSpeed:
        asked.append(threads)
        return speed

    monkeypatch.setattr(machine_speed, "machine_speed", known_speed)
    monkeypatch.setattr("neurosurgeon.cli.deployment.use_threads", lambda threads: threads)
    return asked


@pytest.mark.parametrize(
    ("free_cores", "flags", "threads"),
    [
        (2.0, [], [1, 2]),
        (1.0, [], [1, 1]),
        (1.0, ["--cloud-threads", "2"], [1, 2]),
        (2.0, ["--threads", "3", "--cloud-threads", "4"], [3, 4]),
    ],
)
def test_a_plan_is_for_the_threads_of_both_sides(
    free_cores: float, flags: list[str], threads: list[int], measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosurgeon.cli.parser.free_cores", lambda: free_cores)
    assert deployment.main([*COMMAND, *flags]) == 0
    assert measured == threads
