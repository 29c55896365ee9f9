"""Modules that depend on the order of a tensor in memory, which channels-last changes."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.models.hard.table import RIGHT_OR_REFUSED, Base, Table, With, features

MEMORY_ORDER = Table("memory-order")

FUNCTIONS = {
    "view-across-channels": lambda y: (y.view(1, 16, 128).cumsum(1)[:, ::2] / 10).view(1, 8, 8, 16),
    "view-of-all": lambda y: y.view(-1).cumsum(0).view(1, 8, 16, 16) / 100,
    "view-as-complex": lambda y: torch.view_as_real(torch.view_as_complex(y.reshape(1, 8, 16, 8, 2)) * 1j).flatten(3),
    "real-and-imaginary": lambda y: torch.complex(y, y.flip(3)).conj().imag,
    "is-contiguous": lambda y: y * 2 if y.is_contiguous() else y * 3,
    "is-channels-last": lambda y: y * 2 if y.is_contiguous(memory_format=torch.channels_last) else y * 3,
    "stride-as-number": lambda y: y * (y.stride(1) / 100),
    "strides-choose": lambda y: y.flip(3).cumsum(3) if y.stride()[-1] == 1 else y,
    "spectrum": lambda y: torch.fft.rfft2(y).abs() / 10,
    "spectrum-and-back": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=(16, 16)),
    "spectrum-of-columns": lambda y: torch.fft.fft(y, dim=1).real / 4,
    "to-channels-last": lambda y: y.to(memory_format=torch.channels_last) * 2,
    "contiguous-again": lambda y: y.permute(0, 2, 3, 1).contiguous().view(1, 16, 16, 8).permute(0, 3, 1, 2),
    "five-dimensions": lambda y: y.view(1, 2, 4, 16, 16).transpose(1, 2).reshape(1, 8, 16, 16),
    "channel-shuffle": lambda y: F.channel_shuffle(y, 4) * torch.arange(8.0).view(1, 8, 1, 1),
    "pixel-shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2) * 2, 2),
    "space-to-depth": lambda y: y.unfold(2, 4, 4).unfold(3, 4, 4).contiguous().view(1, 8, 16, 16) ** 2,
    "view-as-type": lambda y: y.view(torch.int32).view(torch.float32),
    "storage-offset": lambda y: y * (y[:, 1:].storage_offset() + 1) / 100,
}
for name, function in FUNCTIONS.items():
    MEMORY_ORDER.add(name, partial(With, function))
MEMORY_ORDER.add(
    "as-strided",
    partial(With, lambda y: torch.as_strided(y, (1, 8, 16, 8), (2048, 256, 16, 2))),
    RIGHT_OR_REFUSED,
    r"as_strided|memory",
)
MEMORY_ORDER.add(
    "as-strided-after-offset",
    partial(With, lambda y: torch.as_strided(y, (1, 8, 4, 4), (2048, 256, 64, 4), 3)),
    RIGHT_OR_REFUSED,
    r"as_strided|memory",
)


@MEMORY_ORDER.right
class Conv3dInside(Base):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv3d(8, 8, (1, 3, 3))

    def forward(self, x):
        return self.head(self.deep(self.stem(x)[:, :, None]).mean((2, 3, 4)))


@MEMORY_ORDER.right
class Conv1dInside(Base):
    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(8, 8, 5, padding=2)

    def forward(self, x):
        return self.head(self.line(self.stem(x).flatten(2)).mean(2))


@MEMORY_ORDER.right
class ThreeDimensionsOfImage(Base):
    def forward(self, x):
        return self.head(self.stem(x.squeeze(0)).mean((1, 2)))


@MEMORY_ORDER.row(inputs=features(1, 3, 4, 16, 16))
class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm3d(8)

    def forward(self, x):
        return self.norm(self.stem(x)).amax((3, 4)).flatten(1)


@MEMORY_ORDER.row(inputs=features(2, 3, 4, 16, 16))
class FramesAsBatch(Base):
    def forward(self, x):
        y = self.stem(x.transpose(1, 2).flatten(0, 1))
        return self.head(y.unflatten(0, (2, 4)).mean((1, 3, 4)))


@MEMORY_ORDER.right
class OneChannelInside(Base):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        y = self.one(self.stem(x))
        return self.head(y.view(16, 16)[:, :8].contiguous())


@MEMORY_ORDER.right
class WeightsAsNumbersInMemory(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y) + self.stem.weight.view(-1)[:6] + self.stem.weight.reshape(8, -1).cumsum(1)[:6, 5]


@MEMORY_ORDER.row(inputs=features(1, 3, 32, 32).to(memory_format=torch.channels_last))
class GivenChannelsLast(Base):
    pass
