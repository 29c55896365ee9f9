"""Edges and clouds on a network with faults: no result is lost, and none is wrong."""

from __future__ import annotations

import errno
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_api
import tasks_edge_api
from neurosurgeon.cli.process import ServiceProcess
from tests import faults
from tests.equality import THREADS, whole_digest
from tests.faults import BREAKING, Fault, FaultProxy, write_slow_edge
from tests.test_tasks_scripts import Edge

MODEL = "le_net"
LINK = ["-t", MODEL, "--bandwidth", "1000", "--rtt", "0.1", "--no-correction", "--threads", str(THREADS)]


RunQueue = Callable[..., dict[str, Any]]


@pytest.fixture
def slow_edge(tmp_path: Path) -> list[str]:
    """The flags of an edge that believes to be so slow that it sends every task."""
    return [*LINK, "--edge-config", str(write_slow_edge(tmp_path / "slow.json"))]


@pytest.fixture
def run_queue(slow_edge: list[str], capsys: pytest.CaptureFixture[str]) -> RunQueue:
    """Run a queue in this process, and return its document."""

    def run(port: int, tasks: int, *flags: str, code: int = 0) -> dict[str, Any]:
        arguments = ["-p", str(port), "--monitor-port", "1", "--tasks", str(tasks), *slow_edge, *flags]
        assert tasks_edge_api.main([*arguments, "--json"]) == code
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def assert_all_right(document: dict[str, Any], tasks: int) -> None:
    assert sorted(task["id"] for task in document["tasks"]) == list(range(1, tasks + 1))
    assert [task["error"] for task in document["tasks"]] == [None] * tasks
    assert {task["output_digest"] for task in document["tasks"]} == {whole_digest(MODEL)}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A secret: with it, and with TLS, changed bytes are recognised. TCP itself does not always."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("0123456789abcdef" * 4)
    file.chmod(0o600)
    return str(file)


@pytest.fixture(scope="module")
def keyed_cloud(key_file: str) -> Iterator[ServiceProcess]:
    """A running cloud that wants the key."""
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", str(THREADS), "--key-file", key_file]
    with ServiceProcess(command, services=2) as process:
        yield process


@pytest.fixture
def proxy(cloud: ServiceProcess) -> Iterator[FaultProxy]:
    """A proxy in front of the running cloud that does nothing yet."""
    with FaultProxy(cloud.ports[0]) as one:
        yield one


# ---------------------------------------------------------------- the proxy itself


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a service that echoes all bytes."""

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            try:
                while data := sock.recv(4096):
                    sock.sendall(data)
            except OSError:
                pass

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    thread.join()


def received(port: int, data: bytes) -> bytes | None:
    """Return the echo of some bytes; None after a reset."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        parts = []
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(4096):
                parts.append(part)
        except OSError as exc:  # ENOTCONN: the reset came before the shutdown
            assert exc.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
            return None
        return b"".join(parts)


@pytest.mark.parametrize(
    ("fault", "back"),
    [
        (None, b"abcdef"),
        (Fault.DELAY, b"abcdef"),
        (Fault.TRICKLE, b"abcdef"),
        (Fault.DUPLICATE, b"abcdefabcdef"),
        (Fault.CORRUPT, b"ab#def"),
        (Fault.BLACKHOLE, b""),
    ],
)
def test_each_fault_has_its_effect(fault: Fault | None, back: bytes, echo: int) -> None:
    with FaultProxy(echo, [fault] if fault else [], after_bytes=0) as proxy:
        if fault is Fault.BLACKHOLE:
            with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
                sock.sendall(b"abcdef")
                sock.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    sock.recv(1)
        else:
            assert received(proxy.port, b"abcdef") == back
        assert sum(proxy.happened.values()) == (fault is not None)


@pytest.mark.parametrize("fault", BREAKING)
def test_a_broken_connection_delivers_at_most_half(fault: Fault, echo: int) -> None:
    with FaultProxy(echo, [fault], after_bytes=0) as proxy:
        assert received(proxy.port, b"abcdef") in (b"abc", b"", None)


# ---------------------------------------------------------------- queues


@pytest.mark.parametrize("fault", [Fault.DELAY, Fault.CUT, Fault.RESET, Fault.TRICKLE])
@pytest.mark.parametrize("how", ["local", "retry"])
@pytest.mark.parametrize("in_flight", ["1", "2"])
def test_a_queue_gets_every_result_under_faults(
    fault: Fault, how: str, in_flight: str, proxy: FaultProxy, run_queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "DELAY_S", 0.01)
    proxy.after_bytes = 1_500_000  # of every connection: its third task
    proxy.set_faults(1.0, [fault])
    document = run_queue(proxy.port, 12, "--on-cloud-loss", how, "--in-flight", in_flight)
    assert_all_right(document, 12)
    assert proxy.happened[fault] >= 1
    if how == "retry":
        assert {task["where"] for task in document["tasks"]} <= {"cloud", "split"}


@pytest.mark.parametrize("fault", [Fault.DUPLICATE, Fault.CORRUPT])
@pytest.mark.parametrize("how", ["local", "retry"])
def test_with_a_key_changed_bytes_make_no_wrong_result(
    fault: Fault, how: str, keyed_cloud: ServiceProcess, key_file: str, run_queue: RunQueue
) -> None:
    with FaultProxy(keyed_cloud.ports[0], [fault], after_bytes=1_500_000) as proxy:
        flags = ["--on-cloud-loss", how, "--in-flight", "2", "--key-file", key_file]
        assert_all_right(run_queue(proxy.port, 12, *flags), 12)
        assert proxy.happened[fault] >= 1


@pytest.mark.parametrize("in_flight", ["1", "2"])
def test_a_queue_continues_without_a_silent_cloud(
    in_flight: str, proxy: FaultProxy, run_queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosurgeon.net.session.SILENCE_S", 1.5)  # the cloud sends a heartbeat every second
    proxy.after_bytes = 700_000
    proxy.set_faults(1.0, [Fault.BLACKHOLE])
    document = run_queue(proxy.port, 12, "--in-flight", in_flight)
    assert_all_right(document, 12)
    assert "edge" in {task["where"] for task in document["tasks"]}


def test_on_cloud_loss_fail_reports_the_cause(proxy: FaultProxy, run_queue: RunQueue) -> None:
    proxy.after_bytes = 700_000
    proxy.set_faults(1.0, [Fault.RESET])
    document = run_queue(proxy.port, 6, "--on-cloud-loss", "fail", "--in-flight", "1", code=1)
    errors = [task["error"] for task in document["tasks"] if task["error"]]
    assert errors and all("the cloud disconnected" in error for error in errors)


@pytest.mark.parametrize("in_flight", ["1", "4"])
def test_a_queue_uses_a_reconnected_cloud_again(in_flight: str, slow_edge: list[str]) -> None:
    command = ["tasks_cloud_api.py", "--monitor-port", "0", "-p"]
    with ServiceProcess([*command, "0"], services=2) as first:
        edge = Edge([first.ports[0], 1], "--tasks", "100000", "--in-flight", in_flight, *slow_edge)
        wait_for_answer(edge, "cloud")
        first.process.kill()
        wait_for_answer(edge, "edge")
        with ServiceProcess([*command, str(first.ports[0])], services=2):
            wait_for_answer(edge, "cloud")
            edge.process.send_signal(signal.SIGINT)
            code, error = edge.end()
    assert code == 130, error
    assert "the cloud is reconnected" in error


def wait_for_answer(edge: Edge, place: str, max_tasks: int = 2000) -> None:
    """Wait for a new result that was computed in a place, for at most ``max_tasks`` tasks."""
    seen = len(edge.lines)
    for _ in range(max_tasks):
        edge.wait_for_tasks(1)
        if any(line.endswith(f"answered by {place}") for line in edge.lines[seen:]):
            return
    raise AssertionError(f"no answer by {place}")


# ---------------------------------------------------------------- single tasks


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.RESET, Fault.BLACKHOLE])
@pytest.mark.parametrize("after_bytes", [600, 100_000])
def test_a_single_task_gets_its_result_under_faults(
    fault: Fault,
    after_bytes: int,
    proxy: FaultProxy,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neurosurgeon.net.session.SILENCE_S", 1.5)
    proxy.after_bytes = after_bytes
    proxy.set_faults(1.0, [fault])
    arguments = ["-p", str(proxy.port), "--monitor-port", "1", *LINK, "--point", "0", "--json"]
    assert edge_api.main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"]["digest"] == whole_digest(MODEL)
    assert document["where"] == "edge"


def test_a_task_is_sent_again_and_not_computed_twice(
    cloud: ServiceProcess, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.after_bytes, proxy.most = 100_000, 2
    proxy.set_faults(1.0, [Fault.RESET])
    command = ["-p", str(proxy.port), "--monitor-port", "1", *LINK, "--point", "0", "--json"]
    assert edge_api.main([*command, "--on-cloud-loss", "retry"]) == 0
    assert proxy.happened[Fault.RESET] == 2
    document = json.loads(capsys.readouterr().out)
    assert (document["where"], document["output"]["digest"]) == ("cloud", whole_digest(MODEL))
