"""`tasks_edge_api.py --input`: its flags, the object of a frame, and the drawn video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurosurgeon.cli.streams import Drawing, frame_document
from neurosurgeon.cli.tasks_edge import main
from neurosurgeon.edge.records import Frame, QueuedTask, TaskDone, TaskResult
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.own_models import DRAW
from neurosurgeon.utils.errors import UsageError

PIXELS = np.zeros((4, 6, 3), np.uint8)


def done(number: int, *, task: int | None = None, error: str | None = None, **fields: Any) -> TaskDone:
    frame = Frame(number, number / 25, PIXELS, 0.0)
    result = TaskResult(QueuedTask(task or number, "le_net", frame=frame), error=error, age_ms=12.5, **fields)
    return TaskDone(result, None if error else np.array([[0.0, 2.0, 1.0]], np.float32))


class Written:
    """Takes the frames that are written."""

    def __init__(self) -> None:
        self.frames: list[tuple[Any, float]] = []

    def write(self, pixels: Any, time_s: float) -> None:
        self.frames.append((pixels, time_s))


def test_the_object_of_a_frame_has_its_classes() -> None:
    document = frame_document(done(3, where="cloud"), ["a", "b", "c"])
    output = document.pop("output")
    assert document == {"frame": 3, "time_s": 0.12, "age_ms": 12.5, "where": "cloud"}
    assert [guess["label"] for guess in output["top5"]] == ["b", "c", "a"]
    assert frame_document(done(4, error="no image"), None) == {
        "frame": 4,
        "time_s": 0.16,
        "age_ms": 12.5,
        "error": "no image",
    }


def test_frames_are_written_in_their_order_whatever_the_order_of_results() -> None:
    writer: Any = Written()
    drawing = Drawing(writer, lambda frame, output: frame + int(output.argmax()), 25.0)
    for each in (done(7, task=3), done(2, task=1), done(4, task=2, error="it broke")):
        drawing.add(each)
    assert [time_s for _, time_s in writer.frames] == [0.08, 0.16, 0.28]
    assert [int(pixels.max()) for pixels, _ in writer.frames] == [1, 0, 1]  # the failed one as it is
    assert int(PIXELS.max()) == 0


def test_an_error_of_the_users_function_ends_the_drawing() -> None:
    def draw(frame: Any, output: Any) -> Any:
        raise UsageError("model file a.py, line 3: KeyError")

    writer: Any = Written()
    drawing = Drawing(writer, draw, 25.0)
    drawing.add(done(1))
    drawing.add(done(2))
    assert str(drawing.error) == "model file a.py, line 3: KeyError"
    assert writer.frames == []


def test_the_function_of_a_model_file_draws(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(
        "from torch import nn\ndef net():\n    return nn.Flatten()\n"
        "def draw(frame, output=None):\n    frame[0] = output\n    return frame\n"
    )
    own = Catalogue([file]).own
    assert own.names == ["nets:net"]  # what draws is no network
    draw = own.helper("nets:net", DRAW)
    assert draw is not None
    assert own.helper("le_net", DRAW) is None
    assert draw(PIXELS.copy(), 9)[0].max() == 9
    with pytest.raises(UsageError, match=r"nets\.py, line 5: ValueError"):
        draw(PIXELS.copy(), "nine")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--input", "docs"], "expected one model, got 4"),
        (["--input", "docs", "-t", "le_net", "--plot", "a.png"], "leave out --excel, --plot and --schedule"),
        (["--input", "docs", "-t", "le_net", "--output", "a.mp4"], "has no function draw(frame, output)"),
        (["--input", "nowhere.mp4", "-t", "le_net"], "nowhere.mp4 does not exist"),
        (["--keep-all"], "need a stream of frames"),
    ],
)
def test_wrong_flags_are_named_before_any_connection(
    flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-p", "1", *flags]) == 2
    assert error in capsys.readouterr().err
