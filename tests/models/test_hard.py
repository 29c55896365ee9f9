"""Small hard modules: each is split right, or refused with the right reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.models.names import Catalogue
from tests.benchmark.sweep_judge import judge
from tests.models.hard import HARD, Hard
from tests.models.hard.digest_pairs import PAIRS, Pair

# Modules that could be split right, and are refused today. This list may only shrink.
REFUSED_TODAY = {
    "in-place/fill-diagonal",
    "in-place/data",
    "in-place/set-data",
    "contexts/gradient-of-function",
    "decisions/type-of-input",
    "decisions/try-except",
    "decisions/tracing-flag",
    "kinds/names-with-dots-and-digits",
}


@pytest.mark.filterwarnings("ignore")  # of old parts of torch that these modules use
@pytest.mark.parametrize("network", HARD, ids=[row.name for row in HARD])
def test_a_hard_module_is_split_right_or_refused_with_its_reason(network: Hard) -> None:
    row = judge("hard", network)
    if network.name in REFUSED_TODAY:
        assert row["verdict"] == "refused", row
    else:
        assert row["as_wanted"], row


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
def test_networks_that_compute_something_else_have_other_digests(pair: Pair) -> None:
    edge, cloud = (_digests(build, pair.inputs) for build in (pair.edge, pair.cloud))
    assert (edge == cloud) is pair.equal


def _digests(build: Callable[[], nn.Module], inputs: object) -> tuple[str, str]:
    torch.manual_seed(0)
    network = TorchEngine(Catalogue((), {"mine": build()}, {"mine": inputs})).open("mine")
    return network.graph.digest, network.ref.weights_digest
