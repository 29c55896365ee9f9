"""Files of weights, as people have them: what training loops and wrappers write, and what is no checkpoint at all."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.errors import WeightsError

if TYPE_CHECKING:  # torch takes a second to import
    from torch import Tensor

log = logging.getLogger(__name__)

# The keys under which training loops keep the weights, the plain ones before averaged ones.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
    *("ema_state_dict", "state_dict_ema", "model_ema", "ema", "params_ema"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")  # of wrappers and of training loops
MAX_PREFIXES = 3  # one in another, as in "module._orig_mod."
HEAD_BYTES = 512
ADVICE = "save the state_dict() of the network, and pass that file"
# What the first bytes of a file say that it is.
NO_CHECKPOINTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull",
    b"<!doctype html": "is a web page (HTML), not a checkpoint: download the file itself",
    b"<html": "is a web page (HTML), not a checkpoint: download the file itself",
    b"<?xml": "is an XML page, not a checkpoint: download the file itself",
    b"{": "is JSON text, not a checkpoint: pass the file of the tensors",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"Rar!": "is a RAR archive: unpack it first",
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
    state = _unwrapped(_loaded(path), path)
    return {str(key): value for key, value in state.items()}


def _kind_of(path: Path, head: bytes) -> str | None:
    """Return what a file is that is no checkpoint; None if it may be one."""
    if not head:
        return "is empty: download or save it again"
    start = head.lstrip().lower()
    for signature, said in NO_CHECKPOINTS.items():
        if start.startswith(signature.lower()) and not (signature == b"{" and path.suffix == ".safetensors"):
            return said
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head[:64]) or b"onnx" in head[:64].lower():
        return f"is an ONNX network, not a checkpoint: {ADVICE}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            return f"is a TorchScript network, not a checkpoint: {ADVICE}"
        if any(name.startswith("models/") for name in (*names, *archive.namelist())) and "data.pkl" not in names:
            return f"is a network of torch.export, not a checkpoint: {ADVICE}"
    return None


def _loaded(path: Path) -> Any:
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as exc:
        raise WeightsError(f"reading {path} needs one more package: pip install safetensors") from exc
    except Exception as exc:  # the two readers raise many types, with one meaning for the user
        raise WeightsError(f"weights file {path} cannot be read: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """Return why a file cannot be read, without torch's advice to run the code in it."""
    text = str(exc)
    if "GLOBAL" in text or "Unsupported class" in text or "Unsupported operand" in text:
        return f"it holds Python objects, as a whole pickled network does, which are code: where it was saved, {ADVICE}"
    if "central directory" in text or "Truncated" in text.title() or "unexpected EOF" in text:
        return "it is damaged or ends too early: download or save it again"
    if "Weights only load failed" in text or "pickle" in text:
        return "it is no checkpoint of PyTorch"
    return text.strip().splitlines()[0] if text.strip() else type(exc).__name__


def _unwrapped(state: Any, path: Path) -> Mapping[Any, Any]:
    import torch

    depth = 0
    while isinstance(state, Mapping) and depth < len(WRAPPERS):
        found = [key for key in WRAPPERS if isinstance(state.get(key), Mapping) and state[key]]
        if not found or any(isinstance(value, torch.Tensor) for value in state.values()):
            break
        if len(found) > 1:
            log.warning("%s holds weights under %s: using %s", path, ", ".join(found), found[0])
        state, depth = state[found[0]], depth + 1
    if isinstance(state, Mapping) and (not state or any(isinstance(value, torch.Tensor) for value in state.values())):
        return state
    keys = f" (its keys: {', '.join(map(str, list(state)[:8]))})" if isinstance(state, Mapping) else ""
    raise WeightsError(f"weights file {path} holds no state_dict (names with tensors){keys}: {ADVICE}")


def fitting_names(given: Mapping[str, Any], own: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return weights with the names of a network: without the prefix of a wrapper, if more names fit without it.

    What lies beside the prefix (a loss of the training loop, say) is left out with it, and named in the log.
    """
    best = max(_candidates(given), key=lambda state: sum(key in own for key in state))
    if left_out := len(given) - len(best):
        log.warning("%s: %d values of the training loop are left out: they are not of the network", path, left_out)
    return best


def _candidates(given: Mapping[str, Any], depth: int = MAX_PREFIXES) -> Iterator[dict[str, Any]]:
    """Yield weights as they are, and then without each prefix."""
    yield dict(given)
    for prefix in PREFIXES if depth else ():
        inner = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
        if inner:
            yield from _candidates(inner, depth - 1)
