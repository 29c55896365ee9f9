"""The digest of a network's structure: the same in every process, another one for whatever computes something else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neurosurgeon.cli.process import ROOT
from neurosurgeon.graph.spec import Preprocessing
from neurosurgeon.models.build import TracedGraph, trace
from neurosurgeon.models.digest import stable_text
from neurosurgeon.models.program import Example

INPUT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3), nn.ReLU()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def graph_of(function: Callable[..., Any], inputs: Any = INPUT, **options: Any) -> TracedGraph:
    return trace(Calls(function).eval(), "own", Example.of(inputs), **options)


def plain(self: Any, x: Tensor) -> Any:
    return self.relu(self.conv(x)) + 1


def of_other_code(module: Any, values: Tensor) -> Any:
    made = module.relu(module.conv(values))  # the same program, of other names
    return made + 1


class Pair(NamedTuple):
    one: Any
    two: Any


VARIANTS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "another number": lambda self, x: self.relu(self.conv(x)) + 2,
    "another type of number": lambda self, x: self.relu(self.conv(x)) + 1.5,
    "another operation": lambda self, x: self.relu(self.conv(x)) - 1,
    "another order": lambda self, x: self.relu(self.conv(x) + 1),
    "another operand": lambda self, x: self.conv(self.conv(x)) + 1,
    "another function": lambda self, x: functional.leaky_relu(self.conv(x)) + 1,
    "another setting": lambda self, x: functional.leaky_relu(self.conv(x), 0.5) + 1,
    "another type": lambda self, x: (self.relu(self.conv(x)) + 1).double(),
    "in a list": lambda self, x: [plain(self, x)],
    "in a tuple": lambda self, x: (plain(self, x),),
    "by name": lambda self, x: {"scores": plain(self, x)},
    "by another name": lambda self, x: {"logits": plain(self, x)},
    "with a constant": lambda self, x: (plain(self, x), 3),
    "with another constant": lambda self, x: (plain(self, x), 4),
    "two": lambda self, x: Pair(plain(self, x), self.conv(x)),
    "two in another order": lambda self, x: Pair(self.conv(x), plain(self, x)),
    "two of one": lambda self, x: Pair(plain(self, x), plain(self, x)),
}


@pytest.mark.parametrize("is_own", [True, False])
def test_networks_that_compute_different_things_have_different_digests(is_own: bool) -> None:
    digests = {name: graph_of(function, is_own=is_own).digest for name, function in VARIANTS.items()}
    assert len(set(digests.values())) == len(VARIANTS), digests


@pytest.mark.parametrize("is_own", [True, False])
def test_networks_that_compute_the_same_have_one_digest(is_own: bool) -> None:
    first = graph_of(plain, is_own=is_own)
    torch.manual_seed(7)  # other weights
    assert graph_of(of_other_code, is_own=is_own).digest == first.digest


def test_inputs_are_part_of_the_structure() -> None:
    inputs: list[Any] = [
        (INPUT,),
        (INPUT, 2),
        (INPUT, 3),
        (INPUT, torch.ones(8)),
        (INPUT, torch.ones(1)),
        (INPUT, torch.ones(8, dtype=torch.float64)),
        {"x": INPUT, "y": torch.ones(8)},
        (torch.ones(1, 4, 9, 9),),
    ]
    digests = [graph_of(lambda self, x, y=1: self.conv(x).mean() * y, given).digest for given in inputs]
    assert len(set(digests)) == len(inputs)


def test_the_scaling_of_images_is_part_of_the_structure() -> None:
    one, other = (graph_of(plain, preprocessing=Preprocessing(mean=(mean,) * 3)) for mean in (0.4, 0.5))
    assert one.digest != other.digest


def test_the_branches_of_cond_are_part_of_the_structure() -> None:
    def network(share: float) -> TracedGraph:
        return graph_of(lambda self, x: torch.cond(x.sum() > 0, lambda x: x * share, lambda x: x - 1, (x,)))

    assert network(2.0).digest != network(3.0).digest
    assert network(2.0).digest == network(2.0).digest


# ---------------------------------------------------------------- modules that are called whole


def with_hook(value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * value)
    return model


def with_another_hook(value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output + value)
    return model


def with_replaced_forward(value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    model[1].forward = partial(functional.leaky_relu, negative_slope=value)
    return model


BUILT: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
    "hook": lambda: with_hook(2.0),
    "hook with another value": lambda: with_hook(3.0),
    "another hook": lambda: with_another_hook(2.0),
    "forward": lambda: with_replaced_forward(0.1),
    "another forward": lambda: with_replaced_forward(0.2),
    "another setting": lambda: nn.Sequential(nn.Conv2d(4, 4, 1, padding=1), nn.ReLU()),
    "another module": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.SELU()),
}


def test_settings_and_hooks_of_called_modules_are_part_of_the_structure() -> None:
    def digest(build: Callable[[], nn.Module]) -> str:
        return trace(build().eval(), "own", Example.of(INPUT), is_own=False).digest

    digests = {name: digest(build) for name, build in BUILT.items()}
    assert len(set(digests.values())) == len(BUILT), digests
    assert digests == {name: digest(build) for name, build in BUILT.items()}


# ---------------------------------------------------------------- texts of modules


class Colour(Enum):
    RED = 1


class Plain:
    def __init__(self, value: int) -> None:
        self.value = value


def make_adder(value: Any) -> Callable[[Any], Any]:
    return lambda x: x + value


def recursive(depth: int) -> Any:
    return depth and recursive(depth - 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (1, 1.0),
        ([1], (1,)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({1, 2}, {1, 3}),
        (np.arange(3), np.arange(3) + 1),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64)),
        (torch.float32, torch.float64),
        (Colour.RED, 1),
        (Plain(1), Plain(2)),
        (make_adder(1), make_adder(2)),
        (partial(make_adder, 1), partial(make_adder, 2)),
        (make_adder, recursive),
        (Plain(1).__init__, Plain(1).__repr__),
        (nn.ReLU(), nn.ReLU(inplace=True)),
        (nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3)),
        (slice(1), slice(2)),
        (Path("a"), Path("b")),
    ],
    ids=repr,
)
def test_different_settings_have_different_texts(one: Any, other: Any) -> None:
    def text(value: Any) -> str:
        return stable_text(Calls(plain, setting=[value]))

    assert text(one) != text(other)
    assert text(one) == text(one)


def test_modes_weights_and_addresses_are_left_out() -> None:
    torch.manual_seed(1)
    one = Calls(plain, setting=Plain(3), device=torch.device("cpu"))
    torch.manual_seed(2)
    other = Calls(plain, setting=Plain(3), device=torch.device("meta"))
    assert stable_text(one.train()) == stable_text(other.eval())
    assert " at 0x" not in stable_text(one)


def test_a_setting_that_holds_itself_has_a_text() -> None:
    setting: list[Any] = [1]
    setting.append(setting)
    module = Calls(plain, setting=setting, function_of_itself=recursive)
    module.parent = [module]  # type: ignore[assignment]
    assert stable_text(module)


def test_a_function_that_closes_over_a_variable_without_a_value_has_a_text() -> None:
    def early() -> Any:
        return late()

    assert stable_text(Calls(early))

    def late() -> int:
        return 1

    assert stable_text(Calls(early))


PROGRAM = """
import torch
from torch import nn
from neurosurgeon.models.build import trace
from neurosurgeon.models.digest import stable_text
from neurosurgeon.models.program import Example

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.names = nn.Conv2d(4, 4, 3), {"a", "b", "c", "d"}

    def forward(self, x):
        return {"y": torch.relu(self.conv(x)) * torch.linspace(0, 1, 6), "names": len(self.names)}

model = Own().eval()
print(trace(model, "own", Example.of(torch.zeros(1, 4, 8, 8))).digest, stable_text(model))
"""


def test_digests_and_texts_are_the_same_in_every_process(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(PROGRAM)

    def run(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, file], env=environment, capture_output=True, text=True, check=True
        ).stdout

    outputs = [run(seed) for seed in ("1", "2")]
    assert len(outputs[0]) > 64
    assert len(set(outputs)) == 1
