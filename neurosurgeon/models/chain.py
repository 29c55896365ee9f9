"""The shape of a chain network: layers that run one after another, each a possible partition point."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class ChainNetwork(nn.Module):
    """A network that is iterated, indexed and measured with ``len`` by its layers.

    A layer is a leaf module or a block; partition point ``p`` lies behind the first ``p`` layers.
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
