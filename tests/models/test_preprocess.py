"""Images as pixels: what they become, and that both partitions of every cut get the same values from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.graph.spec import IMAGENET, TensorSpec, takes_images
from neurosurgeon.models.preprocess import as_values
from tests.equality import assert_equal
from tests.models.cuts_of import cut_module
from tests.networks import cut, load_network, pixels, random_input, run, run_whole, trace_module


@given(st.integers(1, 3), st.integers(2, 40), st.integers(2, 40), st.booleans(), st.integers(0, 2**32))
def test_as_values_normalises_pixels(count: int, height: int, width: int, is_dense: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images = generator.integers(256, size=(count, height, width, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    values = as_values(pixels.contiguous() if is_dense else pixels)
    expected = (images.astype(np.float64) / 255 - IMAGENET.mean) / IMAGENET.std
    assert (values.dtype, tuple(values.shape)) == (torch.float32, (count, 3, height, width))
    assert values.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(values.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)


def test_as_values_returns_values_unchanged() -> None:
    values = torch.rand(1, 3, 8, 8)
    assert as_values(values) is values


@pytest.mark.parametrize(
    ("spec", "takes"),
    [
        (TensorSpec((1, 3, 224, 224)), True),
        (TensorSpec((4, 3, 32, 48)), True),
        (TensorSpec((1, 1, 28, 28)), False),
        (TensorSpec((1, 3, 224)), False),
        (TensorSpec((1, 3, 224, 224), "uint8"), False),
    ],
)
def test_takes_images_needs_three_colours(spec: TensorSpec, takes: bool) -> None:
    assert takes_images(spec) is takes


@pytest.mark.parametrize("name", ["resnet18@64", "googlenet@64", "alex_net", "vgg_net@64", "le_net", "mobile_net"])
def test_pixels_and_values_give_the_same_output_at_every_third_point(name: str) -> None:
    network = load_network(name)
    shape = network.graph.inputs[0].shape
    whole = run_whole(network, random_input(shape))
    assert_equal(run_whole(network, pixels(shape)), whole, same_setup=True)
    for point in range(0, len(network.graph.layers) + 1, 3):
        edge, cloud = cut(network, point)
        for image in (pixels(shape), random_input(shape)):
            boundary = run(edge, [image]).arrays
            output = run(cloud, boundary).arrays if point < len(network.graph.layers) else boundary
            assert_equal(output[0], whole, same_setup=True, what=f"point {point}, {image.dtype}")


@pytest.mark.parametrize("point", [0, 1])
def test_an_image_is_sent_as_it_was_given(point: int) -> None:
    network = load_network("resnet18")
    edge, cloud = cut(network, point)
    for image in (pixels(), random_input()):
        result = edge.run([image])
        assert result is not None
        assert np.may_share_memory(result.arrays[0], image) is (point == 0)
        assert (result.arrays[0].dtype == image.dtype) is (point == 0 or image.dtype == np.float32)
    sent = [(spec.dtype, spec.shape) for spec in cloud.inputs]
    assert (sent == [("uint8", (1, 3, 224, 224))]) is (point == 0)


class UsesItsInputTwice(nn.Module):
    """A network whose input may be transferred beside another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + x


def test_an_image_may_be_sent_beside_a_layers_output() -> None:
    model = UsesItsInputTwice().eval()
    graph = trace_module(model, (1, 3, 8, 8), "twice")
    image = as_tensor(pixels((1, 3, 8, 8)))
    edge, cloud = cut_module(model, graph, {0, 1})
    with torch.inference_mode():
        boundary = edge(image)
        assert [tensor.dtype for tensor in boundary] == [torch.uint8, torch.float32]
        assert graph.boundary_bytes[1] == sum(tensor.nbytes for tensor in boundary)
        assert_equal(cloud(*boundary)[0], model(as_values(image)), same_setup=True)


def test_a_network_without_three_colours_is_given_values() -> None:
    assert pixels((1, 1, 28, 28)).dtype == np.float32
