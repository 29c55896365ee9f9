"""The four architectures: torchvision's parameter names, shapes and outputs, and the interface of a chain."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from neurosurgeon.models.chain import ChainNetwork
from neurosurgeon.models.LeNet import LeNet
from neurosurgeon.models.names import ZOO
from neurosurgeon.models.torchvision_compat import import_torchvision
from neurosurgeon.models.weights import seeded_state
from tests.networks import skeleton

WITH_CHECKPOINTS = [name for name, entry in ZOO.items() if entry.torchvision_name]


def architecture(name: str) -> ChainNetwork:
    """Return a model on the meta device."""
    with torch.device("meta"):
        model: ChainNetwork = getattr(importlib.import_module(ZOO[name].module), ZOO[name].class_name)()
    return model


def torchvision_model(name: str) -> nn.Module:
    """Return torchvision's model on the meta device."""
    with torch.device("meta"):
        model: nn.Module = getattr(import_torchvision(), str(ZOO[name].torchvision_name))()
    return model.eval()


@pytest.mark.parametrize("name", WITH_CHECKPOINTS)
def test_parameters_have_torchvisions_names_and_shapes(name: str) -> None:
    ours = {key: value.shape for key, value in architecture(name).state_dict().items()}
    theirs = {key: value.shape for key, value in torchvision_model(name).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("name", WITH_CHECKPOINTS)
def test_outputs_are_those_of_torchvision(name: str) -> None:
    ours, theirs = skeleton(name), torchvision_model(name)
    state = seeded_state(name, ours)
    for model in (ours, theirs):
        model.load_state_dict(state, assign=True)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_model_is_a_sequence_of_its_layers(name: str) -> None:
    model = architecture(name)
    layers = list(model)
    assert len(model) == len(layers) > 10
    assert [model[index] for index in range(len(model))] == layers
    assert model[-1] is layers[-1]


@pytest.mark.parametrize("name", ZOO)
def test_layers_hold_every_parameter(name: str) -> None:
    model = architecture(name)
    assert {id(p) for layer in model for p in layer.parameters()} == {id(p) for p in model.parameters()}


def test_first_linear_layer_of_le_net_has_46656_inputs() -> None:
    first = next(layer for layer in LeNet() if isinstance(layer, nn.Linear))
    assert first.in_features == 46656


def test_number_of_classes_can_be_chosen() -> None:
    assert LeNet(num_classes=10)(torch.zeros(2, 3, 224, 224)).shape == (2, 10)
