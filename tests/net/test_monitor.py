"""The bandwidth monitor on loopback: it measures, refuses other messages, and its clients do without it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from neurosurgeon.cli import monitor
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.net import monitor_client, monitor_server, probe
from neurosurgeon.net.bandwidth import MAX_RATE_BYTES_PER_S
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import HEAD_UNIT
from neurosurgeon.net.messages import ErrorReply, Hello, Message, Ping, Pong, Prepare, Probe, Samples
from neurosurgeon.net.monitor_client import (
    RECENT_S,
    LinkMeasurement,
    estimate_link,
    last_link,
    links_file,
    measure_link,
    recent_link,
    remember_link,
)
from neurosurgeon.net.monitor_server import MAX_PROBE_BYTES, MAX_SAMPLES, MonitorServer, receive_probe
from neurosurgeon.net.sockets import connect
from neurosurgeon.utils.errors import (
    AccessError,
    BusyError,
    ConnectError,
    DeadlineError,
    NetworkError,
    NeurosurgeonError,
    PeerGoneError,
    UsageError,
)
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.load import Load
from tests.net.conftest import JOIN_S, LOOPBACK
from tests.net.test_connection import Pair, reset

Address = tuple[str, int]


@pytest.fixture
def no_service(listener: socket.socket) -> Address:
    """An address at which no service listens any more."""
    address: Address = listener.getsockname()
    listener.close()
    return address


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of link estimates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return links_file()


def say_hello(address: Address) -> Connection:
    """Return a connection on which both sides have said hello."""
    connection = connect(*address)
    connection.send(Hello.of())
    assert isinstance(connection.receive(JOIN_S).message, Hello)
    return connection


def assert_measures(address: Address) -> None:
    """Show that the service works."""
    link = measure_link(*address)
    assert 0 < link.rate_bytes_per_s <= MAX_RATE_BYTES_PER_S
    assert link.exchange_ms > 0


# ---------------------------------------------------------------- measuring


def test_rate_and_rtt_of_loopback_are_positive(service: Address) -> None:
    assert_measures(service)
    assert measure_link(*service).source is LinkSource.PROBE


def test_several_clients_measure_one_after_another(service: Address) -> None:
    for _ in range(5):
        assert_measures(service)


def test_a_pong_has_the_number_of_its_ping(service: Address) -> None:
    with say_hello(service) as connection:
        for sequence in (0, 7, 2**40):
            connection.send(Ping(sequence))
            assert connection.receive(JOIN_S).message == Pong(sequence)


@pytest.mark.parametrize("size_bytes", [1, 16_384, MAX_PROBE_BYTES])
def test_the_samples_of_a_probe_account_for_every_byte(service: Address, size_bytes: int) -> None:
    with say_hello(service) as connection:
        connection.send(Probe(size_bytes))
        connection.send_raw(bytes(size_bytes))
        samples = connection.receive(JOIN_S).message
    assert isinstance(samples, Samples)
    assert sum(samples.sizes_bytes) == size_bytes
    assert samples.times_us[0] == 0
    assert samples.times_us == sorted(samples.times_us)


def test_samples_of_many_pieces_fit_a_header(pair: Pair) -> None:
    size_bytes = MAX_SAMPLES + 1000
    pair[0].send_raw(bytes(size_bytes))
    samples = receive_probe(pair[1], size_bytes, memoryview(bytearray(1)))  # a byte a read
    assert len(samples.times_us) == len(samples.sizes_bytes) == MAX_SAMPLES
    assert sum(samples.sizes_bytes) == size_bytes
    pair[1].send(Samples([10**9] * MAX_SAMPLES, [10**6] * MAX_SAMPLES))
    assert isinstance(pair[0].receive(JOIN_S).message, Samples)


# ---------------------------------------------------------------- the load of the cloud


@pytest.mark.parametrize("load", [Load(), Load(12.5, 3.25), Load(0.0, 1e6)])
def test_a_line_is_a_load(load: Load) -> None:
    assert Load.of_line(load.line()) == load
    assert Load.of_line(load.line() + "\n") == load


NONSENSE = ["", "\n", "load", "load 1", "load 1 2 3", "load 1 x", "load nan 1", "load inf 1", "load 1 -1", "lead 1 2"]


@pytest.mark.parametrize("line", NONSENSE)
def test_any_other_line_is_ignored(listener: socket.socket, line: str) -> None:
    server = MonitorServer(listener)
    server.record_load("load 1 2")
    server.record_load(line)
    assert server.load == Load(1.0, 2.0)


def test_pongs_carry_the_newest_load(listener: socket.socket) -> None:
    server = MonitorServer(listener)
    serving = threading.Thread(target=server.serve, daemon=True)
    serving.start()
    with say_hello(listener.getsockname()) as connection:
        for sequence, load in enumerate([Load(12.5, 3.25), Load(0.5, 3.0)]):
            server.record_load(load.line())
            connection.send(Ping(sequence))
            assert connection.receive(JOIN_S).message == Pong(sequence, *load)
    listener.shutdown(socket.SHUT_RDWR)
    serving.join(JOIN_S)


def test_the_service_receives_the_load_from_its_parent() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        service.send_line("nonsense")
        service.send_line(Load(12.5, 3.25).line())
        with say_hello((LOOPBACK, service.ports[0])) as connection:
            pong = None
            for sequence in range(10_000):  # until the line has passed through the pipe
                connection.send(Ping(sequence))
                pong = connection.receive(JOIN_S).message
                if pong != Pong(sequence):
                    break
            assert pong == Pong(sequence, 12.5, 3.25)


# ---------------------------------------------------------------- refused messages


@pytest.mark.parametrize("size_bytes", [MAX_PROBE_BYTES + 1, 2**62, 0, -1])
def test_a_probe_outside_the_limit_is_refused(service: Address, size_bytes: int) -> None:
    with say_hello(service) as connection:
        connection.send(Probe(size_bytes))
        with pytest.raises(PeerGoneError):
            connection.receive(JOIN_S)
    assert_measures(service)


@pytest.mark.parametrize(
    "message", [Prepare("le_net", b"\1", "0123abcd"), Hello.of(), Pong(1)], ids=lambda message: type(message).__name__
)
def test_any_other_message_is_refused(service: Address, message: Message) -> None:
    with say_hello(service) as connection:
        connection.send(message)
        with pytest.raises(PeerGoneError):
            connection.receive(JOIN_S)
    assert_measures(service)


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n".ljust(HEAD_UNIT), bytes(1000), pickle.dumps(bytes(1000)), b"NSGN", b""],
    ids=["http", "zeros", "pickle", "half a frame", "nothing"],
)
def test_another_protocol_does_not_stop_the_service(service: Address, data: bytes) -> None:
    with socket.create_connection(service, JOIN_S) as sock:
        sock.sendall(data)
    assert_measures(service)


def test_a_client_lost_in_a_probe_does_not_stop_the_service(service: Address) -> None:
    with say_hello(service) as connection:
        connection.send(Probe(100_000))
        connection.send_raw(bytes(50_000))
        reset(connection.sock)
    assert_measures(service)


def test_clients_beyond_the_limit_are_closed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_server, "MAX_CONNECTIONS", 1)
    serving = threading.Thread(target=MonitorServer(listener).serve, daemon=True)
    serving.start()
    with say_hello(listener.getsockname()), connect(*listener.getsockname()) as refused:
        refused.send(Hello.of())
        assert isinstance(refused.receive(JOIN_S).message, ErrorReply)
        with pytest.raises(PeerGoneError):
            refused.receive(JOIN_S)
    listener.shutdown(socket.SHUT_RDWR)
    serving.join(JOIN_S)


# ---------------------------------------------------------------- beside other work


def test_measurement_runs_in_another_process() -> None:
    with LinkMeasurement(lambda: LinkEstimate(1e6, float(os.getpid()))) as measurement:
        measurement.start()
        found = measurement.result()
    assert found.rate_bytes_per_s == 1e6
    assert found.rtt_ms != os.getpid()


def test_measurement_starts_with_result(service: Address) -> None:
    with LinkMeasurement(lambda: measure_link(*service)) as measurement:
        assert measurement.result().source is LinkSource.PROBE


def test_measurement_raises_with_the_childs_traceback() -> None:
    def refuse() -> LinkEstimate:
        raise AccessError("another key", 7)

    with LinkMeasurement(refuse) as measurement, pytest.raises(AccessError, match="another key") as caught:
        measurement.result()
    assert caught.value.refusal == 7
    assert "in refuse" in caught.value.__notes__[0]


def test_measurement_of_a_killed_process_is_an_error() -> None:
    def die() -> LinkEstimate:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with LinkMeasurement(die) as measurement, pytest.raises(NeurosurgeonError, match="-9.*pass --bandwidth"):
        measurement.result()


def test_measurement_ends_with_its_block() -> None:
    def never() -> LinkEstimate:
        signal.pause()
        raise AssertionError

    reader, writer = os.pipe()  # the child holds the writing end, too, for as long as it lives
    with LinkMeasurement(never) as measurement:
        measurement.start()
        os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_measurement_that_never_starts_has_no_process() -> None:
    with LinkMeasurement(lambda: LinkEstimate(1.0, 1.0)):
        pass


# ---------------------------------------------------------------- an unreachable service


def test_a_missing_service_is_a_network_error(no_service: Address) -> None:
    with pytest.raises(ConnectError, match="no service at"):
        measure_link(*no_service)


def test_a_silent_service_is_a_network_error(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "REPLY_TIMEOUT_S", 0.02)
    with pytest.raises(DeadlineError):
        measure_link(*listener.getsockname())


def test_a_missing_service_gives_the_last_estimate(
    no_service: Address, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    host, port = no_service
    cache.write_text(json.dumps({f"{host}:{port}": [1e6, 2.5, time.time() - 90]}))
    link = estimate_link(*no_service)
    assert (link.rate_bytes_per_s, link.rtt_ms, link.source) == (1e6, 2.5, LinkSource.LAST)
    assert link.age_s == pytest.approx(90, abs=30)
    assert "using the value of" in caplog.text


@pytest.mark.usefixtures("cache")
def test_a_missing_service_without_an_estimate_is_an_error(no_service: Address) -> None:
    with pytest.raises(ConnectError, match="pass --bandwidth"):
        estimate_link(*no_service)


@pytest.mark.usefixtures("cache")
def test_a_full_service_without_an_estimate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*service: object) -> LinkEstimate:
        raise BusyError("too many edges", 50.0)

    monkeypatch.setattr(monitor_client, "measure_link", full)
    with pytest.raises(BusyError, match="pass --bandwidth"):
        estimate_link("cloud", 1)


@pytest.mark.usefixtures("cache")
def test_an_estimate_is_stored(service: Address) -> None:
    link = estimate_link(*service)
    last = last_link(*service)
    assert last is not None
    assert (last.rate_bytes_per_s, last.rtt_ms, last.host_ms) == (link.rate_bytes_per_s, link.rtt_ms, link.host_ms)
    assert (link.source, last.source) == (LinkSource.PROBE, LinkSource.LAST)


@pytest.mark.usefixtures("cache")
def test_every_cloud_has_its_own_estimate() -> None:
    remember_link("near", 9922, LinkEstimate(1e8, 0.1))
    remember_link("far", 9922, LinkEstimate(1e5, 90.0))
    near, far = last_link("near", 9922), last_link("far", 9922)
    assert near is not None and far is not None
    assert (near.rtt_ms, far.rtt_ms) == (0.1, 90.0)
    assert last_link("elsewhere", 9922) is None


@pytest.mark.parametrize(
    ("age_s", "is_young"), [(0.0, True), (RECENT_S / 2, True), (2 * RECENT_S, False), (-60.0, False)]
)
def test_recent_link_is_neither_old_nor_of_the_future(cache: Path, age_s: float, is_young: bool) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"near:9922": [1e6, 2.5, time.time() - age_s]}))
    assert (recent_link("near", 9922) is not None) is is_young
    assert recent_link("far", 9922) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"near:9922": null}',
        '{"near:9922": [1, 2]}',
        '{"near:9922": ["a", 1, 2]}',
        '{"near:9922": [1, 2, "x"]}',
        '{"near:9922": [0, 0, 0]}',
        '{"near:9922": [-1, 2, 3]}',
        '{"near:9922": [NaN, 2, 3]}',
        '{"near:9922": [1e-300, 2, 3]}',
        '{"near:9922": [1e6, 1e300, 3]}',
        '{"near:9922": [1e6, 2, 3, -1]}',
        f'{{"near:9922": [{10**400}, 2, 3]}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_cache_has_no_estimate(cache: Path, text: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert last_link("near", 9922) is None
    remember_link("near", 9922, LinkEstimate(1.0, 2.0))
    assert last_link("near", 9922) is not None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    remember_link("near", 9922, LinkEstimate(1.0, 2.0))
    assert last_link("near", 9922) is None


def test_a_wrong_address_is_not_hidden_by_the_last_estimate(cache: Path) -> None:
    host = "a" * 64 + ".example"
    remember_link(host, 9922, LinkEstimate(1.0, 2.0))
    with pytest.raises(UsageError):
        estimate_link(host, 9922)


# ---------------------------------------------------------------- commands


def test_the_client_prints_one_line(service: Address, capsys: pytest.CaptureFixture[str]) -> None:
    assert monitor.client(["-i", service[0], "--monitor-port", str(service[1])]) == 0
    assert capsys.readouterr().out.startswith("uplink ")


def test_the_client_prints_one_json_object(service: Address, capsys: pytest.CaptureFixture[str]) -> None:
    assert monitor.client(["-i", service[0], "--monitor-port", str(service[1]), "--json"]) == 0
    link = json.loads(capsys.readouterr().out)
    assert link["bandwidth_mb_per_s"] > 0 and link["rtt_ms"] > 0


def test_the_client_reports_a_missing_service_in_one_line(
    no_service: Address, capsys: pytest.CaptureFixture[str]
) -> None:
    assert monitor.client(["-i", no_service[0], "--monitor-port", str(no_service[1])]) == NetworkError.exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "no service at" in captured.err


def test_the_self_test_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neurosurgeon", "monitor-test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("bandwidth monitor works: uplink ")


FAKE_IPERF3 = """#!/bin/sh
case "$*" in
*-s*) echo "Server listening on 1"; sleep 10 ;;
*) echo '{"end": {"sum_received": {"bits_per_second": 8e9}}}' ;;
esac
"""


def test_iperf3_is_a_cross_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "iperf3"
    program.write_text(FAKE_IPERF3)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert monitor.test(["--compare-iperf3"]) == 0
    assert "iperf3: uplink 1000 MB/s (8000 Mbit/s); the monitor differs by " in capsys.readouterr().out
    program.write_text("#!/bin/sh\necho nonsense listening\n")
    assert monitor.test(["--compare-iperf3"]) == NetworkError.exit_code
    assert "iperf3 failed: nonsense" in capsys.readouterr().err


def test_a_missing_iperf3_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert monitor.test(["--compare-iperf3"]) == UsageError.exit_code
    assert "iperf3 is not installed" in capsys.readouterr().err


def test_the_client_starts_without_torch() -> None:
    code = (
        "import sys, neurosurgeon.net.monitor_client, neurosurgeon.net.monitor_server; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
