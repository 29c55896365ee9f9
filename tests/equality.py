"""When two outputs of one network for one input are equal: what the project promises, and what every test asks.

Equal bits are promised where processor, number of threads and engine are the same on both sides. Elsewhere sums are
made in another order, with other last bits: an output then differs by at most `TOLERANCE` of the largest value.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from neurosurgeon.engine.torch_engine import output_digest, random_input, run_whole, use_threads
from neurosurgeon.models.zoo import load_network

TOLERANCE = 1e-4  # of the largest value
THREADS = 1  # of the test process, and of every cloud and edge whose answers are compared bit for bit


def allowed_difference(expected: Tensor, *, same_setup: bool) -> float:
    """Return by how much a value may differ from the expected one: 0 means equal bits.

    Args: same_setup: whether processor, number of threads and engine were the same. A batch is another engine.
    """
    return 0.0 if same_setup or not expected.is_floating_point() else TOLERANCE * expected.abs().max().item()


def are_equal(output: Tensor, expected: Tensor, *, same_setup: bool) -> bool:
    """Return whether an output is the expected one, as exactly as is promised.

    Args: same_setup: see `allowed_difference`.
    """
    if (output.shape, output.dtype) != (expected.shape, expected.dtype):
        return False
    allowed = allowed_difference(expected, same_setup=same_setup)
    if not allowed:
        return output_digest(output) == output_digest(expected)
    return (output - expected).abs().max().item() <= allowed  # False for NaN


def assert_equal(output: Tensor, expected: Tensor, *, same_setup: bool, what: object = "an output") -> None:
    """Fail unless an output is the expected one, as exactly as is promised.

    Args: same_setup: see `allowed_difference`. what: names the output in the message.
    """
    if are_equal(output, expected, same_setup=same_setup):
        return
    allowed = allowed_difference(expected, same_setup=same_setup)
    assert output.shape == expected.shape, f"{what}: {tuple(output.shape)}, expected {tuple(expected.shape)}"
    assert output.dtype == expected.dtype, f"{what}: {output.dtype}, expected {expected.dtype}"
    largest = (output.double() - expected.double()).abs().max().item()
    raise AssertionError(f"{what} differs by up to {largest:g}, allowed {allowed:g}")


@cache
def whole_digest(model: str) -> str:
    """Return the digest of an unsplit network's answer to the random input, computed here with `THREADS`.

    Scripts report digests alone: compare them where every side computes with `THREADS`, so that bits are promised.
    """
    threads = torch.get_num_threads()
    use_threads(THREADS)
    try:
        return output_digest(run_whole(load_network(model), random_input()))
    finally:
        torch.set_num_threads(threads)
