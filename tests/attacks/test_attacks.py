"""Every attack, in small: it harms the naive server, and does nothing to a real cloud, which serves on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.net.frames import FIXED_START, MAGIC, PREFIX
from neurosurgeon.net.session import EdgeSession
from tests.attacks import claims, mutate
from tests.attacks.decoding import corpus, decode, decode_header, decode_input, frames
from tests.attacks.knocks import OTHER_PROTOCOLS
from tests.attacks.naive import LENGTH
from tests.attacks.pickles import ALLOWED_BYTES, ATTACKS, HARM_S, attack_cloud, attack_naive, harm
from tests.attacks.victims import Victim, naive, wait_until_closed
from tests.net.clouds import assert_answers
from tests.networks import Network, load_network

MUTATED = 3000
CROWD = 150  # more than may be unauthenticated
FRAMES = frames()


@pytest.fixture
def ours(cloud: ServiceProcess, network: Network) -> Iterator[Victim]:
    """The cloud of all tests, which must serve after every attack."""
    victim = Victim(cloud)
    with EdgeSession.open(*victim.address) as edge:
        assert_answers(edge, network)
    yield victim
    with EdgeSession.open(*victim.address) as edge:
        assert_answers(edge, network)


@pytest.fixture(scope="session")
def network() -> Network:
    """The edge's own network."""
    return load_network("le_net")


@pytest.mark.parametrize("make", ATTACKS)
def test_a_pickle_harms_the_naive_server(make: Callable[[Path], bytes]) -> None:
    with naive() as victim:
        assert harm(victim, attack_naive, make, HARM_S)


@pytest.mark.parametrize("make", ATTACKS)
def test_a_pickle_does_nothing_to_a_real_cloud(make: Callable[[Path], bytes], ours: Victim) -> None:
    assert harm(ours, attack_cloud, make) == set()


def test_claims_take_the_naive_servers_memory() -> None:
    with naive() as victim:
        before = victim.peak_bytes
        claims.claim_from_naive(victim, 256 * claims.MIB, 2)
        assert victim.peak_bytes - before > 256 * claims.MIB


@pytest.mark.parametrize("frame", claims.LIES.values(), ids=claims.LIES)
def test_a_lie_about_lengths_ends_the_connection(frame: bytes, ours: Victim) -> None:
    assert claims.claim_from_cloud(ours, frame, 1, 1) == 1


def test_a_hundred_claims_take_no_memory_of_a_real_cloud(ours: Victim) -> None:
    ours.forget_peak()
    before = ours.peak_bytes
    for size_mib, closed in ((256, claims.CLAIMS), (200, claims.CLAIMS - 5)):
        assert claims.claim_from_cloud(ours, claims.request(size_mib * claims.MIB), claims.CLAIMS, closed) >= closed
    assert ours.peak_bytes - before < ALLOWED_BYTES


@pytest.mark.parametrize("data", OTHER_PROTOCOLS.values(), ids=OTHER_PROTOCOLS)
def test_another_protocol_is_refused_in_one_line(data: bytes, ours: Victim) -> None:
    before = len(ours.lines())
    with ours.connect() as sock:
        sock.sendall(data)
        assert wait_until_closed(sock) == b""
    with ours.connect() as later:  # at its end, all before it has been logged
        later.sendall(b"?")
        wait_until_closed(later)
    assert sum("WARNING" in line for line in ours.lines()[before:]) <= 2


def test_the_naive_server_waits_without_a_timeout() -> None:
    with naive() as victim, victim.connect(0.2) as sock:
        sock.sendall(LENGTH.pack(8)[:4])
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_unauthenticated_connections_are_limited(ours: Victim, network: Network) -> None:
    crowd = [ours.connect() for _ in range(CROWD)]
    try:
        with EdgeSession.open(*ours.address) as edge:
            assert_answers(edge, network)
        assert [wait_until_closed(sock) for sock in crowd[: CROWD // 2]] == [b""] * (CROWD // 2)
    finally:
        for sock in crowd:
            sock.close()


# ---------------------------------------------------------------- mutations


def test_mutated_frames_are_refused_or_consistent() -> None:
    accepted, refused = mutate.run(MUTATED, seed=1)
    assert refused > accepted > 0


def test_the_fuzzing_corpus_is_refused_or_consistent() -> None:
    for data in corpus():
        decode_input(data)
    assert any(decode(data[1:]) for data in corpus() if data[1:5] == MAGIC)  # not all end at the version


@given(st.sampled_from(FRAMES), st.data())
def test_a_frame_with_replaced_bytes_is_refused_or_consistent(frame: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(frame) - 1))
    decode(frame[:start] + data.draw(st.binary(max_size=64)) + frame[data.draw(st.integers(start, len(frame))) :])


@given(st.sampled_from(FRAMES), st.binary(max_size=200))
def test_any_header_is_refused_or_plain(frame: bytes, header: bytes) -> None:
    decode_header(header)
    magic, version, kind, buffers, _, task = PREFIX.unpack_from(frame)
    head = PREFIX.pack(magic, version, kind, 0, len(header), task).ljust(FIXED_START, b"\0") + header
    decode(head.ljust(512, b"\0"))


@given(st.binary(max_size=600))
def test_any_bytes_at_all_are_refused(data: bytes) -> None:
    assert decode(data) is None
