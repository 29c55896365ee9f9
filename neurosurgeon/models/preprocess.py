"""Images as 8-bit pixels, which have a quarter of the bytes of a network's input.

The input of a network is the scaled and normalised pixels. Both partitions of a cut compute it themselves. So an image
is sent as it was read, and becomes the same values on all machines with the same processor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from neurosurgeon.graph.spec import IMAGENET, Array, TensorSpec, synthetic_input

KEPT_ROWS = 64  # widths of images, each on a device


Colours = tuple[float, ...]


def as_values(tensor: Tensor, mean: Colours = IMAGENET.mean, std: Colours = IMAGENET.std) -> Tensor:
    """Return pixels (n, 3, h, w) uint8 as the input of a network, float32, channels-last; other tensors unchanged.

    (pixel / 255 - mean) / std is one multiplication and one addition. It is computed by rows, which are long enough to
    run at the speed of memory.
    """
    if tensor.dtype != torch.uint8:
        return tensor
    count, colours, height, width = tensor.shape
    scale, shift = _row(width, tensor.device, mean, std)
    rows = tensor.permute(0, 2, 3, 1).reshape(count * height, width * colours).float()
    return torch.addcmul(shift, rows, scale).view(count, height, width, colours).permute(0, 3, 1, 2)


def random_input(shape: tuple[int, ...]) -> Tensor:
    """Return the input of a network for a task that has none: a fixed image of noise (n, 3, h, w), as values."""
    return as_values(torch.from_numpy(synthetic_input(TensorSpec(shape)))).contiguous()


def as_network_input(tensor: Tensor, device: str) -> Tensor:
    """Return an input as values on a device; on the CPU channels-last."""
    tensor = as_values(tensor.to(device))
    if device != "cpu":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def synchronise(device: str) -> None:
    """Wait until ``device`` has finished all its work; a CPU has none left. Blocks."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def as_tensor(array: Array) -> Tensor:
    """Return a tensor that shares an array's memory and strides: other strides give sums in another order."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> Array:
    """Return a tensor's values as an array in host memory (`graph.spec`), which a CPU tensor shares."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    is_bfloat16 = tensor.dtype is torch.bfloat16
    array: Array = tensor.view(torch.int16).numpy().view(np.uint16) if is_bfloat16 else tensor.numpy()
    return array


def use_channels_last(module: nn.Module) -> None:
    """Lay the parameters of two-dimensional convolutions out in memory with their channels last, in place."""
    with torch.inference_mode():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


@lru_cache(KEPT_ROWS)
def _row(width: int, device: torch.device, means: Colours, deviations: Colours) -> tuple[Tensor, Tensor]:
    """Return the factors and the summands of the values of one row of an image, (3 width,) each."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (means, deviations))
    scale, shift = (column.float().repeat(width).to(device) for column in (1 / (255 * std), -mean / std))
    return scale, shift
