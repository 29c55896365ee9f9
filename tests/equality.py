"""The equality of two outputs of one network for one input, as the project promises it and every test checks it.

Equal bits are promised if processor, number of threads and engine are the same on both sides. Otherwise sums are made
in another order, with other last bits: an output then differs by at most `TOLERANCE` of the largest value.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from neurosurgeon.edge.outcome import outputs_digest
from neurosurgeon.engine.torch_engine import as_array, use_threads
from neurosurgeon.graph.compare import difference
from neurosurgeon.graph.spec import Array, as_floats
from tests.networks import load_network, random_input, run_whole

TOLERANCE = 1e-4  # of the largest value
THREADS = 1  # of the test process, and of every cloud and edge whose outputs are compared bit for bit


def max_difference(one: Array, other: Array) -> float:
    """Return the largest absolute difference of two outputs."""
    return difference(other, one).absolute


def output_digest(output: Array) -> str:
    """Return the SHA-256 of an output's bytes."""
    return outputs_digest([output])


def allowed_difference(expected: Array, *, same_setup: bool) -> float:
    """Return by how much a value may differ from the expected one: 0 means equal bits.

    Args: same_setup: whether processor, number of threads and engine were the same. A batch is another engine.
    """
    is_exact = same_setup or as_floats(expected).dtype.kind not in "fc"
    return 0.0 if is_exact else TOLERANCE * float(np.abs(as_floats(expected)).max())


def are_equal(output: Array | Tensor, expected: Array | Tensor, *, same_setup: bool) -> bool:
    """Return whether an output is the expected one, as exactly as is promised.

    Args: same_setup: see `allowed_difference`.
    """
    one, other = _array(output), _array(expected)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    allowed = allowed_difference(other, same_setup=same_setup)
    return max_difference(one, other) <= allowed if allowed else output_digest(one) == output_digest(other)


def assert_equal(
    output: Array | Tensor, expected: Array | Tensor, *, same_setup: bool, what: object = "an output"
) -> None:
    """Fail unless an output is the expected one, as exactly as is promised.

    Args: same_setup: see `allowed_difference`. what: names the output in the message.
    """
    if are_equal(output, expected, same_setup=same_setup):
        return
    one, other = _array(output), _array(expected)
    allowed = allowed_difference(other, same_setup=same_setup)
    assert one.shape == other.shape, f"{what}: {one.shape}, expected {other.shape}"
    assert one.dtype == other.dtype, f"{what}: {one.dtype}, expected {other.dtype}"
    raise AssertionError(f"{what} differs by up to {max_difference(one, other):g}, allowed {allowed:g}")


def _array(values: Array | Tensor) -> Array:
    return as_array(values) if isinstance(values, Tensor) else values


@cache
def whole_digest(model: str) -> str:
    """Return the digest of an unsplit network's output for the random input, computed here with `THREADS`.

    Scripts report only digests: compare them if every side computes with `THREADS`, so that bits are promised.
    """
    threads = torch.get_num_threads()
    use_threads(THREADS)
    try:
        return output_digest(run_whole(load_network(model), random_input()))
    finally:
        torch.set_num_threads(threads)
