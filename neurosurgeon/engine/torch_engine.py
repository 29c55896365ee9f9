"""Collaborative inference on one machine's side: inputs, devices, running a half, and the study of layers."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurosurgeon.edge.inputs import read_image
from neurosurgeon.edge.records import Guess
from neurosurgeon.graph.spec import TensorSpec, takes_images
from neurosurgeon.models.preprocess import as_values
from neurosurgeon.models.zoo import INPUT_SHAPE, Network
from neurosurgeon.utils.errors import DeviceError, NonFiniteError, ProtocolError
from neurosurgeon.utils.timing import now_ms, synchronise

log = logging.getLogger(__name__)

RANDOM_INPUT_SEED = 0
BATCH_TOLERANCE = 1e-3  # of the largest output: sums in another order differ by less, another image by more


# ---------------------------------------------------------------- device and input


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises: DeviceError.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("this machine has no CUDA device that torch can use: run with -d cpu")


def use_threads(threads: int) -> int:
    """Compute with ``threads`` CPU threads, at most as many as there are cores; return how many."""
    cores = os.cpu_count() or 1
    if threads > cores:
        log.warning("%d threads asked for, but there are %d cores: using %d", threads, cores, cores)
    torch.set_num_threads(min(threads, cores))
    return min(threads, cores)


def load_image(path: Path, size: int = INPUT_SHAPE[-1]) -> Tensor:
    """Return an image file as a network's input, (1, 3, size, size) uint8.

    Raises: InputError: the file is missing or no image.
    """
    return image_input(read_image(path, size))


def image_input(pixels: NDArray[np.uint8]) -> Tensor:
    """Return pixels (H, W, 3) as (1, 3, H, W) uint8, channels-last as images are."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def stand_in(shape: Sequence[int] = INPUT_SHAPE) -> Tensor:
    """Return what a network gets that is given nothing: an image of noise, the same on every run, uint8.

    A network with no input of three colours gets values, float32.
    """
    generator = np.random.Generator(np.random.PCG64(RANDOM_INPUT_SEED))
    if takes_images(TensorSpec(tuple(shape))):
        count, colours, height, width = shape
        pixels = generator.integers(256, size=(count, height, width, colours), dtype=np.uint8)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return as_network_input(torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)), "cpu")


def random_input(shape: Sequence[int] = INPUT_SHAPE) -> Tensor:
    """Return the values of `stand_in`, float32."""
    return as_values(stand_in(shape))


# ---------------------------------------------------------------- running


WireSpec = tuple[str, tuple[int, ...], bool]  # of a tensor that crosses: dtype, shape, channels-last


class HalfResult(NamedTuple):
    """What a half of a network made, and how long it took on this machine."""

    tensors: tuple[Tensor, ...]
    latency_ms: float


@overload
def run_half(module: nn.Module, tensors: Sequence[Tensor], device: str = "cpu") -> HalfResult: ...


@overload
def run_half(
    module: nn.Module, tensors: Sequence[Tensor], device: str, keep_going: Callable[[], bool] | None
) -> HalfResult | None: ...


def run_half(
    module: nn.Module, tensors: Sequence[Tensor], device: str = "cpu", keep_going: Callable[[], bool] | None = None
) -> HalfResult | None:
    """Run one half on tensors in host memory; making values of pixels, and a GPU's copies, are part of its latency.

    Tensors keep their order of memory: another one would be another sum, with other last bits.

    Args:    keep_going: called between two blocks of the half (`models.partition.Half`), which then ends where it
                         returns False.
    Returns: None where it was told to stop.
    """
    start_ms = now_ms()
    run = module if keep_going is None else partial(module, keep_going=keep_going)
    with torch.inference_mode():
        outputs = run(*(tensor.to(device) for tensor in tensors))
    if outputs is None:
        return None
    outputs = tuple(output.cpu() for output in outputs)
    synchronise(device)
    return HalfResult(outputs, now_ms() - start_ms)


def allows_batches(half: nn.Module, crossing: Sequence[TensorSpec], device: str) -> bool:
    """Return whether a half makes of several tasks, joined along the first dimension, what it makes of each.

    A network may well mix the images of a batch, or take their number for granted; so two random tasks are tried.
    """
    generator = torch.Generator().manual_seed(RANDOM_INPUT_SEED)
    if not all(spec.shape[:1] == (1,) and getattr(torch, spec.dtype).is_floating_point for spec in crossing):
        return False
    tasks = [
        [torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype)) for spec in crossing]
        for _ in range(2)
    ]
    try:
        apart = [run_half(half, [tensor.clone() for tensor in task], device).tensors for task in tasks]
        together = run_half(half, [torch.cat(pair) for pair in zip(*tasks, strict=True)], device).tensors
        expected = [torch.cat(pair) for pair in zip(*apart, strict=True)]
        scales = [BATCH_TOLERANCE * tensor.abs().max().item() for tensor in expected]
    except Exception as exc:  # a network may refuse a batch in any way
        log.debug("no batches for this half: %s", exc)
        return False
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=scale, equal_nan=True)
        for one, other, scale in zip(together, expected, scales, strict=True)
    )


def as_network_input(tensor: Tensor, device: str) -> Tensor:
    """Return an input's values where and how the network computes: channels-last on the CPU."""
    tensor = as_values(tensor.to(device))
    if device != "cpu":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def run_whole(network: Network, tensor: Tensor) -> Tensor:
    """Return the output of the unsplit network, on the host."""
    with torch.inference_mode():
        output: Tensor = network.module(as_network_input(tensor, network.device))
    return output.cpu()


def check_crossing(expected: Sequence[TensorSpec], given: Sequence[WireSpec]) -> None:
    """Compare what came with what crosses at a partition point.

    Args:   given: dtype, shape and memory format of each tensor.
    Raises: ProtocolError: another number, shape or dtype.
    """
    came = [(dtype, shape) for dtype, shape, _ in given]
    if came != [(spec.dtype, spec.shape) for spec in expected]:
        raise ProtocolError(f"{[spec.shape for spec in expected]} crosses at this point, not {came}")


def check_finite(tensors: Sequence[NDArray[Any]]) -> None:
    """Refuse tensors with NaN or infinite values, at the cost of two passes over them.

    numpy makes them, so that no team of threads is started beside the workers'.

    Args:   tensors: the values of each, in any order, (n,); of bfloat16 the bits, as uint16.
    Raises: NonFiniteError.
    """
    for number, values in enumerate(tensors):
        if not is_finite(values):
            raise NonFiniteError(
                f"tensor {number} holds NaN or infinite values: check the input and the weights, or start the cloud "
                "with --allow-nonfinite"
            )


def is_finite(values: NDArray[Any]) -> bool:
    """Return whether no value is NaN or infinite: such a one is the largest or the smallest.

    Args: values: (n,); of bfloat16, which numpy does not know, the bits, as uint16: an exponent of all ones tells.
    """
    if values.dtype == np.uint16:
        return not ((values & 0x7F80) == 0x7F80).any()
    if values.dtype.kind != "f" or not values.size:
        return True
    return math.isfinite(np.maximum.reduce(values)) and math.isfinite(np.minimum.reduce(values))


# ---------------------------------------------------------------- answers


def top_guesses(output: Tensor, labels: Sequence[str] | None, count: int = 5) -> list[Guess]:
    """Return the most probable classes of logits (1, classes), best first; none where the output is something else."""
    if output.dim() != 2:
        return []
    probabilities = output.float().softmax(dim=-1)[0]
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return [
        Guess(index, labels[index] if labels else None, value)
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def top_class(output: Tensor) -> int | None:
    """Return the index of the largest value; None where there is none."""
    if not output.numel() or output.is_complex():
        return None
    return int((output.int() if output.dtype == torch.bool else output).argmax())


# ---------------------------------------------------------------- the layer study


def output_digest(output: Tensor) -> str:
    """Return what tells two answers apart, to the last bit."""
    import torch

    return hashlib.sha256(output.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
