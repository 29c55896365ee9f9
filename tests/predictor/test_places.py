"""Find data of this machine before data of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurosurgeon.predictor import places as places_module
from neurosurgeon.predictor.places import (
    collection_name,
    config_path,
    dataset_directory,
    default_directory,
    parameter_file,
    root_for_new_data,
)
from tests.predictor.samples import install


def test_dataset_directory_prefers_the_data_of_this_machine(places: Path) -> None:
    install(places / "dataset" / "edge", "Another")
    assert dataset_directory("edge", "cpu") == dataset_directory("edge", "cuda") == places / "dataset" / "edge"
    install(places / "dataset" / "edge" / "cuda", "Another GPU")
    assert dataset_directory("edge", "cuda") == places / "dataset" / "edge" / "cuda"
    for device in ("cpu", "cuda"):
        own = places / "dataset" / "edge" / f"some-{device}-x2"
        install(own, f"Some {device} (X2)")
        assert dataset_directory("edge", device) == own


def test_config_path_prefers_the_parameters_of_this_machine(places: Path) -> None:
    folder = places / "config" / "edge"
    folder.mkdir(parents=True)
    assert config_path("edge", "cuda") == folder / "cpu.json"
    for name in ("cuda.json", "some-cuda-x2.json"):
        (folder / name).touch()
        assert config_path("edge", "cuda") == folder / name
    assert config_path("edge") == folder / "cpu.json"


def test_a_collection_never_joins_data_of_the_same_processor(places: Path) -> None:
    install(places / "dataset" / "edge", "Some cpu (X2)")
    install(places / "dataset" / "edge" / "some-cpu-x2", "Some cpu (X2)")
    own = places / "dataset" / "edge" / collection_name("cpu")
    assert own.name == "own-some-cpu-x2"
    install(own, "Some cpu (X2)")
    assert dataset_directory("edge", "cpu") == own


def test_collections_are_found_below_both_roots(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(places / "dataset" / "edge", "Another")
    user = places / "user"
    monkeypatch.setattr(places_module, "data_directories", lambda: [user, places])
    own = default_directory("edge", collection_name("cpu"), root_for_new_data())
    assert own.is_relative_to(user)
    assert dataset_directory("edge", "cpu") == places / "dataset" / "edge"
    install(places / "dataset" / "edge" / collection_name("cpu"), "Some cpu (X2)")  # where earlier versions wrote it
    assert dataset_directory("edge", "cpu") == places / "dataset" / "edge" / collection_name("cpu")
    install(own, "Some cpu (X2)")
    assert dataset_directory("edge", "cpu") == own
    parameters = parameter_file("edge", collection_name("cpu"), root_for_new_data())
    parameters.parent.mkdir(parents=True)
    parameters.touch()
    assert config_path("edge") == parameters
