"""The weights of networks: from a file of the user, torchvision's checkpoints, or a fixed seed.

The seed gives the same bits on every machine. Two machines hold the same weights if their digests are equal, whatever
the origin of the weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.checkpoints import fitting_names, read_checkpoint
from neurosurgeon.models.names import ZOO, Catalogue, is_own, torchvision_name, torchvision_weights
from neurosurgeon.utils.errors import UsageError, WeightsError

if TYPE_CHECKING:  # torch takes a second to import, which names and spelling checks do not need
    from torch import Tensor, nn

TRAINING_HEADS = {"aux1", "aux2", "AuxLogits"}  # of GoogLeNet and Inception, in their checkpoints
DIGEST_HEX_CHARS = 32  # 128 bits: no collisions, and short enough to read


def of_this_version(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return parameters with the versions of their modules, by default the model's, as `load_state_dict` expects."""
    stamped = OrderedDict(state)
    stamped._metadata = getattr(state, "_metadata", model.state_dict()._metadata)  # type: ignore[attr-defined]
    return stamped


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return 128 bits of SHA-256 over names, types, shapes and bytes of all parameters and statistics."""
    total = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):  # a counter of training; the outputs do not depend on it
            continue
        if not hasattr(state[key], "detach"):  # the state that a module adds itself, as quantised ones do
            total.update(f"{key} {state[key]!r}".encode())
            continue
        tensor = state[key].detach().cpu()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(_bytes_of(tensor)))
    return total.hexdigest()[:DIGEST_HEX_CHARS]


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as an array, whatever its type."""
    import torch

    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()


# ---------------------------------------------------------------- sources


def load_weights(name: str, model: nn.Module, source: WeightsSource) -> bool:
    """Fill a network with its weights, in place, and return whether they are torchvision's.

    The types are the network's own. Tensors that share memory still do. Networks of the user keep the weights with
    which they were made, if there is no file.

    Raises: WeightsError: the file does not fit, or there are no pretrained weights.
    """
    is_official = False
    if source.file is not None:
        state = read_weights_file(source.file, model)
        check_fit(model, state, f"{source.file} does not fit {name}")
        is_official = _is_official_checkpoint(name, source.file)
    elif source.pretrained:
        state, is_official = _without_training_heads(_pretrained_state(name), model), True
    elif is_own(name):
        return False
    else:
        state = seeded_state(name.partition("@")[0], model)
    _fill(model, state)
    return is_official


def _fill(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in state}
    state = {**counters, **state}
    is_empty = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if is_empty:  # without storage: the tensors of the state become the network's own
        state = {key: value.to(own[key].dtype) for key, value in state.items() if key in own}
    model.load_state_dict(of_this_version(state, model), assign=is_empty)


def _without_training_heads(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a checkpoint without the parameters of training heads that the model does not have."""
    own = {key.split(".")[0] for key in model.state_dict()}
    return {key: value for key, value in state.items() if key.split(".")[0] not in TRAINING_HEADS - own}


def read_weights_file(path: Path, model: nn.Module) -> dict[str, Any]:
    """Return the weights of a file, with the names of a network's parameters and buffers.

    Raises: WeightsError: the file is missing, unreadable, or no checkpoint.
    """
    own = model.state_dict()
    state = fitting_names(read_checkpoint(path), own, path)
    return _with_shared(_without_training_heads(state, model), own)


def _with_shared(state: dict[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return weights with those that share memory with another one, which safetensors writes once."""
    known = {_place(own[key]): value for key, value in state.items() if key in own and not own[key].is_meta}
    missing = {key: known.get(_place(value)) for key, value in own.items() if key not in state and value.numel()}
    return state | {key: value for key, value in missing.items() if value is not None}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if not tensor.is_meta else (id(tensor),)
    )


def check_fit(model: nn.Module, state: Mapping[str, Any], failure: str) -> None:
    """Check that weights have the names, the shapes and kinds of numbers of the model's parameters and buffers.

    Args:   failure: the beginning of the error message.
    Raises: WeightsError: names the first parameter that is missing, unknown or of another shape or kind.
    """
    import torch

    expected, given = (
        {key: value for key, value in each.items() if not key.endswith("num_batches_tracked")}
        for each in (model.state_dict(), state)
    )
    for key, value in expected.items():
        if key not in given:
            raise WeightsError(f"{failure}: {key} is missing")
        tensor = given[key]
        if not isinstance(tensor, torch.Tensor) or not isinstance(value, torch.Tensor):
            if type(tensor) is not type(value):
                raise WeightsError(f"{failure}: {key} is a {type(tensor).__name__}, expected {type(value).__name__}")
            continue
        if tensor.is_sparse or tensor.is_meta:
            raise WeightsError(f"{failure}: {key} is {'sparse' if tensor.is_sparse else 'empty'}, expected numbers")
        if tensor.shape != value.shape:
            raise WeightsError(f"{failure}: {key} has shape {tuple(tensor.shape)}, expected {tuple(value.shape)}")
        if not _can_become(tensor, value):
            raise WeightsError(f"{failure}: {key} is {tensor.dtype}, expected {_expected_kind(value)}")
    for key in given:
        if key not in expected:
            raise WeightsError(f"{failure}: {key} is not a parameter of it")


def _can_become(given: Tensor, own: Tensor) -> bool:
    """Return whether numbers of one kind can be copied into a parameter: floats of any size into each other."""
    if own.is_floating_point():
        return given.is_floating_point()
    if own.is_complex():
        return given.is_complex()
    return given.dtype == own.dtype or not (given.is_floating_point() or given.is_complex() or given.dtype.is_signed)


def _expected_kind(own: Tensor) -> str:
    return "floating-point numbers" if own.is_floating_point() else str(own.dtype)


def check_weights_file(catalogue: Catalogue, name: str, path: Path) -> None:
    """Check that a weights file fits a model. Raises: WeightsError."""
    model = catalogue.build_module(name)
    check_fit(model, read_weights_file(path, model), f"{path} does not fit {name}")


def check_pretrained(name: str) -> None:
    """Check that torchvision has weights for a model.

    Raises: WeightsError: names the models for which it has weights.
    """
    if torchvision_name(name) is None:
        trained = ", ".join(known for known, candidate in ZOO.items() if candidate.torchvision_name)
        raise WeightsError(f"torchvision has no pretrained weights for {name}; it has them for {trained} and its own")


def model_of_weights(catalogue: Catalogue, path: Path) -> str:
    """Return the name of the classic network that a weights file fits.

    Raises: WeightsError: it fits none.
    """
    for name in ZOO:
        model = catalogue.build_module(name)
        try:
            check_fit(model, read_weights_file(path, model), "")
        except WeightsError:
            continue
        return name
    raise WeightsError(f"weights file {path} fits none of {', '.join(ZOO)}")


def _pretrained_state(name: str) -> dict[str, Tensor]:
    """Return torchvision's checkpoint from the local cache, or download it."""
    check_pretrained(name)
    weights = torchvision_weights(name)
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as exc:
        raise WeightsError(
            f"pretrained weights of {name} are neither cached nor downloadable ({exc}); "
            f"fetch {weights.url} elsewhere and pass --weights FILE"
        ) from exc
    return state


def _is_official_checkpoint(name: str, path: Path) -> bool:
    """Return whether a file is a checkpoint of torchvision: its name ends in the first digits of its own SHA-256."""
    known = torchvision_name(name)
    stamp = re.search(r"^(.+)-([0-9a-f]{8,10})\.pth$", path.name)
    if known is None or stamp is None or not _squashed(stamp[1]).startswith(_squashed(known)):
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(stamp[2])


def _squashed(name: str) -> str:
    """Return a name without punctuation: shufflenet_v2_x0_5 is in the file shufflenetv2_x0.5-f707e7126e.pth."""
    return re.sub(r"[^a-z0-9]", "", name)


def seeded_state(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Return parameters drawn from a fixed seed, bit for bit the same on every machine.

    Each tensor has its own stream, seeded by model and parameter name. Draws are 24-bit integers scaled by powers
    of two and one rounded product, so no machine's math library can change a bit. Weights are He-uniform (He et
    al. 2015), so that activations keep their scale through deep networks; batch-norm statistics are not trivial.
    """
    import torch
    from torch import nn

    norm_types = (nn.BatchNorm2d, nn.LayerNorm)
    norms = {path for path, module in model.named_modules() if isinstance(module, norm_types)}
    fan_in = {
        f"{path}.{leaf}": module.weight[0].numel()
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for leaf in ("weight", "bias")
    }
    parameters = {key for key, _ in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for key, built in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked":
            state[key] = torch.zeros((), dtype=torch.int64)
        elif owner in norms:
            centre = 1.0 if leaf in ("weight", "running_var") else 0.0
            state[key] = _uniform(f"{name}.{key}", built.shape, centre, 0.25)
        elif key in fan_in:
            bound = math.sqrt(6.0 / fan_in[key]) if leaf == "weight" else 1.0 / math.sqrt(fan_in[key])
            state[key] = _uniform(f"{name}.{key}", built.shape, 0.0, bound)
        elif key in parameters:  # tokens, positions, scales, and projections of attention
            state[key] = _uniform(f"{name}.{key}", built.shape, 0.0, 1.0 / math.sqrt(built.shape[-1]))
        else:  # a table of indices, computed when the network was built
            state[key] = built.clone()
    return state


def _uniform(stream: str, shape: tuple[int, ...], centre: float, half_width: float) -> Tensor:
    """Return a float32 tensor, uniform in centre ± half_width, from the stream of that name."""
    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    draws = np.random.Generator(np.random.PCG64(seed)).random(math.prod(shape), dtype=np.float32)  # k / 2^24
    draws *= np.float32(2.0)
    draws -= np.float32(1.0)
    draws *= np.float32(half_width)
    if centre:
        draws += np.float32(centre)
    return torch.from_numpy(draws).reshape(shape)


# ---------------------------------------------------------------- of a command line


class WeightsSources(Mapping[str, WeightsSource]):
    """The source of every model's weights: files for some; for all others torchvision, or the seed."""

    def __init__(self, files: Mapping[str, Path], pretrained: bool) -> None:
        self._files = files
        self._pretrained = pretrained

    def __getitem__(self, name: str) -> WeightsSource:
        """Return the source of a model's weights; a file for its usual size is used for all sizes."""
        file = self._files.get(name) or self._files.get(name.partition("@")[0])
        has_trained = self._pretrained and not file and torchvision_name(name) is not None
        return WeightsSource(file, has_trained)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def parse_weights(catalogue: Catalogue, texts: Sequence[str], pretrained: bool) -> WeightsSources:
    """Return the source of every model's weights from a command line.

    Args:   texts: ``MODEL=FILE``, or ``FILE`` for the classic network that it fits.
            pretrained: torchvision's weights for all other models that have them.
    Raises: UsageError: a file is missing, does not fit, or two are given for one model.
    """
    files: dict[str, Path] = {}
    for text in texts:
        named = re.fullmatch(r"([\w:.@]+)=(.+)", text)
        path = Path(named[2] if named else text)
        if not path.is_file():
            raise WeightsError(f"weights file {path} does not exist")
        if named:
            model = catalogue.canonical_name(named[1])
            check_weights_file(catalogue, model, path)
        else:
            model = model_of_weights(catalogue, path)
        if model in files:
            raise UsageError(f"two weights files for {model}: {files[model]} and {path}")
        files[model] = path
    return WeightsSources(files, pretrained)
