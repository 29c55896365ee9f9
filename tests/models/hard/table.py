"""The rows of the table of hard modules, and the parts from which most of them are made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

RIGHT, RIGHT_OR_REFUSED, REFUSED = "right", "right or refused", "refused"
STATE = r"state|changes|attribute|buffer"
CHANCE = r"random|chance|draw|state"
DATA = r"depend|control flow|data"


def image(height: int = 32, width: int = 32, channels: int = 3, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Return the values of an image, (batch, channels, height, width)."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def features(*shape: int, seed: int = 0) -> Tensor:
    """Return random values of any shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Hard:
    """A module, its inputs, and the verdict that a user wants.

    ``wanted``: the split must compute what the module computes (right), must be refused with a message that matches
    ``refusal``, or either.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Any = field(default_factory=image)  # a tuple: by position; a dict: by name; anything else: one argument
    wanted: str = RIGHT
    refusal: str = ""


class Table(list[Hard]):
    """The hard modules of one kind; its decorators add classes, and functions that return modules."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def add(
        self, name: str, build: Callable[[], nn.Module], wanted: str = RIGHT, refusal: str = "", **row: Any
    ) -> None:
        """Add one row. Args: name: without its kind."""
        self.append(Hard(f"{self.kind}/{name}", build, wanted=wanted, refusal=refusal, **row))

    def row(self, wanted: str = RIGHT, refusal: str = "", **row: Any) -> Callable[[Any], Any]:
        """Return a decorator that adds a class or a function, named after it."""

        def add(build: Any) -> Any:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", build.__name__)
            self.add(words.replace("_", "-").lower(), build, wanted, refusal, **row)
            return build

        return add

    @property
    def right(self) -> Callable[[Any], Any]:
        """Return the decorator of a module with one image that must be split right."""
        return self.row()


class Base(nn.Module):
    """A convolution and a classifier: (1, 3, 32, 32) becomes (1, 8, 16, 16), and then (1, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 6)

    def classify(self, y: Tensor) -> Tensor:
        """Return the classes of features, (1, 8, height, width)."""
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Any:
        """Return the classes of an image."""
        return self.classify(self.stem(x))


class With(Base):
    """Applies a function to the features."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Return the classes of what the function returns."""
        return self.classify(self.function(self.stem(x)))


def seasoned(norm: Any) -> Any:
    """Return a norm with statistics and factors that are not those of a new one."""
    features = norm.num_features
    if norm.running_mean is not None:
        norm.running_mean.copy_(torch.linspace(-0.5, 0.5, features))
        norm.running_var.copy_(torch.linspace(0.5, 2.0, features))
    if norm.weight is not None:
        norm.weight.data.copy_(torch.linspace(-1.5, 1.5, features))
        norm.bias.data.copy_(torch.linspace(1.0, -1.0, features))
    return norm


class Normed(Base):
    """Has a convolution with a batch norm after it: (1, 8, 16, 16) becomes (1, 8, 14, 14)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.norm = seasoned(nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Any:
        """Return the classes of an image."""
        return self.classify(self.norm(self.conv(self.stem(x))))
