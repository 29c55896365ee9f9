"""Fixtures of the tests of predictors."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurosurgeon.predictor import places as places_module


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for data sets and one for parameters, both empty, on a machine of a known name."""
    monkeypatch.setattr(places_module, "data_directory", lambda: tmp_path)
    monkeypatch.setattr(places_module, "data_directories", lambda: [tmp_path])
    monkeypatch.setattr(places_module, "device_name", lambda device: f"Some {device} (X2)")
    return tmp_path
