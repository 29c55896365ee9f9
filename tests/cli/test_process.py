"""Command lines: mistakes are one line and exit code 2, errors keep their codes, services start or say why not."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from neurosurgeon.cli import process as processes
from neurosurgeon.cli.parser import (
    add_device,
    address_parser,
    base_parser,
    non_negative_float,
    non_negative_int,
    port_number,
    positive_float,
    positive_int,
    typed,
    worker_count,
)
from neurosurgeon.cli.process import ROOT, ServiceProcess, StopEvent, listening_line, run_main
from neurosurgeon.utils.errors import (
    ConnectError,
    DataSetError,
    NetworkError,
    NeurosurgeonError,
    PlanningError,
    UsageError,
)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undo what run_main sets up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize("arguments", [["--nonsense"], ["-p", "x"], ["-p", "70000"], ["-d", "tpu"], ["--threads", "0"]])
def test_a_wrong_command_line_is_one_line_and_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = address_parser("edge_api.py", None)
    add_device(parser)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("edge_api.py: error: ")
    assert captured.err.count("\n") == 1


def test_the_defaults_are_those_of_the_contract() -> None:
    parser = address_parser("edge_api.py", None, monitor_port=True)
    add_device(parser)
    args = parser.parse_args([])
    assert (args.ip, args.port, args.monitor_port, args.device) == ("127.0.0.1", 9999, 9922, "cpu")


def test_short_and_long_flags_mean_the_same() -> None:
    parser = address_parser("edge_api.py", None)
    add_device(parser)
    short = parser.parse_args(["-i", "::1", "-p", "1", "-d", "cuda"])
    assert short == parser.parse_args(["--ip", "::1", "--port", "1", "--device", "cuda"])


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (port_number, "0", 0),
        (port_number, "65535", 65535),
        (positive_int, "1", 1),
        (worker_count, "64", 64),
        (non_negative_int, "0", 0),
        (positive_float, "1.25", 1.25),
        (non_negative_float, "0", 0.0),
    ],
)
def test_a_number_in_range_is_taken(convert: Callable[[str], Any], text: str, value: float) -> None:
    assert convert(text) == value
    assert type(convert(text)) is type(value)


@pytest.mark.parametrize(
    ("convert", "texts"),
    [
        (port_number, ["-1", "65536", "80.5", "http", ""]),
        (positive_int, ["0", "-3", "1.5", "nan", "9" * 30]),
        (non_negative_int, ["-1", "one"]),
        (worker_count, ["0", "65", "1.5", "all"]),
        (positive_float, ["0", "-1", "nan", "inf", "1e12", "fast"]),
        (non_negative_float, ["-0.1", "nan", "inf", ""]),
    ],
)
def test_a_number_out_of_range_is_refused_by_what_it_is(convert: Callable[[str], Any], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            convert(text)


def test_an_error_of_ours_becomes_one_of_the_parser() -> None:
    def refuse(text: str) -> str:
        raise UsageError(f"no {text}")

    with pytest.raises(argparse.ArgumentTypeError, match="no luck"):
        typed(refuse)("luck")


# ---------------------------------------------------------------- running


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NeurosurgeonError("it broke"), 1),
        (PlanningError("no plan"), 1),
        (DataSetError("bad file"), 2),
        (ConnectError("nobody there"), 3),
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
        raise ConnectError("nobody there")

    assert run_main(base_parser("tool", None), ["--debug"], fail) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("tool: error: nobody there\n")


def test_an_error_of_nobody_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ZeroDivisionError("division by zero")

    assert run_main(base_parser("tool", None), [], fail) == 1
    error = capsys.readouterr().err
    assert error.startswith("tool: error: ")
    assert "ZeroDivisionError: division by zero" in error
    assert error.count("\n") == 1
    assert run_main(base_parser("tool", None), ["--debug"], fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_control_c_is_quiet_and_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert run_main(base_parser("tool", None), [], interrupt) == 130
    assert capsys.readouterr().err == ""


def test_the_exit_code_of_a_run_is_kept() -> None:
    assert run_main(base_parser("tool", None), [], lambda args: 7) == 7


def test_a_reader_that_leaves_is_no_traceback() -> None:
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


def test_a_service_starts_says_its_port_and_ends() -> None:
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
def test_a_service_that_does_not_start_says_why(arguments: list[str], said: str) -> None:
    service = ServiceProcess(arguments)
    with pytest.raises(NetworkError, match=said), service:
        pass
    assert service.process.poll() is not None


def test_a_service_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_TIMEOUT_S", 0.01)
    service = ServiceProcess(["-c", "import sys; sys.stdin.read()"])
    with pytest.raises(NetworkError, match="did not start"), service:
        pass
    assert service.process.poll() is not None


def test_a_service_ends_when_the_pipe_to_its_parent_closes() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        assert service.process.stdin is not None
        service.process.stdin.close()
        assert service.process.wait(30) == 0


def test_an_error_of_a_service_is_shown_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_line_of_a_service_is_the_one_that_is_waited_for() -> None:
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


def test_a_service_hears_lines_and_ends_when_the_pipe_closes() -> None:
    with ServiceProcess(["-c", ECHO], stdout=subprocess.PIPE) as service:
        assert service.process.stdout is not None
        for line in ("one", "two"):
            service.tell(line)
            assert service.process.stdout.readline() == f"{line.upper()}\n"
        assert service.process.stdin is not None
        service.process.stdin.close()
        assert service.process.wait(30) == 0
        service.process.stdout.close()


def test_telling_a_service_that_does_not_read_never_blocks() -> None:
    deaf = f"import sys, time; print({listening_line('deaf', 'x:1')!r}, file=sys.stderr, flush=True); time.sleep(600)"
    with ServiceProcess(["-c", deaf]) as service:
        for _ in range(10_000):  # far more than a pipe holds
            service.tell("x" * 100)
        assert service.is_running()


def test_telling_a_service_that_is_gone_is_fine() -> None:
    with ServiceProcess(["-m", "neurosurgeon", "monitor-server", "--monitor-port", "0"]) as service:
        service.process.kill()
        service.process.wait()
        service.tell("load 1 2")
    service.tell("load 1 2")


def test_a_service_that_hears_its_parent_stops_cleanly() -> None:
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


def test_no_moment_is_wrong_for_a_signal_to_stop() -> None:
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


def test_a_stop_is_for_all_who_wait_and_stays() -> None:
    stop = StopEvent()
    assert not stop.wait(0.0)
    for _ in range(100_000):  # more than a pipe holds
        stop.set()
    assert stop.wait()
    assert stop.wait(0.0)


def test_ctrl_c_while_a_command_is_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.importlib, "import_module", interrupted)
    assert processes.script("edge", "edge_api.py")([]) == processes.EXIT_INTERRUPTED
