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
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        array: Any = tensor.numpy().reshape(-1)
        total.update(memoryview(array).cast("B"))
    return total.hexdigest()[:DIGEST_HEX_CHARS]


# ---------------------------------------------------------------- sources


def load_state(name: str, model: nn.Module, source: WeightsSource) -> tuple[dict[str, Tensor], bool]:
    """Return the parameters of a network by name, and whether they are torchvision's.

    Raises: WeightsError: the file does not fit, or there are no pretrained weights.
    """
    if source.file is not None:
        state = _without_training_heads(read_weights_file(source.file), model)
        check_fit(model, state, f"{source.file} does not fit {name}")
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        state = {key: value for key, value in {**counters, **state}.items() if key in model.state_dict()}
        return _as_float32(state), _is_official_checkpoint(name, source.file)
    if source.pretrained:
        return _as_float32(_without_training_heads(_pretrained_state(name), model)), True
    if is_own(name):  # its function has made the weights
        return dict(model.state_dict()), False
    return seeded_state(name.partition("@")[0], model), False


def _without_training_heads(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint without the parameters of training heads that the model does not have."""
    own = {key.split(".")[0] for key in model.state_dict()}
    return {key: value for key, value in state.items() if key.split(".")[0] not in TRAINING_HEADS - own}


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint (``weights_only``) or of a safetensors file.

    A ``state_dict`` wrapped in a training checkpoint, or saved by a data-parallel wrapper, is unwrapped.

    Raises: WeightsError: the file is missing, unreadable, or no mapping of names to tensors.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise WeightsError(f"weights file {path} does not exist") from exc
    except ImportError as exc:
        raise WeightsError(f"reading {path} needs one more package: pip install safetensors") from exc
    except Exception as exc:  # the two readers raise many types, with one meaning for the user
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise WeightsError(f"weights file {path} cannot be read: {reason}") from exc
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"weights file {path} holds no state_dict (names with tensors)")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def check_fit(model: nn.Module, state: Mapping[str, Tensor], failure: str) -> None:
    """Check that weights have the names and shapes of the model's parameters.

    Args:   failure: the beginning of the error message.
    Raises: WeightsError: names the first parameter that is missing, unknown or of another shape or type.
    """
    expected, given = (
        {key: value for key, value in each.items() if not key.endswith("num_batches_tracked")}
        for each in (model.state_dict(), state)
    )
    for key, value in expected.items():
        tensor = given.get(key)
        if tensor is None:
            raise WeightsError(f"{failure}: {key} is missing")
        if tensor.shape != value.shape:
            raise WeightsError(f"{failure}: {key} has shape {tuple(tensor.shape)}, expected {tuple(value.shape)}")
        if not tensor.is_floating_point() or tensor.is_sparse or tensor.is_meta:
            layout = "sparse " if tensor.is_sparse else "empty " if tensor.is_meta else ""
            raise WeightsError(f"{failure}: {key} is {layout}{tensor.dtype}, expected floating-point numbers")
    for key in given:
        if key not in expected:
            raise WeightsError(f"{failure}: {key} is not a parameter of it")


def check_weights_file(catalogue: Catalogue, name: str, path: Path) -> None:
    """Check that a weights file fits a model. Raises: WeightsError."""
    model = catalogue.build_module(name)
    check_fit(model, _without_training_heads(read_weights_file(path), model), f"{path} does not fit {name}")


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
    state = read_weights_file(path)
    for name in ZOO:
        try:
            check_fit(catalogue.build_module(name), state, "")
        except WeightsError:
            continue
        return name
    raise WeightsError(f"weights file {path} fits none of {', '.join(ZOO)}")


def _as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


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
