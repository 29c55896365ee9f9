"""Convert units; a megabyte is 10^6 bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.utils import units


def test_rates_in_megabytes_bytes_and_megabits() -> None:
    assert units.mb_per_s_to_bytes_per_s(1.25) == 1_250_000
    assert units.bytes_per_s_to_mb_per_s(1_250_000) == 1.25
    assert units.bytes_per_s_to_mbit_per_s(1_250_000) == 10.0


def test_sizes_and_durations() -> None:
    assert units.bytes_to_mb(602_112) == 0.602112
    assert units.s_to_ms(0.25) == 250.0
    assert units.ms_to_s(250.0) == 0.25


@given(st.floats(1e-6, 1e9))
def test_a_rate_comes_back_from_its_other_unit(rate: float) -> None:
    assert units.bytes_per_s_to_mb_per_s(units.mb_per_s_to_bytes_per_s(rate)) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 KB"),
        (602_112, "602.1 KB"),
        (1_000_000, "1.0 MB"),
        (12_845_056, "12.8 MB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert units.readable_bytes(size_bytes) == text
