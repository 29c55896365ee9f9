"""Find the directories of data sets and the parameter files of a side and device.

The shipped data and the collections made on this machine may have different roots (`utils.files.data_directories`).
Below a root, data sets lie in `dataset/SIDE/NAME/` and linear parameters in `config/SIDE/NAME.json`. NAME is one of
three: `own-` and the name of a processor for a collection made here, the name of a processor, or the device. The data
sets of the device "cpu" lie in `dataset/SIDE/` itself, where the reference has them.
"""

from __future__ import annotations

from pathlib import Path

from neurosurgeon.predictor.get_datasets_func import kinds_in
from neurosurgeon.utils.files import data_directories, data_directory, file_name
from neurosurgeon.utils.machine import device_name


def dataset_directory(side: str, device: str) -> Path:
    """Return the best directory of data sets for a side and device."""
    return dataset_directories(side, device)[0]


def dataset_directories(side: str, device: str) -> list[Path]:
    """Return the directories with data sets for a side and device, the best first; at least the shipped CPU's."""
    names = (*data_names(device), "cpu")
    found = dict.fromkeys(default_directory(side, name, root) for name in names for root in data_directories())
    return [directory for directory in found if kinds_in(directory)] or [default_directory(side, "cpu")]


def default_directory(side: str, name: str, root: Path | None = None) -> Path:
    """Return the directory of the data sets of a name, below a root (default: of the shipped data)."""
    directory = (root or data_directory()) / "dataset" / side
    return directory if name == "cpu" else directory / name


def config_path(side: str, device: str = "cpu") -> Path:
    """Return the best file of linear parameters for a side and device."""
    return config_paths(side, device)[0]


def config_paths(side: str, device: str) -> list[Path]:
    """Return the files of linear parameters for a side and device, the best first; at least the shipped CPU's."""
    names = (*data_names(device), "cpu")
    found = dict.fromkeys(parameter_file(side, name, root) for name in names for root in data_directories())
    return [path for path in found if path.exists()] or [parameter_file(side, "cpu")]


def parameter_file(side: str, name: str, root: Path | None = None) -> Path:
    """Return the parameter file of a name, below a root (default: of the shipped data); it may not exist."""
    return (root or data_directory()) / "config" / side / f"{name}.json"


def root_for_new_data() -> Path:
    """Return the root below which collections and fitted parameters are written."""
    return data_directories()[0]


def data_names(device: str) -> tuple[str, str, str]:
    """Return the names of data for a device, the best first: of this machine, of its processor, of the device."""
    return collection_name(device), file_name(device_name(device)), device


def collection_name(device: str) -> str:
    """Return the name of data that is collected here.

    It differs from the name of shipped data for the same processor, whose machine may be a faster one.
    """
    return f"own-{file_name(device_name(device))}"
