"""The weights of networks: from a file of the user, torchvision's checkpoints, or a fixed seed.

The seed gives the same bits on every machine. Two machines hold the same weights if their digests are equal, whatever
the origin of the weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.checkpoints import fitting_names, read_checkpoint
from neurosurgeon.models.names import (
    ZOO,
    is_own,
    name_parts,
    torchvision_name,
    torchvision_weights,
    usual_classes,
)
from neurosurgeon.utils.errors import WeightsError

if TYPE_CHECKING:  # torch takes a second to import, which names and spelling checks do not need
    from torch import Tensor, nn

REASON_CHARS = 300  # of what a module says when it does not load its weights
TRAINING_HEADS = {"aux1", "aux2", "AuxLogits"}  # of GoogLeNet and Inception, in their checkpoints
DIGEST_HEX_CHARS = 32  # 128 bits: no collisions, and short enough to read


def of_this_version(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return parameters with the versions of their modules, by default the model's, as `load_state_dict` expects."""
    stamped = OrderedDict(state)
    stamped._metadata = getattr(state, "_metadata", model.state_dict()._metadata)  # type: ignore[attr-defined]
    return stamped


def weights_digest(state: Mapping[str, Any]) -> str:
    """Return 128 bits of SHA-256 over names, types, shapes and bytes of all parameters, buffers and extra states.

    Raises: WeightsError: names a tensor whose values have no bytes in this order (sparse, quantised).
    """
    import torch
    from torch.utils import _pytree

    total = hashlib.sha256()
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):  # a counter of training; the outputs do not depend on it
            continue
        leaves, structure = _pytree.tree_flatten(state[key])  # an extra state may be a tree
        if not isinstance(state[key], torch.Tensor):
            total.update(f"{key} {structure}\n".encode())
        for leaf in leaves:
            total.update(_digested(key, leaf))
    return total.hexdigest()[:DIGEST_HEX_CHARS]


def _digested(key: str, value: Any) -> bytes:
    """Return what is digested of a value: of a tensor its type, shape and bytes."""
    import torch

    from neurosurgeon.models.digest import stable_text

    if not isinstance(value, torch.Tensor):
        return f"{key} {stable_text(value)}\n".encode()
    try:
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError) as exc:
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
        raise WeightsError(f"{key} has values that cannot be compared on both sides ({kind}): make it dense") from exc
    return f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + content


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
        try:
            check_fit(model, state, f"{source.file} does not fit {name}")
        except WeightsError as exc:
            if other := of_other_classes(name, model, state):
                raise WeightsError(f"{exc}; it may fit {other}: pass --classes, or that name") from exc
            raise
        is_official = _is_official_checkpoint(name, source.file)
    elif source.pretrained:
        state, is_official = _without_training_heads(_pretrained_state(name), model), True
    elif is_own(name):
        return False
    else:
        state = seeded_state(name_parts(name).base, model)
    try:
        _fill(model, state)
    except Exception as exc:  # the user's module may load its state in its own way
        reason = " ".join(str(exc).split())[:REASON_CHARS]
        raise WeightsError(f"{source.file or name}: {name} does not load its weights: {reason}") from exc
    return is_official


def _fill(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in state}
    state = {key: value for key, value in state.items() if key in own} | counters
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        # Without storage: the tensors of the state become the network's own.
        state = {key: value.to(own[key].dtype) for key, value in state.items()}
        model.load_state_dict(of_this_version(state, model), assign=True)
    else:
        model.load_state_dict(of_this_version(state, model))


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
    return _with_shared(_without_training_heads(state, model), own, path)


def _with_shared(state: dict[str, Any], own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return weights with those that share memory with another one, which safetensors writes once.

    Raises: WeightsError: two that share memory in the network differ in the file.
    """
    import torch

    first: dict[object, str] = {}  # of the names in the file that share memory
    for key in (key for key in own if key in state):
        place = _place(own[key])
        other = first.setdefault(place, key) if place else key
        if other != key and not torch.equal(state[key], state[other]):
            raise WeightsError(
                f"weights file {path}: {other} and {key} are one tensor of the network, and differ in it"
            )
    missing = {key: first.get(_place(value)) for key, value in own.items() if key not in state}
    return state | {key: state[other] for key, other in missing.items() if other is not None}


def _place(value: Any) -> tuple[Any, ...] | None:
    """Return the memory of a tensor, and how it is read; None if it has none."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_meta or _is_lazy(value) or value.layout != torch.strided:
        return None
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else None


def _is_lazy(value: Any) -> bool:
    """Return whether a parameter gets its shape with its values."""
    from torch.nn.parameter import is_lazy

    return bool(is_lazy(value))


def check_fit(model: nn.Module, state: Mapping[str, Any], failure: str) -> None:
    """Check that weights have the names, the shapes and kinds of numbers of the model's parameters and buffers.

    Args:   failure: the beginning of the error message.
    Raises: WeightsError: names the first parameter that is missing, unknown or of another shape or kind.
    """
    expected, given = (
        {key: value for key, value in each.items() if not key.endswith("num_batches_tracked")}
        for each in (model.state_dict(), state)
    )
    for key, value in expected.items():
        if key not in given:
            raise WeightsError(f"{failure}: {key} is missing")
        if misfit := _misfit(given[key], value):
            raise WeightsError(f"{failure}: {key} {misfit}")
    for key in given:
        if key not in expected:
            raise WeightsError(f"{failure}: {key} is not a parameter of it")


def _misfit(given: Any, own: Any) -> str | None:
    """Return why a value cannot be that of a parameter, a buffer or an extra state; None if it can."""
    import torch

    if not isinstance(given, torch.Tensor) or not isinstance(own, torch.Tensor):
        same = type(given) is type(own)
        return None if same else f"is a {type(given).__name__}, expected {type(own).__name__}"
    if given.is_sparse or given.is_meta:
        return f"is {'sparse' if given.is_sparse else 'empty'}, expected numbers"
    if _is_lazy(own):
        return None
    if given.shape != own.shape:
        return f"has shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    return None if _can_become(given, own) else f"is {given.dtype}, expected {_expected_kind(own)}"


def _can_become(given: Tensor, own: Tensor) -> bool:
    """Return whether numbers can be copied into a parameter: floats of any size, and integers that keep their value."""
    kinds = [(each.is_floating_point(), each.is_complex(), each.is_quantized) for each in (given, own)]
    if kinds[0] != kinds[1]:
        return False
    return any(kinds[0]) or given.dtype == own.dtype or bool((given.to(own.dtype).to(given.dtype) == given).all())


def _expected_kind(own: Tensor) -> str:
    return "floating-point numbers" if own.is_floating_point() else str(own.dtype)


def of_other_classes(name: str, model: nn.Module, state: Mapping[str, Any]) -> str | None:
    """Return the name with the number of classes of a file, if parameters differ from the network's in that alone."""
    parts, usual = name_parts(name), usual_classes(name)
    if usual is None or parts.classes is not None:
        return None
    shapes = [
        (tuple(value.shape), tuple(getattr(state.get(key), "shape", ()))) for key, value in model.state_dict().items()
    ]
    counts = {given[0] for own, given in shapes if given and own != given and own == (usual, *given[1:])}
    return str(parts._replace(classes=counts.pop())) if len(counts) == 1 else None


def check_pretrained(name: str) -> None:
    """Check that torchvision has weights for a model.

    Raises: WeightsError: names the models for which it has weights.
    """
    if name_parts(name).classes is not None:
        raise WeightsError(
            f"torchvision's weights of {name_parts(name).base} have {usual_classes(name)} classes: pass --weights"
        )
    if torchvision_name(name) is None:
        trained = ", ".join(known for known, candidate in ZOO.items() if candidate.torchvision_name)
        raise WeightsError(f"torchvision has no pretrained weights for {name}; it has them for {trained} and its own")


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
