"""Streams of frames: the images of a directory, a video, a camera, or the caller's own frames.

A source yields each `Frame` once. `FrameReader` reads it on a thread of its own and keeps one frame: the newest. The
main loop of the queue takes it when its task can begin; a frame that a newer one replaces before that is dropped. A
video is played at its own rate. With ``keep_all`` the thread waits until the frame is taken: a video is read as fast as
its tasks run.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from neurosurgeon.edge.pictures import image_suffixes, open_image
from neurosurgeon.edge.records import Frame
from neurosurgeon.edge.video import Video, open_video
from neurosurgeon.net.breaker import Breaker
from neurosurgeon.utils.errors import InputError, StreamError, UsageError
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtp", "srt", "udp")  # of URLs without an end
STOP_TIMEOUT_S = 10.0  # for a thread that waits for a camera
NO_PIXELS = np.empty((0, 0, 3), np.uint8)


class FrameSource:
    """A source of frames; here the caller's own: `Frame`s, or arrays (H, W, 3) uint8. A context, which closes it."""

    is_live = False  # it has no end, and waits for no task
    is_paced = False  # its frames have times, at which they are due
    rate_fps: float | None = None

    def __init__(self, frames: Iterable[Any] = ()) -> None:
        self._frames = frames

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames. May block for each. Raises: StreamError: it ends before its end. InputError."""
        for number, given in enumerate(self._frames, start=1):
            if isinstance(given, Frame):
                yield given
                continue
            pixels = np.asarray(given)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                raise InputError(f"frame {number}: expected (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
            yield Frame(number, None, pixels, now_ms())

    def stop(self) -> None:
        """End the iteration soon. Called on any thread."""

    def close(self) -> None:
        """Release the source. Called once its iteration has ended."""


def open_source(source: object) -> FrameSource:
    """Return an opened source: a directory, a video file or URL, the number of a camera, or the caller's own frames.

    Raises: InputError: it does not exist, or cannot be read. UsageError: no package for videos is installed.
    """
    if isinstance(source, int) or (isinstance(source, str) and source.isdecimal()):
        return CameraSource(f"camera {source}", int(source))
    if isinstance(source, str | Path):
        name = str(source)
        if name.split("://")[0] in LIVE_SCHEMES and "://" in name:
            return CameraSource(name)
        return DirectorySource(Path(name)) if Path(name).is_dir() else VideoSource(name)
    if isinstance(source, Iterable):
        return FrameSource(source)
    raise UsageError(f"source of frames: expected a path, URL, camera or frames, got {type(source).__name__}")


class DirectorySource(FrameSource):
    """The images of a directory, sorted by name. One that cannot be read is a frame with an error."""

    def __init__(self, directory: Path) -> None:
        try:
            files = sorted(path for path in directory.iterdir() if path.suffix.lower() in image_suffixes())
        except OSError as exc:
            raise InputError(f"directory {directory} cannot be read: {exc.strerror or exc}") from exc
        if not files:
            raise InputError(f"directory {directory} has no image: put JPEG, PNG or similar files there")
        self._files = files

    def __iter__(self) -> Iterator[Frame]:
        """Yield the images."""
        for number, path in enumerate(self._files, start=1):
            try:
                yield Frame(number, None, np.array(open_image(path)), now_ms())
            except InputError as exc:
                yield Frame(number, None, NO_PIXELS, now_ms(), str(exc))


class VideoSource(FrameSource):
    """A video with an end: a file, or a URL."""

    is_paced = True

    def __init__(self, name: str) -> None:
        self._name = _shown(name)
        if "://" not in name and not Path(name).exists():
            raise InputError(f"video {name} does not exist")
        self._video = _opened(self._name, lambda: open_video(name))
        self.rate_fps = self._video.rate_fps

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames of the video. Raises: StreamError: it ends in the middle. InputError: it has none."""
        count, time_s = 0, 0.0
        try:
            for shown_s, pixels in self._video.frames():
                count, time_s = count + 1, time_s if shown_s is None else shown_s
                yield Frame(count, shown_s, pixels, now_ms())
        except StreamError as exc:
            raise self._ended(count, time_s, str(exc)) from exc
        if not count:
            raise InputError(f"video {self._name} has no frame that can be decoded")
        if not self._video.is_whole(count, time_s):
            raise self._ended(count, time_s, "its header has more")

    def _ended(self, count: int, time_s: float, reason: str) -> Exception:
        if not count:
            return InputError(f"video {self._name} has no frame that can be decoded: {reason}")
        return StreamError(
            f"video {self._name} ends in the middle, after frame {count} ({time_s:.3f} s): {reason}; copy it again"
        )

    def close(self) -> None:
        """Close the file."""
        self._video.close()


class CameraSource(FrameSource):
    """A camera of this machine or a live URL. If it is lost, it is opened again, after pauses that grow."""

    is_live = True

    def __init__(self, name: str, number: int | None = None) -> None:
        self._name = _shown(name)
        self._open: Callable[[], Video] = lambda: open_video(name, camera=number, is_live=True)
        self._video: Video | None = _opened(self._name, self._open)
        self._stopped = threading.Event()
        self.rate_fps = self._video.rate_fps

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames of the camera, until it is stopped."""
        breaker, count, start_ms = Breaker(), 0, now_ms()
        while not self._stopped.is_set():
            if self._video is None:
                self._reopen(breaker)
                continue
            reason = "no more frames"
            try:
                for _, pixels in self._video.frames():
                    breaker.answered()
                    count += 1
                    time_ms = now_ms()
                    yield Frame(count, (time_ms - start_ms) / MS_PER_S, pixels, time_ms)
                    if self._stopped.is_set():
                        return
            except StreamError as exc:
                reason = str(exc)
            log.warning("%s is lost after frame %d: %s; it is opened again", self._name, count, reason)
            self.close()

    def _reopen(self, breaker: Breaker) -> None:
        """Try to open the camera again, after a pause."""
        breaker.lost(now_ms())
        if self._stopped.wait(breaker.pause_ms(now_ms()) / MS_PER_S):
            return
        try:
            self._video = self._open()
        except InputError as exc:
            log.debug("%s: %s", self._name, exc)
        else:
            log.warning("%s is opened again", self._name)

    def stop(self) -> None:
        """End the iteration after the next frame, or during a pause."""
        self._stopped.set()

    def close(self) -> None:
        """Release the camera."""
        if self._video:
            self._video.close()
            self._video = None


def _opened(name: str, open_it: Callable[[], Video]) -> Video:
    try:
        return open_it()
    except InputError as exc:
        raise InputError(f"input {name} {exc}: pass a video, a directory of images, or the number of a camera") from exc


def _shown(name: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"://[^/@]*@", "://", name)


class FrameReader:
    """Reads a source on a thread of its own, in a ``with`` block. An iterator: None if there is no frame at the moment.

    ``_frame``, ``_is_done`` and ``dropped`` are guarded by ``_changed``.

    Args:   wake: called on the thread when there is a frame, or the end. keep_all: wait until each frame is taken.
    """

    def __init__(self, source: FrameSource, wake: Callable[[], None], *, keep_all: bool = False) -> None:
        self._source, self._wake, self._keep_all = source, wake, keep_all
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._frame: Frame | None = None
        self._is_done = False
        self._thread = threading.Thread(target=self._read_all, name="frames", daemon=True)
        self._start_ms: float | None = None  # when the time of a paced source was 0
        self.dropped = 0  # frames that newer ones have replaced
        self.error: Exception | None = None  # why the source ended; read it at the end

    def __enter__(self) -> FrameReader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped.set()
        self._source.stop()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(STOP_TIMEOUT_S)

    def __iter__(self) -> FrameReader:
        return self

    def __next__(self) -> Frame | None:
        """Return the newest frame; None: there is none yet. Does not block."""
        with self._changed:
            frame, self._frame = self._frame, None
            if frame is None and self._is_done:
                raise StopIteration
            self._changed.notify_all()
            return frame

    def _read_all(self) -> None:
        try:
            for frame in self._source:
                self._put(frame if self._keep_all or not self._source.is_paced else self._when_due(frame))
                if self._stopped.is_set():
                    break
        except Exception as exc:  # raised by the caller of the stream
            self.error = exc
        with self._changed:
            self._is_done = True
        self._wake()

    def _put(self, frame: Frame) -> None:
        with self._changed:
            while self._keep_all and self._frame and not self._stopped.is_set():
                self._changed.wait()
            if self._stopped.is_set():
                return
            self.dropped += self._frame is not None
            self._frame = frame
        self._wake()

    def _when_due(self, frame: Frame) -> Frame:
        """Return a frame once it is due by its time in the video."""
        if frame.time_s is None:
            return frame
        if self._start_ms is None:
            self._start_ms = now_ms() - frame.time_s * MS_PER_S
        self._stopped.wait(max(0.0, self._start_ms / MS_PER_S + frame.time_s - now_ms() / MS_PER_S))
        return replace(frame, read_ms=now_ms())
