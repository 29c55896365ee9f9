"""Running a command: errors are one line and an exit code, signals stop it, services start or report why not."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from neurosurgeon.cli import process as processes
from neurosurgeon.cli.parser import base_parser
from neurosurgeon.cli.process import ROOT, ServiceProcess, StopEvent, listening_line, run_main
from neurosurgeon.utils.errors import (
    ConnectError,
    DataSetError,
    NetworkError,
    NeurosurgeonError,
    PlanningError,
)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undo the logging that run_main sets up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


# ---------------------------------------------------------------- running


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NeurosurgeonError("it broke"), 1),
        (PlanningError("no plan"), 1),
        (DataSetError("bad file"), 2),
        (ConnectError("no reply"), 3),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: NeurosurgeonError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    assert run_main(base_parser("tool", None), [], fail) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"tool: error: {error}\n")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ConnectError("no reply")

    assert run_main(base_parser("tool", None), ["--debug"], fail) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("tool: error: no reply\n")


def test_an_unexpected_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ZeroDivisionError("division by zero")

    assert run_main(base_parser("tool", None), [], fail) == 1
    error = capsys.readouterr().err
    assert error.startswith("tool: error: ")
    assert "ZeroDivisionError: division by zero" in error
    assert error.count("\n") == 1
    assert run_main(base_parser("tool", None), ["--debug"], fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_quiet_and_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert run_main(base_parser("tool", None), [], interrupt) == 130
    assert capsys.readouterr().err == ""


def test_the_exit_code_of_a_run_is_kept() -> None:
    assert run_main(base_parser("tool", None), [], lambda args: 7) == 7


def test_a_closed_stdout_gives_no_traceback() -> None:
    command = [sys.executable, "deployment.py", "-t", "le_net", "-b", "1", "--predictor", "linear"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


# ---------------------------------------------------------------- services


def test_service_starts_logs_its_port_and_ends() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        assert 0 < service.ports[0] < 65536
        assert service.process.poll() is None
    assert service.process.poll() is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["-m", "neurosurgeon.net.no_such_module"],
            "no_such_module did not start: .*No module named",
        ),
        (["-c", "pass"], "did not start: no output"),
        (["cloud_api.py", "-p", "http"], "did not start: .*'http' is not a port"),
    ],
)
def test_service_that_does_not_start_reports_the_cause(arguments: list[str], said: str) -> None:
    service = ServiceProcess(arguments)
    with pytest.raises(NetworkError, match=said), service:
        pass
    assert service.process.poll() is not None


def test_service_without_listening_line_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 0.01)
    service = ServiceProcess(["-c", "import sys; sys.stdin.read()"])
    with pytest.raises(NetworkError, match="did not start"), service:
        pass
    assert service.process.poll() is not None


def test_service_ends_when_its_stdin_closes() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        assert service.process.stdin is not None
        service.process.stdin.close()
        assert service.process.wait(30) == 0


def test_service_error_is_shown_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import logging, sys\n"
        "from neurosurgeon.cli.process import listening_line\n"
        "from neurosurgeon.utils.logs import internal_error, start_logging\n"
        "start_logging('info', as_json=False)\n"
        "log = logging.getLogger('toy')\n"
        "try:\n"
        "    {}['shape']\n"
        "except KeyError as exc:\n"
        "    internal_error(log, exc, 'task 4 failed')\n"
        "log.info(listening_line('toy', 'x:1'))\n"
        "sys.stdin.read()\n"
    )
    with ServiceProcess(["-c", script]):
        pass
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "ERROR task 4 failed: internal error: KeyError: 'shape'"
    assert shown[1] == "Traceback (most recent call last):"
    assert shown[-1] == "KeyError: 'shape'"


def test_listening_line_is_recognised() -> None:
    script = (
        f"import sys; print({listening_line('toy', '[::1]:4711')!r}, file=sys.stderr, flush=True); sys.stdin.read()"
    )
    with ServiceProcess(["-c", script]) as service:
        assert service.ports == [4711]


# ---------------------------------------------------------------- lines to a service


ECHO = (
    "import sys\n"
    "from neurosurgeon.cli.process import StopEvent, end_with_parent, listening_line\n"
    "stop = StopEvent()\n"
    "end_with_parent(stop, lambda line: print(line.strip().upper(), flush=True))\n"
    "print(listening_line('echo', 'x:1'), file=sys.stderr, flush=True)\n"
    "stop.wait()\n"
)


def test_send_line_reaches_the_service() -> None:
    with ServiceProcess(["-c", ECHO], stdout=subprocess.PIPE) as service:
        assert service.process.stdout is not None
        for line in ("one", "two"):
            service.send_line(line)
            assert service.process.stdout.readline() == f"{line.upper()}\n"
        assert service.process.stdin is not None
        service.process.stdin.close()
        assert service.process.wait(30) == 0
        service.process.stdout.close()


def test_send_line_never_blocks_without_a_reader() -> None:
    deaf = f"import sys, time; print({listening_line('deaf', 'x:1')!r}, file=sys.stderr, flush=True); time.sleep(600)"
    with ServiceProcess(["-c", deaf]) as service:
        for _ in range(10_000):  # far more than a pipe holds
            service.send_line("x" * 100)
        assert service.is_running()


def test_send_line_to_an_ended_service_is_ignored() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        service.process.kill()
        service.process.wait()
        service.send_line("load 1 2")
    service.send_line("load 1 2")


def test_service_with_a_parent_stops_on_sigterm() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        service.process.terminate()
        assert service.process.wait(30) == 0


SIGNALLED = """
import os, signal
from neurosurgeon.cli.process import stop_event
for number in range(3_000):
    stop = stop_event()
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (number % 60 + 1))  # about when it begins to wait
    assert stop.wait()
    os.close(stop.writer)
    os.close(stop._reader)
print("ended")
"""


def test_stop_event_loses_no_signal() -> None:
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


def test_stop_event_stays_set() -> None:
    stop = StopEvent()
    assert not stop.wait(0.0)
    for _ in range(100_000):  # more than a pipe holds
        stop.set()
    assert stop.wait()
    assert stop.wait(0.0)


def test_ctrl_c_during_imports_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.importlib, "import_module", interrupted)
    assert processes.script("edge", "edge_api.py")([]) == processes.EXIT_INTERRUPTED
