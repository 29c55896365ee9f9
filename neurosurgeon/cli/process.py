"""Command lines: the parent parser that the scripts share, one-line errors, exit codes, services as processes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from select import PIPE_BUF, select
from types import FrameType, TracebackType
from typing import IO, Protocol

from neurosurgeon.utils.errors import NetworkError, NeurosurgeonError, UsageError
from neurosurgeon.utils.logs import is_entry, is_warning, start_logging
from neurosurgeon.utils.packages import missing_package

EXIT_INTERRUPTED = 130
START_TIMEOUT_S = 60.0  # a cold import of torch on a small board
KEPT_LOG_LINES = 10_000  # of a service that runs for weeks
STOP_TIMEOUT_S = 15.0  # a service finishes what runs, within 10 s
ROOT = Path(__file__).resolve().parent.parent.parent


class Main(Protocol):
    """The main function of a command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command, with the flags of this process by default; return its exit code."""
        ...


def script(module: str, prog: str, function: str = "main") -> Main:
    """Return the main function of a command, whose body is in a module of `neurosurgeon.cli`.

    It imports that module when it is called. If a package is not installed, it prints one line that names the package,
    and returns 2.
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
    """Set ``stop`` when stdin closes: the parent holds its other end, and however it dies, this process ends.

    Args: on_line: takes what the parent tells meanwhile (`ServiceProcess.tell`), from a thread of its own.
    """

    def wait() -> None:
        # Unbuffered: a thread that waits in a buffer when the interpreter ends makes it abort.
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                on_line(line.decode(errors="replace"))
        stop.set()

    threading.Thread(target=wait, daemon=True).start()


def run_main(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Callable[[argparse.Namespace], int]
) -> int:
    """Parse, run, and turn errors into one line on stderr and an exit code."""
    args = parser.parse_args(argv)
    start_logging("debug" if args.debug else args.log_level, as_json=args.log_json)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Chinese shows escapes, and goes on
    try:
        code = run(args)
        sys.stdout.flush()  # here, where a reader that left is caught
        return code
    except NeurosurgeonError as exc:
        if args.debug:
            traceback.print_exc()
        print(f"{parser.prog}: error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # our reader (head, less) left; point stdout at nothing so that Python's exit is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NeurosurgeonError.exit_code
    except Exception as exc:
        if args.debug:
            traceback.print_exc()
        if line := missing_package(exc):
            print(f"{parser.prog}: error: {line}", file=sys.stderr)
            return UsageError.exit_code
        kind = type(exc).__name__
        print(f"{parser.prog}: error: unexpected {kind}: {exc} (a bug: --debug shows where)", file=sys.stderr)
        return NeurosurgeonError.exit_code


class StopEvent:
    """Set by SIGINT or SIGTERM, or by any thread; remembers whether it was SIGINT.

    It is a pipe, to which Python writes as soon as a signal comes. With a `threading.Event`, a signal that comes just
    when its thread begins to wait is lost, or finds the event's own lock taken, and the process never ends.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)

    def set(self) -> None:
        """Let all go on who wait, now or later."""
        with contextlib.suppress(BlockingIOError):  # it has been set very often
            os.write(self.writer, b"\0")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, at most so long; return whether it is."""
        return bool(select([self._reader], [], [], timeout_s)[0])


def stop_event(*, ignore_interrupt: bool = False) -> StopEvent:
    """Return an event that SIGTERM and SIGINT set, for a service to wait on.

    Args: ignore_interrupt: leave Ctrl-C to the parent process, which shares our terminal.
    """
    event = StopEvent()

    def remember(number: int, frame: FrameType | None) -> None:
        event.interrupted = number == signal.SIGINT

    signal.set_wakeup_fd(event.writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, remember)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignore_interrupt else remember)
    return event


# ---------------------------------------------------------------- services as child processes

_LISTENING = re.compile(r"listening on \S*:(\d+)")


def listening_line(service: str, address: str) -> str:
    """Return the log line with which a service says that it is ready, and where."""
    return f"{service} listening on {address}"


class ServiceProcess:
    """A service of this project as a child process, from its first listening line to the end of the block.

    The child gets a pipe as stdin: when this process dies, however, the pipe closes and the child ends.

    Args: services: how many listening lines to wait for. prefix: a command that runs the child elsewhere.
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
        is_shown = False  # an entry of the log, with its traceback
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

    def tell(self, line: str) -> None:
        """Write a short line to the child's stdin; it is lost where the child is gone, or does not read."""
        pipe = self.process.stdin
        if pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):  # closed, full, or nobody reads
            os.set_blocking(pipe.fileno(), False)
            os.write(pipe.fileno(), f"{line}\n".encode()[:PIPE_BUF])  # so much goes whole, or not at all

    def close(self) -> None:
        """Ask the child to end, and wait until it has."""
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
