"""Keys: read from files, proved by both sides with fresh nonces, and sealing every byte that follows."""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.net import keys
from neurosurgeon.net.frames import HEAD_UNIT, Buffer, Kind, pack_frame
from neurosurgeon.net.keys import (
    MAX_RECORD_BYTES,
    RECORD,
    SealedWire,
    SessionKeys,
    find_key,
    prove_to_cloud,
    prove_to_edge,
)
from neurosurgeon.net.wire import SocketWire, Wire, read_all
from neurosurgeon.utils.errors import AccessError, NetworkError, PeerGoneError, ProtocolError, UsageError
from tests.attacks.decoding import BytesWire

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
Wires = tuple[socket.socket, socket.socket]


def soon_s() -> float:
    return time.monotonic() + 5.0


class Recorder:
    """A wire that records the bytes sent over it."""

    peer = "recorder"

    def __init__(self, wire: Wire | None = None) -> None:
        self.wire = wire
        self.sent: list[bytes] = []

    def send(self, pieces: list[Buffer], deadline_s: float) -> None:
        self.sent.append(b"".join(bytes(piece) for piece in pieces))
        if self.wire:
            self.wire.send(pieces, deadline_s)

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        assert self.wire
        return self.wire.read_some(view, deadline_s, fill)


# ---------------------------------------------------------------- the file


def test_a_key_comes_from_a_file_without_its_last_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.KEY_VARIABLE, "e" * 32)
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    assert find_key(path) == KEY
    assert find_key(None) == b"e" * 32
    monkeypatch.delenv(keys.KEY_VARIABLE)
    assert find_key(None) is None


@pytest.mark.parametrize("content", [b"", b"short secret", b"long secret" * 1000])
def test_a_key_of_another_length_is_refused_and_not_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="openssl rand") as error:
        find_key(path)
    assert "secret" not in str(error.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        find_key(tmp_path / "nowhere")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_key_file_readable_by_others_is_a_warning(
    mode: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(mode)
    find_key(path)
    assert ("readable by others" in caplog.text) == warned
    assert KEY.decode() not in caplog.text


# ---------------------------------------------------------------- the handshake


def shake(
    wires: Wires, edge: bytes, cloud: bytes, edge_certificate: bytes = b"", cloud_certificate: bytes = b""
) -> tuple[SessionKeys, SessionKeys]:
    """Let both sides prove their keys; return the session keys of the edge, and of the cloud."""
    near, far = SocketWire(wires[0]), SocketWire(wires[1])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(answer_edge, far, cloud, cloud_certificate)
        try:
            ours = prove_to_cloud(near, edge, edge_certificate, soon_s())
        finally:
            error = answer.exception()
        assert not error
        return ours, answer.result()


def answer_edge(wire: Wire, key: bytes, certificate: bytes) -> SessionKeys:
    try:
        return prove_to_edge(wire, key, certificate, soon_s())
    except AccessError as exc:
        keys.tell_refusal(wire, exc, soon_s())
        raise


def test_session_keys_agree_and_are_new_each_time(wires: Wires) -> None:
    edge, cloud = shake(wires, KEY, KEY)
    assert (edge.sending, edge.receiving) == (cloud.receiving, cloud.sending)
    assert len({*edge, *shake(wires, KEY, KEY)[0]}) == 4


@pytest.mark.parametrize(
    ("edge", "cloud", "certificates"), [(OTHER_KEY, KEY, (b"", b"")), (KEY, KEY, (b"1" * 32, b"2" * 32))]
)
def test_another_key_or_certificate_is_refused(
    edge: bytes, cloud: bytes, certificates: tuple[bytes, bytes], wires: Wires
) -> None:
    with pytest.raises(AccessError, match="another key"):
        shake(wires, edge, cloud, *certificates)


def test_a_recorded_handshake_proves_nothing(wires: Wires) -> None:
    near, far = SocketWire(wires[0]), SocketWire(wires[1])
    recorder = Recorder(near)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(prove_to_edge, far, KEY, b"", soon_s())
        prove_to_cloud(recorder, KEY, b"", soon_s())
        again = pool.submit(prove_to_edge, far, KEY, b"", soon_s())
        for frame in recorder.sent:
            wires[0].sendall(frame)
        assert isinstance(again.exception(), AccessError)


def test_replayed_frames_of_a_cloud_are_refused(wires: Wires) -> None:
    near, far = SocketWire(wires[0]), SocketWire(wires[1])
    recorder = Recorder(far)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(prove_to_edge, recorder, KEY, b"", soon_s())
        prove_to_cloud(near, KEY, b"", soon_s())
    wires[1].sendall(b"".join(recorder.sent))
    with pytest.raises(AccessError, match="did not prove"):
        prove_to_cloud(near, KEY, b"", soon_s())


def test_an_edges_own_proof_sent_back_proves_nothing(wires: Wires) -> None:
    def mirror() -> None:
        for _ in range(2):
            data = bytearray(HEAD_UNIT)
            read_all(SocketWire(wires[1]), memoryview(data), soon_s())
            data[5] += 1  # the kind that the edge expects next
            wires[1].sendall(data)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(mirror)
        with pytest.raises(AccessError, match="did not prove"):
            prove_to_cloud(SocketWire(wires[0]), KEY, b"", soon_s())


def test_the_cloud_proves_nothing_before_the_edge_has(wires: Wires) -> None:
    recorder = Recorder(SocketWire(wires[1]))
    wires[0].sendall(b"".join(pack_frame(Kind.KEY_START, b"n" * 32) + pack_frame(Kind.KEY_PROOF, b"p" * 32)))
    with pytest.raises(AccessError):
        prove_to_edge(recorder, KEY, b"", soon_s())
    assert len(recorder.sent) == 1
    challenge = recorder.sent[0][16:48]
    assert challenge not in {hmac.digest(KEY, b"n" * 32, "sha256"), KEY}


@pytest.mark.parametrize(
    "frame", [pack_frame(Kind.HELLO, b"\x80\x05)."), pack_frame(Kind.KEY_START, b"n" * 31), pack_frame(Kind.PING, b"")]
)
def test_any_other_first_frame_is_refused(frame: list[Buffer], wires: Wires) -> None:
    wires[0].sendall(b"".join(frame))
    with pytest.raises(AccessError):
        prove_to_edge(SocketWire(wires[1]), KEY, b"", soon_s())


# ---------------------------------------------------------------- sealed records


def sealed(pieces: list[bytes]) -> list[bytes]:
    """Return the records that carry the pieces of a frame."""
    recorder = Recorder()
    SealedWire(recorder, SessionKeys(KEY, OTHER_KEY)).send(pieces, soon_s())
    return recorder.sent


def unsealed(data: bytes, sizes: list[int]) -> bytes:
    """Return the bytes that a receiver reads from records, in reads of these sizes."""
    wire = SealedWire(BytesWire(data), SessionKeys(OTHER_KEY, KEY))
    got = b""
    for size in sizes:
        view = memoryview(bytearray(size))
        read_all(wire, view, soon_s())
        got += bytes(view)
    return got


PIECES = [b"h" * HEAD_UNIT, b"b" * 100_000, b"\0" * 32]
SIZES = [HEAD_UNIT, 100_032]


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5), st.data())
def test_sealed_pieces_arrive_in_reads_of_any_size(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole)), max_size=4)) | {len(whole)})
    sizes = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
    assert unsealed(b"".join(sealed(pieces)), sizes) == whole


def test_a_head_is_one_record_and_a_body_fills_records() -> None:
    lengths = [RECORD.unpack_from(record)[0] for record in sealed(PIECES)]
    assert lengths == [HEAD_UNIT, MAX_RECORD_BYTES, 100_032 - MAX_RECORD_BYTES]


@given(st.integers(0, 2**32), st.integers(1, 255))
def test_one_changed_byte_breaks_the_seal(place: int, change: int) -> None:
    data = bytearray(b"".join(sealed(PIECES)))
    data[place % len(data)] ^= change
    with pytest.raises((ProtocolError, PeerGoneError)):
        unsealed(bytes(data), SIZES)


def left_out(records: list[bytes]) -> list[bytes]:
    return records[1:]


def repeated(records: list[bytes]) -> list[bytes]:
    return [records[0], *records]


def swapped(records: list[bytes]) -> list[bytes]:
    return [records[1], records[0], *records[2:]]


def cut_off(records: list[bytes]) -> list[bytes]:
    return records[:-1]


@pytest.mark.parametrize("order", [left_out, repeated, swapped, cut_off])
def test_missing_repeated_or_reordered_records_are_refused(order: Callable[[list[bytes]], list[bytes]]) -> None:
    with pytest.raises(NetworkError):
        unsealed(b"".join(order(sealed(PIECES))), [*SIZES, HEAD_UNIT])


def test_records_of_the_other_direction_are_refused() -> None:
    wire = SealedWire(BytesWire(b"".join(sealed(PIECES))), SessionKeys(KEY, OTHER_KEY))
    with pytest.raises(ProtocolError, match="wrong tag"):
        read_all(wire, memoryview(bytearray(HEAD_UNIT)), soon_s())


@pytest.mark.parametrize("length", [0, MAX_RECORD_BYTES + 1, 2**32 - 1])
def test_a_record_of_impossible_length_is_refused(length: int) -> None:
    wire = SealedWire(BytesWire(RECORD.pack(length, bytes(32))), SessionKeys(KEY, OTHER_KEY))
    with pytest.raises(ProtocolError, match="record of"):
        read_all(wire, memoryview(bytearray(HEAD_UNIT)), soon_s())
