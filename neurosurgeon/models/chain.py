"""The base class of chain networks: layers that run one after another, with a partition point after each."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class ChainNetwork(nn.Module):
    """A network as a sequence of its layers: it can be iterated and indexed, and has a length.

    A layer is a leaf module or a block; partition point ``p`` is after the first ``p`` layers.
    """

    def layers(self) -> list[nn.Module]:
        """Return the layers in execution order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 224, 224) -> (N, classes)
        for layer in self.layers():
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers())

    def __len__(self) -> int:
        return len(self.layers())

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers()[index]
