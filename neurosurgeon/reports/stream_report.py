"""The printed output of a stream: a line for each frame, a progress bar, and a last line with rate and age."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from neurosurgeon.edge.records import Progress, QueueEvent, StreamStarted, TaskDone, TaskResult
from neurosurgeon.reports.text import ProgressBar
from neurosurgeon.utils.logs import printable
from neurosurgeon.utils.units import MS_PER_S

KEPT_AGES = 100_000  # of the last frames: a stream has no end
SHOWN_AGES = 100  # beside the bar


def frame_line(result: TaskResult) -> str:
    """Return the line of a frame."""
    frame, age_ms = result.task.frame, result.age_ms or 0.0
    number = frame.number if frame else result.task.id
    time = "" if frame is None or frame.time_s is None else f" ({frame.time_s:.3f} s)"
    if result.error is not None:
        return f"frame {number}{time} failed : {printable(result.error)}"
    top = "" if result.top1 is None else f"top class {result.top1} , "
    return f"frame {number}{time} : {top}answered by {result.where} , age {age_ms:.1f} ms"


class StreamReport:
    """An observer of a stream: its lines, and a bar on a terminal. A context: the bar ends with it.

    Args:   stream: of the lines. shows_frames: write a line for each frame. on_start: called before the first frame.
    """

    def __init__(
        self, stream: TextIO, *, shows_frames: bool = True, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self._stream, self._shows_frames, self._on_start = stream, shows_frames, on_start
        self._exit = ExitStack()
        self._models = ProgressBar("model")
        self._bar: tqdm[Any] | None = None
        self._ages_ms: deque[float] = deque(maxlen=KEPT_AGES)
        self._where: Counter[str] = Counter()

    def __enter__(self) -> StreamReport:
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def __call__(self, event: QueueEvent) -> None:
        """Show an event."""
        match event:
            case Progress():
                self._models.show(event)
            case StreamStarted():
                self._bar = self._exit.enter_context(
                    tqdm(desc="stream", unit="frame", dynamic_ncols=True, disable=None, file=sys.stderr)
                )
                if not self._bar.disable:
                    self._exit.enter_context(logging_redirect_tqdm())
                self._on_start()
            case TaskDone(result):
                self._frame_done(result)

    def _frame_done(self, result: TaskResult) -> None:
        if result.is_finished:
            self._ages_ms.append(result.age_ms or 0.0)
            self._where[result.where] += 1
        with tqdm.get_lock():
            if self._shows_frames:
                with tqdm.external_write_mode(file=self._stream):
                    print(frame_line(result), file=self._stream, flush=True)
            if self._bar is not None and not self._bar.disable:
                dropped = result.task.frame.number - result.task.id if result.task.frame else 0  # until it was taken
                recent = list(islice(reversed(self._ages_ms), SHOWN_AGES))
                self._bar.set_postfix_str(f"{_ages(recent)}, dropped {dropped}", refresh=False)
                self._bar.update()

    def summary(self, answered: int, failed: int, dropped: int, elapsed_ms: float) -> None:
        """Print the last line."""
        rate = f"{MS_PER_S * answered / elapsed_ms:.2f} frames/s" if elapsed_ms else "-"
        places = "/".join(str(self._where[place]) for place in ("edge", "split", "cloud"))
        print(
            f"stream : {answered} frames , {failed} failed , dropped {dropped} , {rate} , {_ages(self._ages_ms)} , "
            f"edge/split/cloud {places}",
            file=self._stream,
            flush=True,
        )


def _ages(ages_ms: Sequence[float]) -> str:
    if not ages_ms:
        return "age -"
    p50, p95 = np.percentile(ages_ms, (50, 95))
    return f"age p50 {p50:.1f} ms p95 {p95:.1f} ms"
