"""Frames: golden bytes both ways, any frame round-trips, and every limit is checked on the head alone."""

from __future__ import annotations

import itertools
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.net.frames import (
    ALIGNMENT,
    DEFAULT_LIMITS,
    FIXED_START,
    HEAD_UNIT,
    PREFIX,
    SMALL_LIMITS,
    WIRE_VERSION,
    Head,
    Kind,
    Limits,
    Prefix,
    head_length,
    pack_frame,
    padding,
    split_body,
    unpack_head,
    unpack_prefix,
)
from neurosurgeon.utils.errors import ProtocolError

GOLDEN_HEADER = b"header"
GOLDEN_FIGURES = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
GOLDEN_BUFFERS = [b"\xaa\xbb\xcc", b"", bytes(range(64))]
GOLDEN_FRAME = (
    bytes.fromhex(
        "4e53474e"  # magic "NSGN"
        "04"  # wire version
        "04"  # kind: request
        "0003"  # buffers
        "00000006"  # header length
        "01020304"  # task
        "3ff0000000000000"  # figures: 1, then zeros
        "00000000000000000000000000000000000000000000000000000000000000000000000000000000"
        "0000000000000003"
        "0000000000000000"
        "0000000000000040"
        "686561646572"  # "header"
    ).ljust(512, b"\0")
    + bytes.fromhex("aabbcc").ljust(64, b"\0")
    + bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    + bytes.fromhex("202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f")
)

kinds = st.sampled_from(Kind)
headers = st.binary(max_size=1200)  # beyond one head unit
buffer_lists = st.lists(st.binary(max_size=200), max_size=5)


def prefix_bytes(
    *, magic: bytes = b"NSGN", version: int = WIRE_VERSION, kind: int = 1, buffers: int = 0, header: int = 0
) -> bytes:
    """Return the first 16 bytes of a frame, with one of them wrong."""
    return PREFIX.pack(magic, version, kind, buffers, header, 0)


def unpack_frame(data: bytes) -> tuple[Head, list[bytes]]:
    """Return head and buffers of a whole frame, as a receiver takes it apart."""
    prefix = unpack_prefix(data[:HEAD_UNIT])
    head = unpack_head(prefix, data[: prefix.head_length])
    body = memoryview(data)[prefix.head_length :]
    assert len(body) == head.body_length
    return head, list(map(bytes, split_body(body, head.lengths)))


# ---------------------------------------------------------------- golden bytes


def test_packs_the_golden_bytes() -> None:
    assert b"".join(pack_frame(Kind.REQUEST, GOLDEN_HEADER, GOLDEN_BUFFERS, 0x01020304, GOLDEN_FIGURES)) == GOLDEN_FRAME


def test_unpacks_the_golden_bytes() -> None:
    head, buffers = unpack_frame(GOLDEN_FRAME)
    assert head == Head(Kind.REQUEST, 0x01020304, GOLDEN_HEADER, (3, 0, 64), 128)
    assert buffers == GOLDEN_BUFFERS


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (Kind.HELLO, 1),
        (Kind.PREPARE, 2),
        (Kind.READY, 3),
        (Kind.REQUEST, 4),
        (Kind.REPLY, 5),
        (Kind.ERROR, 6),
        (Kind.PING, 7),
        (Kind.PONG, 8),
        (Kind.PROBE, 9),
        (Kind.SAMPLES, 10),
        (Kind.ASK_LATENCIES, 11),
        (Kind.LATENCIES, 12),
    ],
)
def test_every_kind_keeps_its_number(kind: Kind, number: int) -> None:
    assert b"".join(pack_frame(kind, b""))[5] == number
    assert unpack_prefix(prefix_bytes(kind=number)).kind is kind


# ---------------------------------------------------------------- properties


@given(kinds, headers, buffer_lists, st.integers(0, 2**32 - 1))
def test_any_frame_round_trips(kind: Kind, header: bytes, buffers: list[bytes], task: int) -> None:
    head, received = unpack_frame(b"".join(pack_frame(kind, header, buffers, task)))
    assert (head.kind, head.header, received, head.task) == (kind, header, buffers, task)


@given(headers, buffer_lists)
def test_every_buffer_starts_on_a_cache_line(header: bytes, buffers: list[bytes]) -> None:
    pieces = pack_frame(Kind.REQUEST, header, list(map(bytearray, buffers)))
    ends = list(itertools.accumulate(map(len, pieces)))
    located = list(zip(pieces, ends, strict=True))[1:]  # after the head
    starts = [end - len(piece) for piece, end in located if isinstance(piece, bytearray)]
    assert len(starts) == len(buffers)
    assert all(start % ALIGNMENT == 0 for start in [*starts, ends[-1]])


@given(headers, buffer_lists)
def test_buffers_are_passed_on_without_copies(header: bytes, buffers: list[bytes]) -> None:
    pieces = pack_frame(Kind.REQUEST, header, buffers)
    assert all(any(piece is buffer for piece in pieces) for buffer in buffers)


@given(st.integers(0, 64), st.integers(0, 2**16))
def test_a_head_fills_whole_units(buffer_count: int, header_length: int) -> None:
    needed = FIXED_START + 8 * buffer_count + header_length
    assert head_length(buffer_count, header_length) % HEAD_UNIT == 0
    assert needed <= head_length(buffer_count, header_length) < needed + HEAD_UNIT


@given(st.integers(0, 2**64))
def test_padding_ends_on_a_cache_line(length: int) -> None:
    assert 0 <= padding(length) < ALIGNMENT
    assert (length + padding(length)) % ALIGNMENT == 0


def test_split_body_shares_memory_with_the_body() -> None:
    body = bytearray(128)
    first, second = split_body(memoryview(body), [3, 64])
    body[0], body[64] = 7, 8
    assert (first[0], second[0]) == (7, 8)


# ---------------------------------------------------------------- other protocols


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00\x00",  # a TLS client hello
        pickle.dumps({"a plain": "pickle of the reference's kind"}),
        bytes(16),
        b"NSGM" + bytes(12),
    ],
    ids=["http", "tls", "pickle", "zeros", "one letter off"],
)
def test_another_protocol_is_detected_by_its_first_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not our protocol"):
        unpack_prefix(data)


@given(st.binary(min_size=16, max_size=64).filter(lambda data: not data.startswith(b"NSGN")))
def test_random_bytes_are_no_frame(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not our protocol"):
        unpack_prefix(data)


@given(st.binary(min_size=12, max_size=12))
def test_bytes_after_the_magic_are_within_limits_or_refused(data: bytes) -> None:
    try:
        prefix = unpack_prefix(b"NSGN" + data)
    except ProtocolError:
        return
    assert prefix.header_length <= DEFAULT_LIMITS.max_header_bytes
    assert prefix.buffer_count <= DEFAULT_LIMITS.max_buffers


@pytest.mark.parametrize("version", [0, 1, WIRE_VERSION - 1, WIRE_VERSION + 1, 255])
def test_another_wire_version_is_named(version: int) -> None:
    with pytest.raises(ProtocolError, match=f"wire version {version}, this side {WIRE_VERSION}"):
        unpack_prefix(prefix_bytes(version=version))


@pytest.mark.parametrize("kind", [0, 13, 255])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        unpack_prefix(prefix_bytes(kind=kind))


# ---------------------------------------------------------------- limits: the head alone is enough to refuse


@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, SMALL_LIMITS])
def test_a_header_may_be_as_long_as_the_limit_and_no_longer(limits: Limits) -> None:
    longest = limits.max_header_bytes
    assert unpack_prefix(prefix_bytes(header=longest), limits).header_length == longest
    for length in (longest + 1, 2**32 - 1):
        with pytest.raises(ProtocolError, match=f"header of {length} bytes"):
            unpack_prefix(prefix_bytes(header=length), limits)


@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, SMALL_LIMITS])
def test_there_may_be_as_many_buffers_as_the_limit_and_no_more(limits: Limits) -> None:
    most = limits.max_buffers
    assert unpack_prefix(prefix_bytes(buffers=most), limits).buffer_count == most
    for count in (most + 1, 2**16 - 1):
        with pytest.raises(ProtocolError, match=f"frame of {count} buffers"):
            unpack_prefix(prefix_bytes(buffers=count), limits)


def head_of(lengths: list[int]) -> tuple[Prefix, bytes]:
    """Return prefix and head of a frame that claims buffers of these lengths; there is no body."""
    prefix = prefix_bytes(kind=Kind.REQUEST, buffers=len(lengths)).ljust(FIXED_START, b"\0")
    data = prefix + struct.pack(f"!{len(lengths)}Q", *lengths)
    return unpack_prefix(data), data


def test_a_body_may_be_as_large_as_the_limit() -> None:
    largest = DEFAULT_LIMITS.max_body_bytes
    assert unpack_head(*head_of([largest])).body_length == largest


@pytest.mark.parametrize(
    "lengths",
    [[DEFAULT_LIMITS.max_body_bytes + 1], [2**64 - 1], [2**64 - 1, 1], [2**63, 2**63], [2**22 + 1] * 64],
    ids=["one byte more", "largest", "sum of 2^64", "two halves of 2^64", "many that fit one by one"],
)
def test_a_body_above_the_limit_is_refused_from_its_lengths(lengths: list[int]) -> None:
    with pytest.raises(ProtocolError, match="body of"):
        unpack_head(*head_of(lengths))


def test_padding_counts_as_body() -> None:
    with pytest.raises(ProtocolError, match="body of"):
        unpack_head(*head_of([1, 1]), Limits(max_body_bytes=127))
