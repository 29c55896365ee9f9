"""Small hard modules: each is split right, or refused with the right reason."""

from __future__ import annotations

import pytest

from tests.benchmark.sweep_judge import judge
from tests.models.hard import HARD, Hard


@pytest.mark.parametrize("network", HARD, ids=[row.name for row in HARD])
def test_a_hard_module_is_split_right_or_refused_with_its_reason(network: Hard) -> None:
    row = judge("hard", network)
    assert row["as_wanted"], row
