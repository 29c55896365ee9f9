"""Streams of frames: the newest frame first, or all of them; cameras that are lost; directories."""

from __future__ import annotations

import builtins
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neurosurgeon.edge import frames, video
from neurosurgeon.edge.frames import CameraSource, FrameReader, FrameSource, VideoSource, open_source
from neurosurgeon.edge.records import Frame
from neurosurgeon.edge.video import VideoWriter, open_video
from neurosurgeon.net import breaker
from neurosurgeon.utils.errors import InputError, StreamError, UsageError

pytestmark = pytest.mark.usefixtures("no_thread_left")
PIXELS = np.zeros((4, 6, 3), np.uint8)
TIMEOUT_S = 30.0  # of a test that would hang


def frame(number: int, time_s: float | None = None) -> Frame:
    return Frame(number, time_s, PIXELS, 0.0)


class Wakes:
    """Counts the wakes of a reader, which come after each frame and at the end."""

    def __init__(self) -> None:
        self._wakes: SimpleQueue[None] = SimpleQueue()

    def __call__(self) -> None:
        self._wakes.put(None)

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            self._wakes.get(timeout=TIMEOUT_S)


def all_frames(reader: FrameReader, wakes: Wakes) -> list[Frame]:
    """Return the frames of a reader, taken as they come."""
    taken = []
    for each in reader:
        if each:
            taken.append(each)
        else:
            wakes.wait()
    return taken


# ---------------------------------------------------------------- the newest frame, or all


def test_the_newest_frame_is_taken_and_older_ones_are_dropped() -> None:
    wakes = Wakes()
    with FrameReader(FrameSource([frame(number) for number in (1, 2, 3)]), wakes) as reader:
        wakes.wait(4)  # three frames and the end
        assert [each and each.number for each in reader] == [3]
    assert (reader.dropped, reader.error) == (2, None)


def test_without_a_frame_the_reader_returns_none() -> None:
    gate, wakes = threading.Event(), Wakes()

    def gated() -> Iterator[Frame]:
        gate.wait(TIMEOUT_S)
        yield frame(1)

    with FrameReader(FrameSource(gated()), wakes) as reader:
        assert next(reader) is None
        gate.set()
        wakes.wait(2)
        assert [each and each.number for each in reader] == [1]


def test_keep_all_drops_no_frame() -> None:
    wakes = Wakes()
    with FrameReader(FrameSource(map(frame, range(1, 51))), wakes, keep_all=True) as reader:
        assert [each.number for each in all_frames(reader, wakes)] == list(range(1, 51))
    assert reader.dropped == 0


def test_a_reader_that_is_left_early_ends_its_thread() -> None:
    wakes = Wakes()
    with FrameReader(FrameSource(map(frame, range(1, 51))), wakes, keep_all=True) as reader:
        wakes.wait()
    assert reader.dropped == 0


def test_a_frame_of_a_video_is_read_when_it_is_due() -> None:
    class Paced(FrameSource):
        is_paced = True

    wakes = Wakes()
    with FrameReader(Paced([frame(1, 5.0), frame(2, 5.001)]), wakes) as reader:
        wakes.wait(3)
        (last,) = reader
    assert last and last.number == 2
    assert last.read_ms >= reader._start_ms + 5001.0 - 1e-3  # type: ignore[operator]


def test_an_error_of_the_source_comes_after_its_frames() -> None:
    def broken() -> Iterator[Frame]:
        yield frame(1)
        raise StreamError("it ends")

    wakes = Wakes()
    with FrameReader(FrameSource(broken()), wakes, keep_all=True) as reader:
        assert [each.number for each in all_frames(reader, wakes)] == [1]
    assert isinstance(reader.error, StreamError)


@pytest.mark.parametrize("given", [PIXELS.astype(np.float32), PIXELS[..., 0], PIXELS[:0], "text"])
def test_an_array_that_is_no_frame_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"frame 2: expected \(H, W, 3\) uint8"):
        list(FrameSource([PIXELS, given]))


# ---------------------------------------------------------------- sources


def test_a_directory_yields_its_images_and_the_error_of_a_bad_one(tmp_path: Path) -> None:
    Image.new("L", (6, 4), 7).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    (tmp_path / "c.txt").write_text("no image")
    good, bad = open_source(tmp_path)
    assert (good.number, good.pixels.shape, good.pixels.max(), good.error) == (1, (4, 6, 3), 7, None)
    assert bad.number == 2
    assert "b.jpg cannot be read as an image" in str(bad.error)


def test_a_directory_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no image"):
        open_source(str(tmp_path))


def test_a_source_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="got NoneType"):
        open_source(None)
    with pytest.raises(InputError, match=r"nowhere\.mp4 does not exist"):
        open_source("nowhere.mp4")


def test_without_a_package_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def hidden(name: str, *args: Any) -> Any:
        if name in ("av", "cv2"):
            raise ModuleNotFoundError(name=name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", hidden)
    (tmp_path / "video.mp4").touch()
    for attempt in (lambda: open_source(tmp_path / "video.mp4"), lambda: VideoWriter(tmp_path / "out.mp4", 25.0)):
        with pytest.raises(UsageError, match=r"pip install av \(or opencv-python-headless\)"):
            attempt()


class FakeVideo:
    """A video of some frames, after which it ends, or cannot be decoded."""

    rate_fps = 25.0

    def __init__(self, count: int, error: str | None = None, *, is_whole: bool = True) -> None:
        self.count, self.error, self.whole = count, error, is_whole
        self.is_closed = False

    def frames(self) -> Iterator[tuple[float | None, Any]]:
        for number in range(self.count):
            yield number / 25, PIXELS
        if self.error:
            raise StreamError(self.error)

    def is_whole(self, count: int, last_s: float) -> bool:
        return self.whole

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeVideo]]:
    """Let `open_video` return these videos, or raise these errors, one after the other; returns the videos."""

    def given(*videos: FakeVideo | Exception) -> list[FakeVideo]:
        waiting = list(videos)

        def opened(name: str, **_: Any) -> FakeVideo:
            found = waiting.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(frames, "open_video", opened)
        return [each for each in videos if isinstance(each, FakeVideo)]

    return given


@pytest.mark.parametrize(("error", "is_whole"), [("damaged", True), (None, False)])
def test_a_video_that_ends_in_the_middle_names_its_last_frame(
    opens: Callable[..., Any], tmp_path: Path, error: str | None, is_whole: bool
) -> None:
    (tmp_path / "a.mp4").touch()
    opens(FakeVideo(3, error, is_whole=is_whole))
    source, seen = VideoSource(str(tmp_path / "a.mp4")), []
    with pytest.raises(StreamError, match=r"a\.mp4 ends in the middle, after frame 3 \(0\.080 s\)") as raised:
        seen.extend(each.number for each in source)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("error", ["damaged", None])
def test_a_video_without_frames_is_wrong_input(opens: Callable[..., Any], tmp_path: Path, error: str | None) -> None:
    (tmp_path / "a.mp4").touch()
    opens(FakeVideo(0, error))
    with pytest.raises(InputError, match="has no frame that can be decoded"):
        list(VideoSource(str(tmp_path / "a.mp4")))


def test_a_camera_that_is_lost_is_opened_again(
    opens: Callable[..., list[FakeVideo]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_MS", 0.0)
    first, second = opens(FakeVideo(2, "unplugged"), InputError("busy"), InputError("busy"), FakeVideo(9))
    source = CameraSource("camera 0", 0)
    numbers = []
    with caplog.at_level(logging.WARNING):
        for each in source:
            numbers.append(each.number)
            if each.number == 5:
                source.stop()
    assert numbers == [1, 2, 3, 4, 5]
    assert first.is_closed
    assert not second.is_closed
    assert [record.message for record in caplog.records] == [
        "camera 0 is lost after frame 2: unplugged; it is opened again",
        "camera 0 is opened again",
    ]
    source.close()
    assert second.is_closed


def test_a_camera_that_stays_away_does_not_block_the_end(opens: Callable[..., Any]) -> None:
    opens(FakeVideo(1), *[InputError("gone")] * 1000)
    wakes = Wakes()
    with FrameReader(CameraSource("rtsp://host/1"), wakes) as reader:
        wakes.wait()
        assert next(reader)


def test_the_password_of_a_url_is_not_shown(opens: Callable[..., Any]) -> None:
    opens(InputError("cannot be opened as a video"))
    with pytest.raises(InputError, match="input rtsp://host/1 cannot be opened") as raised:
        open_source("rtsp://me:secret@host/1")
    assert "secret" not in str(raised.value)


# ---------------------------------------------------------------- real videos


@pytest.fixture(params=["av", "cv2"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the packages, alone."""
    name: str = request.param
    pytest.importorskip(name, reason=f"needs the package of {name}")
    chosen = video._package
    monkeypatch.setattr(video, "_package", lambda choices: chosen({name: choices[name]}))
    return name


def written(path: Path, count: int = 40, size: tuple[int, int] = (48, 64)) -> Path:
    """Return a video of 20 frames/s, whose frames turn from black to red."""
    with VideoWriter(path, 20.0) as writer:
        for number in range(count):
            pixels = np.zeros((*size, 3), np.uint8)
            pixels[..., 0] = 6 * number
            writer.write(pixels, number / 20)
    return path


def test_a_written_video_is_read_again(package: str, tmp_path: Path) -> None:
    with open_source(written(tmp_path / "a.mp4", size=(49, 65))) as source:
        read = list(source)
    assert source.rate_fps == pytest.approx(20.0)
    assert [each.number for each in read] == list(range(1, 41))
    assert [each.time_s for each in read] == pytest.approx([number / 20 for number in range(40)], abs=0.002)
    assert {each.pixels.shape for each in read} == {(48, 64, 3)}
    reds, blues = ([int(each.pixels[..., channel].mean()) for each in read] for channel in (0, 2))
    assert reds == pytest.approx([6 * number for number in range(40)], abs=12)
    assert max(blues) < 12


def test_a_video_with_pauses_keeps_its_times(package: str, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 20.0) as writer:
        for time_s in (0.0, 0.05, 1.0):
            writer.write(np.zeros((48, 64, 3), np.uint8), time_s)
    with open_source(tmp_path / "a.mp4") as source:
        assert [each.time_s for each in source][-1] == pytest.approx(1.0, abs=0.01)


def test_a_truncated_video_ends_in_the_middle(package: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    seen = []
    with open_source(tmp_path / "cut.mkv") as source, pytest.raises(StreamError, match="ends in the middle") as raised:
        seen.extend(each.number for each in source)
    assert 0 < len(seen) < 40 or "after frame" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"no video", bytes(1000)])
def test_a_file_that_is_no_video_is_refused(package: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mp4 cannot be opened as a video"):
        open_source(tmp_path / "a.mp4")


def test_a_camera_that_does_not_exist_is_refused(package: str) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_video("camera 77", camera=77, is_live=True)


@pytest.mark.parametrize(
    ("second", "match"),
    [(np.zeros((8, 8, 3)), "expected .* got .* float64"), (np.zeros((8, 10, 3), np.uint8), "as the first one")],
)
def test_a_frame_that_does_not_fit_is_not_written(package: str, tmp_path: Path, second: Any, match: str) -> None:
    with VideoWriter(tmp_path / "a.mp4", 20.0) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8), 0.0)
        with pytest.raises(UsageError, match=match):
            writer.write(second, 0.05)


def test_a_video_that_cannot_be_written_is_named(package: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its directory does not exist"):
        VideoWriter(tmp_path / "none" / "a.mp4", 20.0)
    with VideoWriter(tmp_path / "a.nothing", 20.0) as writer, pytest.raises(UsageError, match="cannot write"):
        writer.write(np.zeros((16, 16, 3), np.uint8), 0.0)
