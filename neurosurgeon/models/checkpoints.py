"""Files of weights, as people have them: what training loops and wrappers write, and what is no checkpoint at all."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.errors import WeightsError

if TYPE_CHECKING:  # torch takes a second to import
    from torch import Tensor

log = logging.getLogger(__name__)

State = dict[str, Any]  # tensors by name; extra states are no tensors

# The keys under which training loops keep the weights, and those of averages of them (EMA).
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "params_ema")
MAX_WRAPPERS = 3  # one in another
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")  # of wrappers and of training loops
MAX_PREFIXES = 3  # one in another, as in "module._orig_mod."
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of parts of a network
HEAD_BYTES = 512
SAFETENSORS_START = slice(8, 10)  # of its header, which is JSON, after the header's length
TAR_SIGNATURE = slice(257, 262)
ADVICE = "save the state_dict() of the network, and pass that file"
PACKED = "unpack it, and pass the checkpoint in it"
WEB_PAGE = "is a web page (HTML), not a checkpoint: download the file itself"
# What the first bytes of a file say that it is.
NO_CHECKPOINTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"<?xml": "is an XML page, not a checkpoint: download the file itself",
    b"{": "is JSON text, not a checkpoint: pass the file of the tensors",
    b"[": "is JSON text, not a checkpoint: pass the file of the tensors",
    b"\x1f\x8b": f"is compressed with gzip: {PACKED}",
    b"BZh": f"is compressed with bzip2: {PACKED}",
    b"\xfd7zXZ": f"is compressed with xz: {PACKED}",
    b"7z\xbc\xaf": f"is a 7-Zip archive: {PACKED}",
    b"Rar!": f"is a RAR archive: {PACKED}",
    b"\x93NUMPY": f"is an array of NumPy, not a checkpoint: {ADVICE}",
    b"\x89HDF": f"is HDF5 (of Keras, say), not a checkpoint of PyTorch: {ADVICE}",
    b"GGUF": f"is GGUF, not a checkpoint of PyTorch: {ADVICE}",
}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint (``weights_only``) or of a safetensors file by name, as they are in it.

    The weights are unwrapped from what a training loop keeps beside them. Values that are no tensors stay.

    Raises: WeightsError: the file is missing, unreadable, or no mapping of names to tensors; says what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as exc:
        reason = "does not exist" if isinstance(exc, FileNotFoundError) else f"cannot be read: {exc.strerror}"
        raise WeightsError(f"weights file {path} {reason}") from exc
    if said := _kind_of(path, head):
        raise WeightsError(f"weights file {path} {said}")
    state = _unwrapped(_loaded(path, head), path)
    return {str(key): value for key, value in state.items()}


def _kind_of(path: Path, head: bytes) -> str | None:
    """Return what a file is that is no checkpoint; None if it may be one."""
    if not head:
        return "is empty: download or save it again"
    start = head.lstrip().lower()
    for signature, said in NO_CHECKPOINTS.items():
        if start.startswith(signature.lower()):
            return said
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and re.search(rb"pytorch|onnx", head[:64].lower())):
        return f"is an ONNX network, not a checkpoint: {ADVICE}"
    if head[TAR_SIGNATURE] == b"ustar":
        return f"is a tar archive: {PACKED}"
    return _kind_of_zip(path) if zipfile.is_zipfile(path) else None


def _kind_of_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return f"is a TorchScript network, not a checkpoint: {ADVICE}"
    if "data.pkl" in names:
        return None
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return f"is a network of torch.export, not a checkpoint: {ADVICE}"
    return f"is a ZIP archive, not a checkpoint: {PACKED}"


def _loaded(path: Path, head: bytes) -> Any:
    import torch

    try:
        if head[SAFETENSORS_START] == b'{"' or (path.suffix == ".safetensors" and not zipfile.is_zipfile(path)):
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_plain_objects()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as exc:
        raise WeightsError(f"reading {path} needs one more package: pip install safetensors") from exc
    except Exception as exc:  # the two readers raise many types, with one meaning for the user
        raise WeightsError(f"weights file {path} cannot be read: {_reason(path, exc)}") from exc


def _plain_objects() -> list[Any]:
    """Return types of flags and scores that training loops keep beside weights; none runs code when it is loaded."""
    from pathlib import PosixPath
    from types import SimpleNamespace

    import numpy as np

    scalar = np.float64().__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    types = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    return [(SimpleNamespace, "argparse.Namespace"), PosixPath, *scalars, np.dtype, *types]


def _reason(path: Path, exc: Exception) -> str:
    """Return why a file cannot be read, without torch's advice to run the code in it."""
    text = str(exc)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        what = "a whole module" if _holds_modules(path, found[1]) else "Python objects, which are code"
        return f"it holds {what} ({found[1]}): load it where it was saved, and {ADVICE.replace('the network', 'it')}"
    if re.search("central directory|truncated|unexpected EOF|ran out of input|not fully covered", text, re.I):
        return "it is damaged or ends too early: download or save it again"
    if re.search("weights.only|pickle", text, re.I) or path.suffix == ".safetensors":
        return f"it is no {'safetensors file' if path.suffix == '.safetensors' else 'checkpoint of PyTorch'}: {ADVICE}"
    return text.strip().splitlines()[0] if text.strip() else type(exc).__name__


def _holds_modules(path: Path, first: str) -> bool:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    names = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    return any(name.startswith("torch.nn.") for name in (first, *names))


# ---------------------------------------------------------------- keys of training loops


def _unwrapped(state: Any, path: Path) -> Mapping[Any, Any]:
    for _ in range(MAX_WRAPPERS):
        if not isinstance(state, Mapping) or not (key := _wrapper(state, path)):
            break
        state = state[key]
    if isinstance(state, Mapping) and (not state or any(map(_is_tensor, state.values()))):
        return state
    keys = f" (its keys: {', '.join(map(str, list(state)[:8]))})" if isinstance(state, Mapping) else ""
    raise WeightsError(f"weights file {path} holds no state_dict (names with tensors){keys}: {ADVICE}")


def _wrapper(state: Mapping[Any, Any], path: Path) -> str | None:
    """Return the key under which the weights are; None if there is no such key. Raises: WeightsError: several."""
    plain, averaged = ([key for key in keys if _is_weights(state.get(key))] for keys in (WRAPPERS, AVERAGES))
    found = plain or averaged
    beside = [key for key in state if _is_tensor(state[key]) and "." in str(key)]
    if len(found) > 1 or (found and beside):
        raise _unclear(path, [*beside[:1], *found])
    if plain and averaged:
        log.warning("%s: using the weights under %s; averages (EMA) are under %s", path, found[0], ", ".join(averaged))
    return found[0] if found else None


def _unclear(path: Path, names: Sequence[Any]) -> WeightsError:
    text = " and ".join(map(str, names))
    return WeightsError(f"weights file {path} holds {text}: which of them is meant is unclear; save that one alone")


def _is_weights(value: Any, depth: int = MAX_WRAPPERS) -> bool:
    """Return whether a value is a mapping with tensors, or with a wrapper of such a mapping."""
    if not isinstance(value, Mapping) or not depth:
        return False
    return any(map(_is_tensor, value.values())) or any(
        _is_weights(value.get(key), depth - 1) for key in (*WRAPPERS, *AVERAGES)
    )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


# ---------------------------------------------------------------- names of parameters


def fitting_names(given: Mapping[str, Any], own: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return weights with the names of a network: without the prefix of a wrapper, if more names fit without it.

    What lies beside the prefix (a loss of the training loop, say) is left out with it, and counted in the log.

    Raises: WeightsError: the names fit with several prefixes, or a parameter has its name with and without one.
    """
    given = _without_inner_wrappers(given, own)
    fits = [(sum(key in own for key in state), prefix, state) for prefix, state in _candidates(given)]
    best = max(count for count, _, _ in fits)
    (count, prefix, state), *others = [fit for fit in fits if fit[0] == best]
    if not prefix:
        return state
    twice = [key for key in given if key in own and not key.startswith(prefix)]
    if others or twice:
        raise _unclear(path, [prefix, *(other[1] for other in others), *twice[:1]])
    if left_out := len(given) - len(state):
        log.warning(
            "%s: %d values without the prefix %s of the %d others are left out", path, left_out, prefix, len(state)
        )
    return state


def _without_inner_wrappers(given: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return weights without the wrappers of parts of a network (a compiled part, say) that the network has not."""
    state = dict(given)
    for wrapper in INNER_WRAPPERS:
        if not any(wrapper in key for key in own):
            renamed = {key.replace(wrapper, ""): value for key, value in state.items()}
            state = renamed if len(renamed) == len(state) else state
    return state


def _candidates(given: Mapping[str, Any], before: str = "", depth: int = MAX_PREFIXES) -> Iterator[tuple[str, State]]:
    """Yield weights as they are, and then without each prefix; each with the prefix that was cut."""
    yield before, dict(given)
    for prefix in PREFIXES if depth else ():
        inner = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        if inner:
            yield from _candidates(inner, before + prefix, depth - 1)
