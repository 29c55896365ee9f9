"""The body of `tasks_edge_api.py --input`: a task for each frame of a video, a camera or a directory."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neurosurgeon.cli.parser import Parser, access_of_edge
from neurosurgeon.cli.process import EXIT_INTERRUPTED, deferred_interrupt
from neurosurgeon.cli.relay import shaped
from neurosurgeon.edge.frames import open_source
from neurosurgeon.edge.outcome import tree_document
from neurosurgeon.edge.records import QueueEvent, StreamStarted, TaskDone
from neurosurgeon.edge.run import CloudAddress, LinkChoice, run_stream
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.video import VideoWriter
from neurosurgeon.engine.base import find_engine
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.own_models import DRAW
from neurosurgeon.reports.stream_report import StreamReport
from neurosurgeon.reports.text import print_json
from neurosurgeon.utils.errors import NeurosurgeonError, UsageError

DEFAULT_RATE_FPS = 25.0  # of a written video, if the source has no rate


def add_stream(parser: Parser, source: argparse._MutuallyExclusiveGroup) -> None:
    """Add --input SOURCE to the sources of tasks, and the flags that go with it."""
    source.add_argument(
        "--input",
        metavar="SOURCE",
        help="stream of frames, each of which is a task: a directory of images, a video, the number of a camera, or a "
        "URL (rtsp://...)",
    )
    parser.add_switch(
        "--keep-all", "with --input: run every frame of a file or directory, rather than the newest when there is time"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.mp4",
        help="with --input: write a video of the frames, as draw(frame, output) of the model file returns them",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags of a stream. Raises: UsageError: one does not go with the others."""
    if args.input is None:
        if args.keep_all or args.output:
            raise UsageError("--keep-all and --output need a stream of frames: --input SOURCE")
        return
    if len(args.type) != 1:
        raise UsageError(f"--input: expected one model, got {len(args.type)}: -t MODEL")
    if args.excel or args.plot or args.schedule != "fifo":
        raise UsageError("--input: the results of a stream are not kept: leave out --excel, --plot and --schedule")


def run(args: argparse.Namespace, catalogue: Catalogue, settings: QueueSettings) -> int:
    """Run the stream of the command line; return the exit code. Raises: NeurosurgeonError."""
    out = sys.stderr if args.json else sys.stdout
    name = catalogue.canonical_name(args.type[0])
    access = replace(access_of_edge(args), cloud_name=args.ip)
    interrupted = threading.Event()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(args.input))
        drawing = stack.enter_context(Drawing.of(args.output, catalogue, name, source.rate_fps))
        network = stack.enter_context(shaped(args.ip, (args.port, args.monitor_port), args.shape, args.trace))

        def start() -> None:
            network.begin()
            stack.enter_context(deferred_interrupt(interrupted))

        report = stack.enter_context(StreamReport(out, shows_frames=not args.json, on_start=start))
        documents = Documents() if args.json else None

        def observe(event: QueueEvent) -> None:
            report(event)
            if documents:
                documents(event)
            if isinstance(event, TaskDone):
                drawing.add(event)

        outcome = run_stream(
            name,
            source,
            settings,
            lambda: find_engine()(catalogue, args.device),
            CloudAddress(network.host, args.port, args.monitor_port, access),
            LinkChoice(args.bandwidth, args.rtt, interval_s=args.monitor_interval),
            observe,
            lambda: interrupted.is_set() or drawing.error is not None,
            keep_all=args.keep_all,
        )
    report.summary(outcome.answered, outcome.failed, outcome.dropped, outcome.elapsed_ms)
    if error := drawing.error or outcome.error:
        raise error
    if interrupted.is_set():
        return EXIT_INTERRUPTED
    return NeurosurgeonError.exit_code if outcome.failed else 0


class Documents:
    """Prints a JSON object for each frame on stdout. An observer of a stream."""

    def __init__(self) -> None:
        self._labels: Sequence[str] | None = None

    def __call__(self, event: QueueEvent) -> None:
        """Print the object of a result."""
        if isinstance(event, StreamStarted):
            self._labels = event.network.labels
        elif isinstance(event, TaskDone):
            print_json(frame_document(event, self._labels))
            sys.stdout.flush()


def frame_document(done: TaskDone, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return the JSON object of a frame. Args: labels: of the network's classes; None: unknown."""
    result, frame = done.result, done.result.task.frame
    document = {"frame": frame and frame.number, "time_s": frame and frame.time_s, "age_ms": result.age_ms}
    if result.error is not None:
        return {**document, "error": result.error}
    return {**document, "where": result.where, "output": tree_document(done.output, labels)}


class Drawing:
    """Draws results into their frames, in the order of the frames, and writes these. Does nothing without a writer.

    Used on the reporter's thread. ``error`` ends the stream.
    """

    def __init__(self, writer: VideoWriter | None, draw: Callable[..., Any], rate_fps: float) -> None:
        self._writer, self._draw, self._rate_fps = writer, draw, rate_fps
        self._waiting: dict[int, TaskDone] = {}  # by task: results come in any order
        self._next = 1
        self.error: UsageError | None = None

    @staticmethod
    def of(path: Path | None, catalogue: Catalogue, name: str, rate_fps: float | None) -> Drawing:
        """Return the drawing of a network's results into a video file; None: of none.

        Raises: UsageError: the model file has no function for that.
        """
        draw = catalogue.own.helper(name, DRAW)
        if path and not draw:
            raise UsageError(f"--output: the model file of {name} has no function draw(frame, output): add one")
        rate_fps = rate_fps or DEFAULT_RATE_FPS
        writer = VideoWriter(path, rate_fps) if path else None
        return Drawing(writer, draw or (lambda frame, output: frame), rate_fps)

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.__exit__(*error)

    def add(self, done: TaskDone) -> None:
        """Add a result, and write the frames that are next."""
        if self._writer is None:
            return
        self._waiting[done.result.task.id] = done
        while self._next in self._waiting:
            self._write(self._writer, self._waiting.pop(self._next))
            self._next += 1

    def _write(self, writer: VideoWriter, done: TaskDone) -> None:
        frame = done.result.task.frame
        if frame is None or frame.error or self.error:
            return
        time_s = (frame.number - 1) / self._rate_fps if frame.time_s is None else frame.time_s
        try:
            pixels = frame.pixels
            writer.write(self._draw(pixels.copy(), done.output) if done.result.is_finished else pixels, time_s)
        except UsageError as exc:
            self.error = exc
