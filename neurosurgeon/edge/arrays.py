"""Files of arrays: numpy's ``.npy`` and ``.npz``, and sound (``.wav``)."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from scipy.io import wavfile

from neurosurgeon.graph.spec import Array
from neurosurgeon.utils.errors import InputError

SUFFIXES = (".npy", ".npz", ".wav")
MAX_BYTES = 2 << 30  # of one array: a small file may claim to be terabytes


def read_arrays(path: Path) -> Array | dict[str, Array]:
    """Return the array of a file, or those of an ``.npz`` by name. Sound is 1-D float32 in -1 to 1.

    Raises: InputError: the file is missing, damaged or too large, or holds Python objects.
    """
    try:
        if path.suffix == ".wav":
            return _sound(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return {name.removesuffix(".npy"): _member(archive, name) for name in archive.namelist()}
        with path.open("rb") as file:
            return _array(file, path.stat().st_size)
    except FileNotFoundError as exc:
        raise InputError(f"input file {path} does not exist") from exc
    except InputError as exc:
        raise InputError(f"input file {path} {exc}") from exc
    except Exception as exc:  # a damaged file may raise anything
        kind = {".npy": "a numpy array", ".npz": "numpy arrays", ".wav": "WAV sound"}[path.suffix]
        raise InputError(f"input file {path} cannot be read as {kind}: it is damaged or ends too early") from exc


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    size = archive.getinfo(name).file_size
    if size > MAX_BYTES:
        raise InputError(f"has an array of {size} bytes, at most {MAX_BYTES} are read")
    return _array(io.BytesIO(archive.read(name)), size)


def _array(file: Any, size: int) -> Array:
    """Return an array after a check of its header: nothing is allocated for a size that the file does not have."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise InputError("holds Python objects, which are code: save an array of numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object)) if shape else 1
    if count * dtype.itemsize > min(size, MAX_BYTES):
        raise InputError(f"claims {count} values, which it does not hold")
    file.seek(0)
    array: Array = np.load(file, allow_pickle=False)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(shape)


def _sound(path: Path) -> NDArray[np.float32]:
    """Return a sound as floats; several channels are averaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
        _, samples = wavfile.read(path)
    if samples.dtype == np.uint8:
        values = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        values = samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    else:
        values = samples
    return np.ascontiguousarray(values if values.ndim == 1 else values.mean(axis=1), dtype=np.float32)
