"""Computed shapes are those of a run on data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.models.names import ZOO
from tests.networks import load_network, random_input, trace_module


@pytest.mark.parametrize("name", list(ZOO))
def test_shape_of_every_layer_is_that_of_its_output(name: str) -> None:
    network = load_network(name)
    value = as_tensor(random_input())
    with torch.inference_mode():
        for module, layer in zip(network.module, network.graph.layers, strict=True):  # type: ignore[call-overload]
            value = module(value)
            assert layer.output.shape == tuple(value.shape), layer.name


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.AdaptiveAvgPool2d((3, None)),
        nn.AdaptiveAvgPool2d(2),
        nn.AvgPool2d(3, 2),
        nn.Linear(10, 7),
        nn.Hardswish(),
    ],
    ids=repr,
)
def test_shape_of_a_module_is_that_of_its_output(module: nn.Module) -> None:
    shape = (1, 4, 11, 10)
    graph = trace_module(nn.Sequential(module), shape, "one", is_own=False)
    with torch.inference_mode():
        assert graph.outputs[0].spec.shape == tuple(module(torch.zeros(shape)).shape)


def test_shape_of_a_sum_that_broadcasts() -> None:
    class Broadcast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(x)[:, :1]

    assert trace_module(Broadcast(), (1, 4, 3, 3), "sum", is_own=False).outputs[0].spec.shape == (1, 4, 3, 3)
