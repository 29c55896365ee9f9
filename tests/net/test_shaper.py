"""The relay that emulates a slow network: all bytes arrive, both ways, and wrong descriptions are refused."""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import edge_api
import tasks_edge_api
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.cli.relay import shape_of, shaped
from neurosurgeon.net import shaper
from neurosurgeon.net.monitor_client import measure_link
from neurosurgeon.net.shaper import CHUNK_S, MAX_CHUNK_BYTES, SEGMENT_BYTES, EmulatedLink, Relay, TraceClock
from neurosurgeon.net.sockets import listen, stop_accepting
from neurosurgeon.net.traces import Condition, Trace
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.link import LinkEstimate
from tests.net.conftest import JOIN_S, LOOPBACK, wait_until

FAST = Trace([Condition(0.0, 1000.0, 0.2)])


@pytest.fixture
def echo(listener: socket.socket) -> Iterator[tuple[str, int]]:
    """The address of a service that echoes all bytes, then closes."""

    def serve() -> None:
        with listener.accept()[0] as peer:
            peer.settimeout(JOIN_S)
            while data := peer.recv(65_536):
                peer.sendall(data)

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    yield listener.getsockname()
    serving.join(JOIN_S)


def test_relayed_bytes_arrive_whole(echo: tuple[str, int]) -> None:
    relay = Relay(echo, EmulatedLink(TraceClock(FAST)), EmulatedLink(TraceClock(FAST)))
    data = bytes(range(256)) * 2_000
    with listen(LOOPBACK, 0) as listener, socket.create_connection(listener.getsockname(), JOIN_S) as near:
        serving = threading.Thread(target=relay.serve_tcp, args=(listener,), daemon=True)
        serving.start()
        sending = threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)), daemon=True)
        sending.start()
        received = bytearray()
        while chunk := near.recv(65_536):
            received += chunk
        sending.join(JOIN_S)
        stop_accepting(listener)
        serving.join(JOIN_S)
    relay.up.close()
    relay.down.close()
    assert received == data


def test_a_chunk_is_at_least_a_packet() -> None:
    sizes = []
    for rate_mbit in (0.1, 80.0, 1e5):
        link = EmulatedLink(TraceClock(Trace([Condition(0.0, rate_mbit, 0.0)])))
        sizes.append(link.chunk_bytes())
        link.close()
    assert sizes == [SEGMENT_BYTES, round(10e6 * CHUNK_S), MAX_CHUNK_BYTES]


def test_a_full_queue_drops_only_datagrams() -> None:
    link = EmulatedLink(TraceClock(Trace([Condition(0.0, 1e4, 0.0)])))
    delivered: list[str] = []
    first_s = link.send(50_000_000, lambda: delivered.append("first"))  # 40 ms
    assert link.send(125_000, lambda: delivered.append("datagram"), may_drop=True) == first_s
    assert link.send(125_000, lambda: delivered.append("stream")) == pytest.approx(first_s + 1e-4)
    link.close()
    assert delivered == ["first", "stream"]


def test_the_queue_leaves_at_the_rates_to_come() -> None:
    """An outage ends at the time in the trace, however much was sent during it."""
    clock = TraceClock(Trace([Condition(0.0, 0.008, 0.0), Condition(1.0, 800.0, 0.0)]))  # 1 kB/s, then 100 MB/s
    link = EmulatedLink(clock)
    clock.begin()
    start_s = clock._start_s
    assert start_s is not None
    assert link.send(100_000, lambda: None) - start_s == pytest.approx(1.0 + 100_000 / 1e8, abs=1e-4)
    assert link.send(1_000_000, lambda: None) - start_s == pytest.approx(1.0 + 1_100_000 / 1e8, abs=1e-4)
    link.close()


def test_sockets_of_idle_senders_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaper, "UDP_IDLE_S", 0.05)
    with socket.socket(type=socket.SOCK_DGRAM) as cloud, socket.socket(type=socket.SOCK_DGRAM) as near:
        for sock in (cloud, near):
            sock.bind((LOOPBACK, 0))
        cloud.settimeout(JOIN_S)
        near.settimeout(0.05)  # its thread ends soon when it is closed
        relay = Relay(cloud.getsockname(), EmulatedLink(TraceClock(FAST)), EmulatedLink(TraceClock(FAST)))
        threading.Thread(target=relay.serve_udp, args=(near,), daemon=True).start()
        for _ in range(2):
            with socket.socket(type=socket.SOCK_DGRAM) as edge:
                edge.settimeout(JOIN_S)
                edge.sendto(b"ping", near.getsockname())
                data, way = cloud.recvfrom(100)
                cloud.sendto(data, way)
                assert edge.recv(100) == b"ping"
                wait_until(lambda: not any("relay_replies" in thread.name for thread in threading.enumerate()))
    relay.up.close()
    relay.down.close()


def test_a_trace_waits_until_begin() -> None:
    clock = TraceClock(Trace([Condition(0.0, 1.0, 0.0), Condition(1e-9, 2.0, 0.0)]))
    assert clock.now().rate_mbit == 1.0
    clock.begin()
    assert clock.now().rate_mbit == 2.0


def test_a_service_is_measured_through_the_relay() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        port = service.ports[0]
        with shaped(LOOPBACK, (port ^ 1, port), "40,20", None) as cloud:
            links: list[LinkEstimate] = []
            while len(links) < MEASUREMENTS and not is_right(links):
                links.append(measure_link(cloud.host, port, duplex=True))
    assert cloud.host != LOOPBACK
    assert is_right(links)
    assert all(link.rtt_ms >= 20.0 for link in links)


MEASUREMENTS = 20  # at most: a busy machine spoils some


def is_right(links: Sequence[LinkEstimate]) -> bool:
    """Return whether the last one has the rate of the relay."""
    return bool(links) and links[-1].rate_bytes_per_s == pytest.approx(5e6, rel=0.3)


def test_without_a_shape_there_is_no_relay() -> None:
    with shaped("cloud", (1, 2), None, None) as cloud:
        assert cloud.host == "cloud"
        cloud.begin()


# ---------------------------------------------------------------- wrong descriptions


@pytest.mark.parametrize(("text", "condition"), [("20", (20.0, 0.0)), ("0.5,100", (0.5, 100.0))])
def test_a_shape_is_a_rate_and_an_optional_round_trip(text: str, condition: tuple[float, float]) -> None:
    assert shape_of(text)[1:] == condition


@pytest.mark.parametrize("text", ["", "fast", "20,", "20;10", "0", "-1", "nan", "inf", "20,-1", "20,nan", "20,60000"])
def test_an_impossible_shape_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="needed|is not MBIT"):
        shape_of(text)


@pytest.mark.parametrize("script", [edge_api, tasks_edge_api])
def test_scripts_refuse_a_wrong_shape_in_one_line(
    script: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["-t", "le_net"]
    for flags in (["--shape", "0"], ["--shape", "20", "--trace", "x.csv"]):
        with pytest.raises(SystemExit) as raised:
            script.main([*model, *flags])  # type: ignore[attr-defined]
        assert raised.value.code == UsageError.exit_code
    path = tmp_path / "unsorted.csv"
    path.write_text("1,20,10\n0,20,10\n")
    assert script.main([*model, "--trace", str(path)]) == UsageError.exit_code  # type: ignore[attr-defined]
    lines = capsys.readouterr().err.splitlines()
    assert "sort the lines by time" in lines[-1]
