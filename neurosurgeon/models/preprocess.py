"""Images as 8-bit pixels: a network's input at a quarter of the bytes.

What a network computes on are the pixels, scaled and normalised. Both halves of a cut do that themselves, so that an
image crosses as it was read, and becomes the same values on all machines of a kind.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# torchvision's evaluation transform for the classic networks (its ImageClassification preset).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEPT_ROWS = 64  # widths of images, on any device


def as_values(tensor: Tensor) -> Tensor:
    """Return pixels (n, 3, h, w) uint8 as what a network computes on, float32, channels-last; values as they are.

    (pixel / 255 - mean) / std as a multiplication and an addition, by rows: long ones run at the speed of memory.
    """
    if tensor.dtype != torch.uint8:
        return tensor
    count, colours, height, width = tensor.shape
    scale, shift = _row(width, tensor.device)
    rows = tensor.permute(0, 2, 3, 1).reshape(count * height, width * colours).float()
    return torch.addcmul(shift, rows, scale).view(count, height, width, colours).permute(0, 3, 1, 2)


def as_network_input(tensor: Tensor, device: str) -> Tensor:
    """Return an input's values where and how a network computes: channels-last on the CPU."""
    tensor = as_values(tensor.to(device))
    if device != "cpu":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def synchronise(device: str) -> None:
    """Wait until ``device`` has computed everything that it was given; a CPU always has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@lru_cache(KEPT_ROWS)
def _row(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factors and the summands of a row of an image, (3 width,) each."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    scale, shift = (column.float().repeat(width).to(device) for column in (1 / (255 * std), -mean / std))
    return scale, shift
