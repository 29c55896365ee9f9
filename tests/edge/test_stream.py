"""A task for each frame: its inputs, its age, its result; and a stream that has no end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neurosurgeon.edge.frames import FrameReader, FrameSource
from neurosurgeon.edge.inputs import inputs_of_frames, network_input
from neurosurgeon.edge.queue import QueueRun
from neurosurgeon.edge.records import Frame, QueueEvent, TaskDone
from neurosurgeon.edge.run import results_of
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.utils.errors import ConnectError, InputError
from tests.edge.test_cuts import INPUTS, LINK, MODEL, queue_model
from tests.edge.test_queue import FailingStream

pytestmark = pytest.mark.usefixtures("no_thread_left")
PIXELS = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)


class Observer:
    """Keeps the results of a stream."""

    def __init__(self) -> None:
        self.done: list[TaskDone] = []

    def __call__(self, event: QueueEvent) -> None:
        if isinstance(event, TaskDone):
            self.done.append(event)


def run_frames(source: Any, observe: Any, *, keep_all: bool = True, stop: Any = lambda: False) -> QueueRun:
    """Run a stream without a cloud, on the edge."""
    settings = QueueSettings({}, learns=False, in_flight=2)
    stream: Any = FailingStream(*(ConnectError("gone") for _ in range(3)))
    watch = LinkWatch("nowhere", 1, LINK)
    run = QueueRun(settings, {MODEL: queue_model()}, stream, watch, observe, keeps_results=False)
    with FrameReader(FrameSource(source), run.wake, keep_all=keep_all) as reader:
        run.run_all(inputs_of_frames(reader, MODEL, INPUTS), itertools.repeat(MODEL), stop)
    return run


def test_every_frame_has_one_result_with_its_age() -> None:
    observer = Observer()
    run = run_frames([PIXELS] * 9, observer)
    frames = [done.result.task.frame for done in observer.done]
    assert sorted(frame.number for frame in frames if frame) == list(range(1, 10))
    assert all((done.result.age_ms or 0) >= done.result.elapsed_ms > 0 for done in observer.done)
    assert len({done.result.output_digest for done in observer.done}) == 1
    assert (run.results.count, run.results.failed_count, run.results.reported) == (9, 0, [])


def test_the_output_of_a_frame_is_that_of_an_image_file(tmp_path: Any) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (of_file,), (of_frame,) = INPUTS.read(tmp_path / "a.png"), INPUTS.of_frame(Frame(1, None, PIXELS, 0.0))
    np.testing.assert_array_equal(of_file, of_frame)


def test_a_frame_that_cannot_be_read_fails_alone() -> None:
    observer = Observer()
    bad = Frame(2, None, np.empty((0, 0, 3), np.uint8), 0.0, "b.jpg cannot be read")
    run = run_frames([Frame(1, None, PIXELS, 0.0), bad, Frame(3, None, PIXELS, 0.0)], observer)
    errors = {done.result.task.id: done.result.error for done in observer.done}
    assert errors == {1: None, 2: "b.jpg cannot be read", 3: None}
    assert (run.results.count, run.results.failed_count) == (3, 1)


def test_an_endless_stream_ends_when_it_shall_stop() -> None:
    observer = Observer()
    run = run_frames(itertools.repeat(PIXELS), observer, keep_all=False, stop=lambda: len(observer.done) >= 4)
    assert run.results.count >= 4


def test_a_stream_without_frames_stops() -> None:
    stopped, asked = threading.Event(), []

    def no_frames() -> Iterator[Any]:
        stopped.wait()
        yield from ()

    def stop() -> bool:
        asked.append(1)
        if len(asked) > 2:
            stopped.set()
        return stopped.is_set()

    run = run_frames(no_frames(), Observer(), stop=stop)
    assert run.results.count == 0


def test_frames_are_not_collected_while_the_observer_is_slow() -> None:
    is_stuck, release = threading.Event(), threading.Event()

    def observe(event: QueueEvent) -> None:
        if isinstance(event, TaskDone):
            is_stuck.set()
            release.wait()

    def frames() -> Iterator[Any]:
        yield PIXELS
        is_stuck.wait()
        yield from [PIXELS] * 200
        release.set()

    run = run_frames(frames(), observe, keep_all=False)
    assert run.results.count <= 10  # the one that is stuck, some that wait, and those in flight


def test_a_loop_that_is_left_early_ends_the_stream() -> None:
    def run(observe: Any, is_left: Any) -> int:
        return run_frames(itertools.repeat(PIXELS), observe, stop=is_left).results.count

    results = results_of(run, waiting=1)
    assert next(results).result.is_finished
    results.close()


def test_the_loop_returns_what_the_queue_returns() -> None:
    def run(observe: Any, is_left: Any) -> int:
        return run_frames([PIXELS] * 5, observe, stop=is_left).results.count

    results, seen = results_of(run, waiting=1), 0
    with pytest.raises(StopIteration) as end:
        while True:
            next(results)
            seen += 1
    assert (seen, end.value.value) == (5, 5)


def test_an_image_of_pillow_is_an_input_of_networks_that_take_images() -> None:
    spec = INPUTS.graph.inputs[0]
    assert network_input(Image.fromarray(PIXELS), spec).shape == spec.shape
    with pytest.raises(InputError, match="no image"):
        network_input(Image.fromarray(PIXELS), replace(spec, shape=(1, 5)))
