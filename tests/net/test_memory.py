"""The limit of the memory of messages: of a connection, of all together, and until when a body counts."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from neurosurgeon.net import memory
from neurosurgeon.net.frames import ALIGNMENT
from neurosurgeon.net.memory import UNLIMITED, MemoryLimit
from neurosurgeon.utils.errors import BusyError, ProtocolError


@pytest.mark.parametrize("length", [0, 1, 4096, 3_000_001])
def test_memory_starts_on_a_cache_line_and_can_be_written(length: int) -> None:
    body = UNLIMITED.allocate("one", length)
    assert len(body) == length
    assert not body.readonly
    if length:
        assert ctypes.addressof(ctypes.c_char.from_buffer(body)) % ALIGNMENT == 0


def test_limits_of_a_connection_and_of_all_together() -> None:
    limit = MemoryLimit(300_000, 200_000)
    first = limit.allocate("one", 150_000)
    with pytest.raises(BusyError, match="this connection"):
        limit.allocate("one", 100_000)
    with pytest.raises(BusyError, match="all connections"):
        limit.allocate("other", 160_000)
    other = limit.allocate("other", 100_000)
    del first
    assert len(limit.allocate("one", 150_000)) + len(other) == 250_000


def test_a_body_that_never_fits_is_not_busy() -> None:
    for limit in (MemoryLimit(300_000, 200_000), MemoryLimit(200_000, 300_000)):
        with pytest.raises(ProtocolError, match="expected at most 200.0 KB"):
            limit.allocate("one", 200_001)


def test_a_body_counts_until_its_last_array_is_freed() -> None:
    limit = MemoryLimit(200_000, 200_000)
    body = limit.allocate("one", 150_000)
    arrays = [np.frombuffer(body[:100], np.uint8), np.frombuffer(body[128:], np.uint8)]
    del body
    arrays.pop()
    with pytest.raises(BusyError):
        limit.allocate("one", 150_000)
    arrays.pop()
    assert len(limit.allocate("one", 150_000)) == 150_000


def test_freed_bodies_leave_no_counts() -> None:
    limit = MemoryLimit(1000, 1000)
    for length in (1000, 400, 0):
        limit.allocate(object(), length)
    bodies = [limit.allocate("one", length) for length in (400, 0)]
    while bodies:
        del bodies[0]
    assert (limit._used_bytes, limit._used_by) == (0, {})


def test_a_failed_allocation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory:
        def __init__(self, *arguments: object) -> None:
            raise MemoryError

    limit = MemoryLimit(1000, 1000)
    with monkeypatch.context() as patched:
        patched.setattr(memory, "_body_type", lambda: NoMemory)
        with pytest.raises(MemoryError):
            limit.allocate("one", 1000)
    assert len(limit.allocate("one", 1000)) == 1000
