"""The torch engine: fixed inputs, missing devices, partitions, guesses and the layer study."""

from __future__ import annotations

import hashlib
import linecache
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from neurosurgeon.cloud.conversation import check_finite
from neurosurgeon.edge.inputs import load_image, read_image
from neurosurgeon.edge.outcome import top_class, top_guesses
from neurosurgeon.engine.torch_engine import as_array, check_device, use_threads
from neurosurgeon.graph.spec import IMAGENET, Array
from neurosurgeon.net.header import pack_array, unpack_array
from neurosurgeon.predictor.profile import show_features
from neurosurgeon.utils.errors import DeviceError, NonFiniteError, PartitionError
from tests.equality import assert_equal
from tests.networks import cut, load_network, pixels, random_input, split

# Two machines compare outputs for the same synthetic image.
SYNTHETIC_SHA256 = "79fb03f5c6e6c468e23318a4389a150c153d0dac0e15037e74ec5a9feca49a6c"


# ---------------------------------------------------------------- inputs and devices


def test_the_synthetic_input_never_changes() -> None:
    image, values = pixels(), random_input()
    assert (image.shape, str(image.dtype)) == ((1, 3, 224, 224), "uint8")
    assert hashlib.sha256(image.tobytes()).hexdigest() == SYNTHETIC_SHA256
    mean, std = (np.array(constant).reshape(3, 1, 1) for constant in (IMAGENET.mean, IMAGENET.std))
    assert_equal(
        values, ((image / 255 - mean) / std).astype(np.float32), same_setup=False
    )  # processors round differently


def test_a_photo_becomes_a_batch_of_one(photo: Path) -> None:
    array = load_image(photo)
    assert array.shape == (1, 3, 224, 224)
    assert array.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(array[0].transpose(1, 2, 0), read_image(photo))


def test_every_machine_has_a_cpu() -> None:
    check_device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="no CUDA device.*-d cpu"):
        check_device("cuda")


def test_there_are_never_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert use_threads(64) == torch.get_num_threads() == 2
    assert use_threads(1) == torch.get_num_threads() == 1


# ---------------------------------------------------------------- partitions


def test_partitions_of_one_cut_share_their_weights() -> None:
    network = load_network("le_net")
    one, other = (cut(network, 3).cloud for _ in range(2))
    assert one is not other
    pairs = list(zip(one.module.parameters(), other.module.parameters(), strict=True))
    assert pairs
    assert all(first is second for first, second in pairs)


def test_nodes_that_are_no_cut_have_no_partition() -> None:
    with pytest.raises(PartitionError):
        split(load_network("le_net"), frozenset({0, 2}))


def test_a_dropped_partition_leaves_no_memory() -> None:
    network = load_network("le_net")
    cut(network, 1)
    sources = len(linecache.cache)
    modules = [weakref.ref(partition.module) for partition in cut(network, 2)]
    assert [module() for module in modules] == [None, None]  # at once, without the collector
    assert len(linecache.cache) == sources


# ---------------------------------------------------------------- outputs


def test_the_most_probable_classes_come_first() -> None:
    guesses = top_guesses(np.array([[0.0, 3.0, 1.0, 2.0]], np.float32), ["a", "b", "c", "d"], count=3)
    assert [(guess.index, guess.label) for guess in guesses] == [(1, "b"), (3, "d"), (2, "c")]
    expected = np.exp([3.0, 2.0, 1.0]) / np.exp([0.0, 1.0, 2.0, 3.0]).sum()
    assert [guess.probability for guess in guesses] == pytest.approx(expected.tolist())


def test_classes_have_no_labels_if_the_weights_have_none() -> None:
    assert [guess.label for guess in top_guesses(np.zeros((1, 10), np.float32), None)] == [None] * 5


# ---------------------------------------------------------------- the layer study


def test_the_layer_study_has_a_row_per_layer_that_adds_up() -> None:
    network = load_network("le_net")
    features = show_features(network, [random_input()])
    assert [feature.index for feature in features] == list(range(1, 13))
    assert [feature.name for feature in features] == [layer.name for layer in network.graph.layers]
    assert [feature.output_bytes for feature in features] == [layer.output.size_bytes for layer in network.graph.layers]
    total_ms = 0.0
    for feature in features:
        assert feature.latency_ms > 0
        total_ms += feature.latency_ms
        assert feature.accumulated_ms == pytest.approx(total_ms)


# ---------------------------------------------------------------- values that are no numbers


def received(*tensors: torch.Tensor) -> list[Array]:
    """Return tensors as the other side receives them."""
    packed = [pack_array(as_array(tensor)) for tensor in tensors]
    return [unpack_array(spec, memoryview(bytearray(content))) for spec, content in packed]


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 77, 1023])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.rand(1, 4, 16, 16).to(dtype)
    check_finite(received(tensor, torch.empty(0)))
    tensor.view(-1)[place] = value
    with pytest.raises(NonFiniteError, match="tensor 1"):
        check_finite(received(torch.zeros(3), tensor))


def test_infinities_of_both_signs_do_not_cancel_out() -> None:
    with pytest.raises(NonFiniteError):
        check_finite(received(torch.tensor([float("inf"), float("-inf")])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_values_whose_sum_is_infinite_are_fine(dtype: torch.dtype) -> None:
    check_finite(received(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)))


def test_whole_numbers_and_channels_last_are_fine() -> None:
    check_finite(received(torch.arange(5), torch.rand(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_top_class_of_any_type_is_known(dtype: torch.dtype) -> None:
    assert top_class([as_array(torch.tensor([[0, 0, 1, 0]]).to(dtype))]) == 2


@pytest.mark.parametrize("output", [torch.zeros(1, 0), torch.zeros(1, 3, dtype=torch.complex64)])
def test_some_outputs_have_no_top_class(output: torch.Tensor) -> None:
    assert top_class([as_array(output)]) is None
