"""The pace of a machine: measured once, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from predictor import pace
from predictor.get_datasets_func import pace_of
from predictor.pace import kept_pace_ms, measured_pace_ms, one_pass
from predictor.sampling import Sample
from utils.files import cache_directory


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


def kept() -> list[Path]:
    return list((cache_directory() / "paces").glob("*"))


def test_the_pace_is_a_time() -> None:
    assert 0 < measured_pace_ms("cpu") < 1000


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"pace_ms": "fast"}'])
def test_the_pace_is_measured_once_and_kept(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paces_ms = iter([2.0, 3.0])
    monkeypatch.setattr(pace, "measured_pace_ms", lambda device: next(paces_ms))
    assert kept_pace_ms("cpu") == kept_pace_ms("cpu") == 2.0
    kept()[0].write_text(damage)
    assert kept_pace_ms("cpu") == kept_pace_ms("cpu") == 3.0


def test_a_pace_that_cannot_be_kept_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept_pace_ms("cpu") > 0
    assert "cannot be kept" in caplog.text


def test_data_sets_tell_the_pace_of_an_undisturbed_machine(tmp_path: Path) -> None:
    assert pace_of(tmp_path) is None
    rows = [f"{n},8,0.5,{pace_ms}" for n, pace_ms in enumerate([2.0, 2.0, 2.0, 2.4, 9.0], start=1)]
    (tmp_path / "batchnorm_lat.csv").write_text("\n".join(["HW,Cin,latency,pace_ms", *rows]) + "\n")
    assert pace_of(tmp_path) == 2.0
    (tmp_path / "batchnorm_lat.csv").write_text("HW,Cin,latency\n8,8,0.5\n")
    assert pace_of(tmp_path) is None


@pytest.mark.parametrize(("threads", "expected_ms"), [(1, 2.0), (2, 30.0)])
def test_one_thread_that_others_interrupt_is_timed_by_what_it_computed(
    threads: int, expected_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "now_ms", iter([100.0, 130.0]).__next__)
    monkeypatch.setattr(pace, "thread_ms", iter([7.0, 9.0]).__next__)
    monkeypatch.setattr(pace.torch, "get_num_threads", lambda: threads)
    assert one_pass([Sample(abs, (torch.ones(1),))], "cpu") == [expected_ms]
