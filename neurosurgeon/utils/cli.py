"""Command lines: the parent parser that the scripts share, one-line errors, exit codes, services as processes."""

from __future__ import annotations

import argparse
import contextlib
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
from typing import IO, Any, NoReturn

from neurosurgeon.utils.errors import NetworkError, NeurosurgeonError, UsageError
from neurosurgeon.utils.logs import LEVELS, is_entry, is_warning, start_logging
from neurosurgeon.utils.machine import forget_speeds
from neurosurgeon.utils.packages import missing_package

DEFAULT_IP, DEFAULT_PORT, DEFAULT_MONITOR_PORT = "127.0.0.1", 9999, 9922
EXIT_INTERRUPTED = 130
START_TIMEOUT_S = 60.0  # a cold import of torch on a small board
KEPT_LOG_LINES = 10_000  # of a service that runs for weeks
STOP_TIMEOUT_S = 15.0  # a service finishes what runs, within 10 s
ROOT = Path(__file__).resolve().parent.parent.parent


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message} (--help shows all flags)\n")


def base_parser(prog: str, description: str | None) -> Parser:
    """Return a parser with what every command has."""
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and debug logs (default: off)")
    parser.add_argument(
        "--log-level", choices=LEVELS, default="info", help="what is logged; debug: every task, too (default: info)"
    )
    parser.add_argument("--log-json", action="store_true", help="log JSON, one object a line (default: text)")
    return parser


def address_parser(prog: str, description: str | None, *, port: bool = True, monitor_port: bool = False) -> Parser:
    """Return a parser with the address of a service, as clients and servers share it."""
    parser = base_parser(prog, description)
    parser.add_argument("-i", "--ip", default=DEFAULT_IP, help=f"address of the cloud (default: {DEFAULT_IP})")
    if port:
        parser.add_argument(
            "-p", "--port", type=port_number, default=DEFAULT_PORT, help=f"port of the cloud (default: {DEFAULT_PORT})"
        )
    if monitor_port:
        parser.add_argument(
            "--monitor-port",
            type=port_number,
            default=DEFAULT_MONITOR_PORT,
            help=f"port of the bandwidth service (default: {DEFAULT_MONITOR_PORT})",
        )
    _add_access(parser)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Add what both sides prove to each other before they speak; the same flags on either side."""
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret that both sides hold and prove to each other (default: $NEUROSURGEON_KEY, else none)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="this side's certificate, PEM (default: none)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM (default: none)")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="CA that must have signed the other side's certificate, PEM; turns TLS on for an edge (default: none)",
    )


def add_insecure(parser: argparse.ArgumentParser) -> None:
    """Add --insecure, for services."""
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="serve whoever reaches an address that is not loopback, without key or TLS (default: off)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add -d and --threads."""
    parser.add_argument(
        "-d", "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)"
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        help="CPU threads to compute with (default: as many as this side's predictors were measured with)",
    )


def add_model(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add -t, --model-file and --input-size, for `models.sources.chosen_model`."""
    parser.add_argument(
        "-t",
        "--type",
        required=True,
        metavar="MODEL",
        help=f"model to {purpose}: alex_net, vgg_net, le_net, mobile_net, any classification network of torchvision by "
        "its own name, or FILE:FUNCTION of a --model-file",
    )
    add_model_files(parser)
    parser.add_argument(
        "--input-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of the square image that the network takes (default: the one it was trained for, mostly 224)",
    )


def add_model_files(parser: argparse.ArgumentParser) -> None:
    """Add --model-file."""
    parser.add_argument(
        "--model-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.py",
        help="Python file with functions that return modules, known as FILE:FUNCTION; it is run; may be repeated "
        "(default: none)",
    )


def add_predictor_choice(
    parser: argparse.ArgumentParser, *choices: str, sides: Sequence[str] = ("edge", "cloud")
) -> None:
    """Add the flags that say where latencies come from; the first choice is the default."""
    parser.add_argument(
        "--predictor", choices=choices, default=choices[0], help=f"where latencies come from (default: {choices[0]})"
    )
    for side in sides:
        parser.add_argument(
            f"--{side}-config",
            type=Path,
            metavar="PATH",
            help=f"the {side}'s fitted parameters (a file) or data sets (a directory), used as they are "
            "(default: predictor/, scaled to the speed of this machine)",
        )
    parser.add_argument(
        "--remeasure-machine",
        action="store_true",
        help="measure the speed of this machine again (default: a measurement is kept for a week)",
    )


def forget_if_asked(args: argparse.Namespace) -> None:
    """Have the speed of this machine measured again, where --remeasure-machine asks for it."""
    if args.remeasure_machine:
        forget_speeds()


def add_link(parser: argparse.ArgumentParser) -> None:
    """Add the flags that stand in for a measurement of the link."""
    parser.add_argument("--bandwidth", type=positive_float, help="uplink rate, MB/s (default: measured)")
    parser.add_argument("--rtt", type=non_negative_float, help="round-trip time, ms (default: measured)")


def add_deadline(parser: argparse.ArgumentParser) -> None:
    """Add --deadline-ms."""
    parser.add_argument(
        "--deadline-ms",
        type=positive_float,
        help="time that a task may take; where no cut makes it, the fastest runs, and the task says so (default: none)",
    )


def add_no_correction(parser: argparse.ArgumentParser) -> None:
    """Add --no-correction."""
    parser.add_argument(
        "--no-correction",
        action="store_true",
        help="predict without what earlier inferences have taught, and learn nothing (default: off)",
    )


def add_on_cloud_loss(parser: argparse.ArgumentParser) -> None:
    """Add --on-cloud-loss."""
    parser.add_argument(
        "--on-cloud-loss",
        choices=("local", "retry", "fail"),
        default="local",
        help="when the cloud is lost with a task: compute it here, send it again when the cloud is back within 30 s, "
        "or fail (default: local)",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add where the weights of several models come from."""
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="weights of a model: checkpoint or safetensors; may be repeated (default: fixed-seed weights)",
    )
    parser.add_argument("--pretrained", action="store_true", help="use torchvision's pretrained weights (default: off)")


def add_objective(parser: argparse.ArgumentParser) -> None:
    """Add --objective."""
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        default="latency",
        help="smallest latency of one task, or most tasks at once: the cut with the shortest bottleneck stage "
        "(default: latency)",
    )


def add_strategy(parser: argparse.ArgumentParser) -> None:
    """Add --strategy and --max-edge-memory."""
    parser.add_argument(
        "--strategy",
        choices=("dads", "neurosurgeon", "chain-of-blocks", "edge-only", "cloud-only"),
        default="dads",
        help="where to cut: anywhere (dads), behind any layer in their order (neurosurgeon), where a single tensor "
        "crosses (chain-of-blocks), or nowhere; of a chain, the first three find the same (default: dads)",
    )
    parser.add_argument(
        "--max-edge-memory",
        type=positive_float,
        metavar="MB",
        help="leave out cuts whose edge half needs more: its parameters, and the tensors alive at once (default: none)",
    )


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


def checked(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """Return an argparse type that refuses with ``what`` when ``convert`` fails."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from exc

    return parse


def _in_range(number: float, low: float, high: float) -> float:
    if not low <= number <= high:  # false for NaN, too
        raise ValueError
    return number


worker_count = checked(lambda text: int(_in_range(int(text), 1, 64)), "a number of workers (1 to 64)")
port_number = checked(lambda text: int(_in_range(int(text), 0, 65535)), "a port (0 to 65535)")
positive_int = checked(lambda text: int(_in_range(int(text), 1, 2**31)), "a whole number of at least 1")
non_negative_int = checked(lambda text: int(_in_range(int(text), 0, 2**31)), "a whole number of at least 0")
positive_float = checked(lambda text: _in_range(float(text), 1e-9, 1e9), "a number above 0")
non_negative_float = checked(lambda text: _in_range(float(text), 0.0, 1e9), "a number of at least 0")


def typed(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that shows the one line of our own error."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return parse


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
            raise NetworkError(
                f"{' '.join(self._command[1:3])} did not start: {' '.join(self.log[-3:]) or 'no output'}"
            )
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
