"""Videos and cameras, decoded and encoded by PyAV or by OpenCV: whichever is installed, PyAV first.

Neither is a requirement of the project. Pixels are (H, W, 3) RGB uint8, turned as the camera was.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.utils.errors import InputError, StreamError, UsageError
from neurosurgeon.utils.units import MS_PER_S

Pixels = NDArray[np.uint8]

TIMEOUT_S = 5.0  # without data of a camera
CAMERA_FORMATS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}  # of PyAV, by platform
TIME_BASE = Fraction(1, int(MS_PER_S))  # of a written video


class Video(Protocol):
    """An opened video or camera. Used on one thread at a time."""

    @property
    def rate_fps(self) -> float | None:
        """Frames per second; None: unknown."""

    def frames(self) -> Iterator[tuple[float | None, Pixels]]:
        """Yield the time of each frame, s, and its pixels. Raises: StreamError: the rest cannot be decoded."""

    def is_whole(self, count: int, last_s: float) -> bool:
        """Return whether a file of ``count`` frames, the last one at ``last_s``, has all that its header promises."""

    def close(self) -> None:
        """Release the file or the device."""


def open_video(name: str, *, camera: int | None = None, is_live: bool = False) -> Video:
    """Return an opened file, URL, or camera of this machine. May block for `TIMEOUT_S`.

    Args:   name: of the file or URL, and for errors. camera: its number; None: ``name`` is opened.
    Raises: InputError: it cannot be opened, or has no pictures. UsageError: no package is installed.
    """
    package, kind = _package({"av": _AvVideo, "cv2": _CvVideo})
    video: Video = kind(package, name, camera, is_live)
    return video


class VideoWriter:
    """Writes frames into a video file, each at its time. Use it in a ``with`` block, at whose end the file is whole.

    Raises: UsageError: no package is installed, or the file cannot be written.
    """

    def __init__(self, path: Path, rate_fps: float) -> None:
        self._path, self._rate_fps = path, rate_fps
        self._package, self._kind = _package({"av": _AvEncoder, "cv2": _CvEncoder})
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: its directory does not exist")
        self._encoder: Any = None
        self._size: tuple[int, ...] = ()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._encoder:
            self._encoder.close()

    def write(self, pixels: object, time_s: float) -> None:
        """Write a frame (H, W, 3) uint8, RGB. Raises: UsageError: it is no such array, or of another size."""
        frame = np.asarray(pixels)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or min(frame.shape) < 2:
            raise UsageError(f"a frame of {self._path}: expected (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        self._size = self._size or frame.shape
        if frame.shape != self._size:
            raise UsageError(f"a frame of {self._path}: expected {self._size} as the first one, got {frame.shape}")
        even = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])  # as codecs require
        try:
            self._encoder = self._encoder or self._kind(self._package, self._path, self._rate_fps, even.shape)
            self._encoder.write(even, time_s)
        except (OSError, ValueError) as exc:
            raise UsageError(f"cannot write {self._path}: {_reason(exc)}") from exc


def _package(choices: dict[str, Callable[..., Any]]) -> tuple[ModuleType, Callable[..., Any]]:
    """Return the first package that is installed, and its choice."""
    for name, chosen in choices.items():
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name), chosen
    raise UsageError("videos and cameras need one more package: pip install av (or opencv-python-headless)")


def _reason(exc: BaseException) -> str:
    """Return the reason of an error without its file, which may be a URL with a password."""
    return str(getattr(exc, "strerror", None) or exc).strip().split("\n")[0]


# ---------------------------------------------------------------- PyAV


class _AvVideo:
    def __init__(self, av: ModuleType, name: str, camera: int | None, is_live: bool) -> None:
        self._errors, self._damaged = av.error.FFmpegError, av.error.InvalidDataError
        self._is_live = is_live
        options: dict[str, Any] = {"timeout": (TIMEOUT_S, TIMEOUT_S)} if is_live or "://" in name else {}
        target = name
        if camera is not None:
            if sys.platform not in CAMERA_FORMATS:
                raise InputError(f"{name}: on {sys.platform} cameras need: pip install opencv-python-headless (not av)")
            options["format"], pattern = CAMERA_FORMATS[sys.platform]
            target = pattern.format(camera)
        elif name.startswith("rtsp"):
            options["options"] = {"rtsp_transport": "tcp"}
        try:
            self._container = av.open(target, **options)
        except (OSError, ValueError, self._errors) as exc:
            raise InputError(f"cannot be opened as a video: {_reason(exc)}") from exc
        if not self._container.streams.video:
            self._container.close()
            raise InputError("has no pictures")
        self._stream = self._container.streams.video[0]
        if not is_live:
            self._stream.thread_type = "AUTO"  # by frames, too: later, but faster

    @property
    def rate_fps(self) -> float | None:
        rate = self._stream.average_rate
        return float(rate) if rate else None

    def frames(self) -> Iterator[tuple[float | None, Pixels]]:
        try:
            for packet in self._container.demux(self._stream):
                for frame in self._decoded(packet):
                    pixels = frame.to_ndarray(format="rgb24")
                    turns = round(getattr(frame, "rotation", 0) / 90) % 4
                    yield frame.time, np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
        except self._errors as exc:
            raise StreamError(_reason(exc)) from exc

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            return list(packet.decode())
        except self._damaged:
            if not self._is_live:
                raise
            return []  # of a lost packet; the next ones are good

    def is_whole(self, count: int, last_s: float) -> bool:
        stream = self._stream
        if stream.duration is not None and stream.time_base is not None:
            end_s = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        elif self._container.duration is not None and len(self._container.streams) == 1:
            end_s = ((self._container.start_time or 0) + self._container.duration) / 1e6
        else:
            return True  # the header has no length
        frame_s = 1 / (self.rate_fps or 1.0)
        has_all = stream.frames and count >= stream.frames
        return bool(has_all) or last_s + 2.5 * frame_s > end_s

    def close(self) -> None:
        self._container.close()


class _AvEncoder:
    def __init__(self, av: ModuleType, path: Path, rate_fps: float, shape: tuple[int, ...]) -> None:
        self._av = av
        self._container = av.open(str(path), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(codec, rate=Fraction(rate_fps).limit_denominator(1001))
        self._stream.height, self._stream.width, self._stream.pix_fmt = *shape[:2], "yuv420p"
        self._stream.codec_context.time_base = TIME_BASE
        self._last = -1

    def write(self, pixels: Pixels, time_s: float) -> None:
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = max(self._last + 1, round(time_s / TIME_BASE))
        frame.pts, frame.time_base = self._last, TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


# ---------------------------------------------------------------- OpenCV


class _CvVideo:
    def __init__(self, cv2: ModuleType, name: str, camera: int | None, is_live: bool) -> None:
        self._cv2 = cv2
        self._capture = cv2.VideoCapture(name if camera is None else camera)
        if not self._capture.isOpened():
            raise InputError("cannot be opened as a video")

    @property
    def rate_fps(self) -> float | None:
        return self._capture.get(self._cv2.CAP_PROP_FPS) or None

    def frames(self) -> Iterator[tuple[float | None, Pixels]]:
        while True:
            is_read, pixels = self._capture.read()
            if not is_read:
                return
            time_s = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / MS_PER_S
            yield time_s, self._cv2.cvtColor(pixels, self._cv2.COLOR_BGR2RGB)

    def is_whole(self, count: int, last_s: float) -> bool:
        return bool(count >= self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT) - 1)  # for some files an estimate

    def close(self) -> None:
        self._capture.release()


class _CvEncoder:
    """Has a constant rate: a frame is shown again until the next one."""

    def __init__(self, cv2: ModuleType, path: Path, rate_fps: float, shape: tuple[int, ...]) -> None:
        self._cv2, self._rate_fps = cv2, rate_fps
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate_fps, (shape[1], shape[0]))
        if not self._writer.isOpened():
            raise OSError("OpenCV cannot open it")
        self._count = 0
        self._last: Any = None

    def write(self, pixels: Pixels, time_s: float) -> None:
        while self._last is not None and self._count < round(time_s * self._rate_fps):
            self._put(self._last)
        self._last = self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR)
        self._put(self._last)

    def _put(self, pixels: Any) -> None:
        self._writer.write(pixels)
        self._count += 1

    def close(self) -> None:
        self._writer.release()
