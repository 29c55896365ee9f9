"""The tasks of a random draw, a file, or a directory of images; errors of a file are one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.edge.inputs import draw_tasks, image_suffixes, read_task_file, tasks_of_directory
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.utils.errors import UnknownModelError, UsageError

canonical_name = Catalogue().canonical_name


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.txt"


# ---------------------------------------------------------------- chance


@given(st.integers(0, 400), st.integers(0, 2**31))
def test_a_seed_draws_the_same_tasks_again(count: int, seed: int) -> None:
    tasks = draw_tasks(count, seed, list(ZOO))
    assert tasks == draw_tasks(count, seed, list(ZOO))
    assert [task.id for task in tasks] == list(range(1, count + 1))
    assert {task.model for task in tasks} <= set(ZOO)


def test_all_models_are_drawn_and_seeds_differ() -> None:
    assert {task.model for task in draw_tasks(100, 1, list(ZOO))} == set(ZOO)
    assert draw_tasks(100, 1, list(ZOO)) != draw_tasks(100, 2, list(ZOO))


def test_a_longer_queue_starts_like_a_shorter_one() -> None:
    assert draw_tasks(40, 7, list(ZOO))[:10] == draw_tasks(10, 7, list(ZOO))


def test_only_the_given_models_are_drawn() -> None:
    assert {task.model for task in draw_tasks(20, 1, ["mobile_net", "le_net"])} == {"mobile_net", "le_net"}


# ---------------------------------------------------------------- a file


def test_a_line_has_a_model_and_optionally_an_image(task_file: Path) -> None:
    task_file.write_text(
        "# model  image\n\nle_net\n  mobilenet   my cat.jpg  \n\t# another comment\nvgg_net /photos/dog.png\n",
        encoding="utf-8",
    )
    assert read_task_file(task_file, canonical_name) == [
        QueuedTask(1, "le_net"),
        QueuedTask(2, "mobile_net", task_file.parent / "my cat.jpg"),
        QueuedTask(3, "vgg_net", Path("/photos/dog.png")),
    ]


@pytest.mark.parametrize("content", [b"le_net a.jpg\r\nle_net b.jpg\r\n", b"\xef\xbb\xbfle_net a.jpg\nle_net b.jpg"])
def test_files_of_other_editors_are_read(task_file: Path, content: bytes) -> None:
    task_file.write_bytes(content)
    assert [task.image for task in read_task_file(task_file, canonical_name)] == [
        task_file.parent / "a.jpg",
        task_file.parent / "b.jpg",
    ]


def test_an_unknown_model_is_named_with_its_line(task_file: Path) -> None:
    task_file.write_text("\n" * 16 + "res_net cat.jpg\n", encoding="utf-8")
    with pytest.raises(UnknownModelError) as caught:
        read_task_file(task_file, canonical_name)
    said = f"{task_file}, line 17: unknown model 'res_net': choose from alex_net, vgg_net, le_net, mobile_net, "
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("content", ["", "\n \n", "# le_net\n"])
def test_a_file_without_tasks_shows_an_example_line(task_file: Path, content: str) -> None:
    task_file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds no task: .* le_net cat\.jpg"):
        read_task_file(task_file, canonical_name)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, task_file: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (task_file, tmp_path, tmp_path / "binary"):
        with pytest.raises(UsageError, match=r"^task file .* cannot be read: [^\n]+$"):
            read_task_file(path, canonical_name)


@given(text=st.text())
def test_any_text_is_tasks_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        tasks = read_task_file(path, canonical_name)
    except UsageError as exc:
        assert str(exc)
    else:
        assert all(canonical_name(task.model) == task.model for task in tasks)  # of torchvision's, too


# ---------------------------------------------------------------- a directory


def test_the_images_of_a_directory_go_to_the_models_in_turn(tmp_path: Path) -> None:
    for name in ("c.png", "a.JPG", "b.webp", "notes.txt", "d.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "e.jpg").mkdir()
    assert tasks_of_directory(tmp_path, ["le_net", "mobile_net"]) == [
        QueuedTask(1, "le_net", tmp_path / "a.JPG"),
        QueuedTask(2, "mobile_net", tmp_path / "b.webp"),
        QueuedTask(3, "le_net", tmp_path / "c.png"),
        QueuedTask(4, "mobile_net", tmp_path / "d.jpeg"),
    ]


def test_image_suffixes_are_those_that_pillow_reads() -> None:
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".webp"} <= image_suffixes()
    assert not {".pdf", ".txt", ".csv", ""} & image_suffixes()


def test_a_directory_without_images_or_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no image: put JPEG"):
        tasks_of_directory(tmp_path, ["le_net"])
    with pytest.raises(UsageError, match="missing cannot be read: No such file"):
        tasks_of_directory(tmp_path / "missing", ["le_net"])
