"""The comparison of two outputs: rounding passes, a wrong output fails."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.models.names import ZOO
from tests.equality import THREADS, TOLERANCE, are_equal, assert_equal, output_digest, whole_digest
from tests.networks import cut, load_network, random_input, run, run_whole

EXPECTED = torch.tensor([[-4.0, 0.5, 2.0]])


def differs_by(share: float) -> Tensor:
    """Return the expected output with one value changed by a share of the largest."""
    return EXPECTED + share * 4.0 * torch.tensor([[0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("share", "same_setup", "is_equal"),
    [
        (0.0, True, True),
        (0.0, False, True),
        (1e-6, True, False),
        (0.9 * TOLERANCE, False, True),
        (1.1 * TOLERANCE, False, False),
        (float("nan"), False, False),
        (float("inf"), False, False),
    ],
)
def test_equality_is_bits_in_one_setup_and_a_tolerance_elsewhere(
    share: float, same_setup: bool, is_equal: bool
) -> None:
    assert are_equal(differs_by(share), EXPECTED, same_setup=same_setup) is is_equal
    if not is_equal:
        with pytest.raises(AssertionError, match="task 3 differs by up to"):
            assert_equal(differs_by(share), EXPECTED, same_setup=same_setup, what="task 3")


@pytest.mark.parametrize("same_setup", [True, False])
@pytest.mark.parametrize("output", [EXPECTED[0], EXPECTED.double(), EXPECTED[:, :2]], ids=["rank", "type", "size"])
def test_equality_requires_the_same_shape_and_type(output: Tensor, same_setup: bool) -> None:
    assert not are_equal(output, EXPECTED, same_setup=same_setup)
    with pytest.raises(AssertionError, match="expected"):
        assert_equal(output, EXPECTED, same_setup=same_setup)


def test_equality_of_integers_is_exact() -> None:
    classes = torch.tensor([100_000, 7])
    assert are_equal(classes, classes.clone(), same_setup=False)
    assert not are_equal(classes + 1, classes, same_setup=False)


@pytest.mark.parametrize("model", list(ZOO))
def test_equality_fails_for_the_output_of_another_input(model: str) -> None:
    network, image = load_network(model), random_input()
    expected = run_whole(network, image)
    for other in (image + 0.01, np.flip(image, -1).copy("K"), np.zeros_like(image)):
        assert not are_equal(run_whole(network, other), expected, same_setup=False)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("model", list(ZOO))
def test_two_threads_equal_one_within_the_tolerance(model: str) -> None:
    network = load_network(model)
    expected = run_whole(network, random_input())
    use_threads(2)
    whole, halves = run_whole(network, random_input()), cut(network, len(network.graph.layers) // 2)
    assert_equal(whole, expected, same_setup=False)
    split = run(halves.cloud, run(halves.edge, [random_input()]).arrays).arrays[0]
    assert_equal(split, whole, same_setup=True)


def test_whole_digest_uses_the_threads_of_all_tests() -> None:
    expected = output_digest(run_whole(load_network("mobile_net"), random_input()))
    use_threads(2)
    whole_digest.cache_clear()
    assert whole_digest("mobile_net") == expected
    assert torch.get_num_threads() != THREADS or (os.cpu_count() or 1) == 1
