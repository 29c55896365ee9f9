"""Run a command: its exit code, its one-line errors, its signals; and services as child processes.

A service is a process that runs until SIGINT, SIGTERM, or the end of its parent (`end_with_parent`). It logs a
listening line for each of its ports. `ServiceProcess` starts a service, reads its log on a thread, and takes the ports
from these lines.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from select import PIPE_BUF, select
from types import FrameType, TracebackType
from typing import IO

from neurosurgeon.utils.errors import NetworkError, NeurosurgeonError, UsageError
from neurosurgeon.utils.logs import is_entry, is_warning, start_logging
from neurosurgeon.utils.machine import forget_speeds
from neurosurgeon.utils.packages import missing_package

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
START_TIMEOUT_S = 60.0  # a cold import of torch on a small board
KEPT_LOG_LINES = 10_000  # a service may run for weeks
STOP_TIMEOUT_S = 15.0  # a service finishes its running tasks within 10 s
ROOT = Path(__file__).resolve().parent.parent.parent


def script(module: str, prog: str, function: str = "main") -> Callable[..., int]:
    """Return the main function of a command whose body is ``function`` of a module of `neurosurgeon.cli`.

    The module is imported when the command is called. If a package is not installed, the command prints one line with
    the package's name and returns 2. The flags are an argument, by default those of this process.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        try:
            body = getattr(importlib.import_module(f"neurosurgeon.cli.{module}"), function)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except ModuleNotFoundError as exc:
            line = missing_package(exc)
            if line is None:
                raise
            print(f"{prog}: error: {line}", file=sys.stderr)
            return UsageError.exit_code
        return int(body(argv, prog))

    return main


def end_with_parent(stop: StopEvent, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Set ``stop`` when stdin closes. The parent holds its other end, so this process ends however the parent ends.

    Args: on_line: called with each line from the parent (`ServiceProcess.send_line`), on a thread of its own.
    """

    def wait() -> None:
        # Unbuffered: the interpreter aborts if a thread still waits for a buffered reader at its end.
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                on_line(line.decode(errors="replace"))
        stop.set()

    threading.Thread(target=wait, daemon=True).start()


def run_main(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Callable[[argparse.Namespace], int]
) -> int:
    """Parse the command line, run the command, and return its exit code. An error becomes one line on stderr."""
    args = parser.parse_args(argv)
    start_logging("debug" if args.debug else args.log_level, as_json=args.log_json)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese shows escapes
    try:
        if vars(args).get("remeasure_machine"):
            forget_speeds()
        code = run(args)
        sys.stdout.flush()  # here, where a reader that left is caught
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout (head, less) left; with /dev/null as stdout, Python's exit is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NeurosurgeonError.exit_code
    except Exception as exc:
        if args.debug:
            traceback.print_exc()
        code, line = _failure(exc)
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return code


def _failure(exc: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and its line for the user."""
    if isinstance(exc, NeurosurgeonError):
        return exc.exit_code, str(exc)
    if line := missing_package(exc):
        return UsageError.exit_code, line
    return NeurosurgeonError.exit_code, f"unexpected {type(exc).__name__}: {exc} (a bug: --debug shows where)"


class StopEvent:
    """An event that SIGINT, SIGTERM, or any thread sets. `interrupted` is true after SIGINT.

    It is a pipe, to which Python writes as soon as a signal arrives. A `threading.Event` would not do. A signal that
    arrives just when the main thread begins to wait is lost, or meets the event's own lock, and the process never ends.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    def set(self) -> None:
        """Set the event: every call of `wait` returns, now or later. Called on any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, as the event was set very often
            os.write(self.writer, b"\0")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return whether the event is set. May block until it is, for at most ``timeout_s``; None: without limit."""
        return bool(select([self._reader], [], [], timeout_s)[0])


def stop_event(*, ignore_interrupt: bool = False) -> StopEvent:
    """Return an event that SIGTERM and SIGINT set. Called on the main thread of a service.

    Args: ignore_interrupt: leave Ctrl-C to the parent process, which has the same terminal.
    """
    event = StopEvent()

    def remember(number: int, frame: FrameType | None) -> None:
        event.interrupted = number == signal.SIGINT

    signal.set_wakeup_fd(event.writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignore_interrupt else remember)
    return event


@contextlib.contextmanager
def deferred_interrupt(interrupted: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set an event, so that tasks in flight are finished. The second Ctrl-C interrupts."""

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        log.warning("finishing the tasks in flight; Ctrl-C again to stop now")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- services as child processes

_LISTENING = re.compile(r"listening on \S*:(\d+)")


def listening_line(service: str, address: str) -> str:
    """Return the log line of a service that is ready, with its address."""
    return f"{service} listening on {address}"


class ServiceProcess:
    """A service of this project as a child process, which ends with the `with` block.

    Entering blocks until the child has logged its listening lines. The child's stdin is a pipe: if this process dies,
    the pipe closes and the child ends. A thread reads the child's log, keeps it in `log`, and shows warnings on stderr.

    Args:   services: the number of listening lines to wait for; `ports` has their ports, in the order of the lines.
            prefix: a command that runs the child elsewhere.
    Raises: NetworkError, when entered: the child did not start.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        services: int = 1,
        stdout: IO[str] | int = subprocess.DEVNULL,
        prefix: Sequence[str] = (),
    ) -> None:
        self._stdout = stdout
        self.ports: list[int] = []
        self.log: list[str] = []
        self._services = services
        self._name = " ".join(arguments[:3])
        self._command = [*prefix, sys.executable, *arguments, "--until-stdin-closes"]

    def __enter__(self) -> ServiceProcess:
        self.process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own modules
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=self._stdout, text=True
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT_S) or len(self.ports) < self._services:
            self.close()
            raise NetworkError(f"{self._name} did not start: {' '.join(self.log[-3:]) or 'no output'}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None  # noqa: S101  # a pipe, as asked for
        is_shown = False  # of the current log entry, whose traceback has more lines
        for line in self.process.stderr:
            is_shown = is_warning(line) or (is_shown and not is_entry(line))
            self.log.append(line.rstrip())
            del self.log[:-KEPT_LOG_LINES]
            found = _LISTENING.search(line)
            if found:
                self.ports.append(int(found[1]))
                if len(self.ports) == self._services:
                    self._ready.set()
            elif is_shown:
                sys.stderr.write(line)
        self._ready.set()

    def is_running(self) -> bool:
        """Return whether the child has not ended."""
        return self.process.poll() is None

    def send_line(self, line: str) -> None:
        """Write a short line to the child's stdin. Never blocks: without a reader the line is lost."""
        assert self.process.stdin is not None  # noqa: S101  # a pipe, as asked for
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            pipe = self.process.stdin.fileno()
            os.set_blocking(pipe, False)
            os.write(pipe, f"{line}\n".encode()[:PIPE_BUF])  # up to PIPE_BUF bytes are written whole, or not at all

    def close(self) -> None:
        """End the child. May block for up to `STOP_TIMEOUT_S`, after which the child is killed."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(STOP_TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None:
                pipe.close()
