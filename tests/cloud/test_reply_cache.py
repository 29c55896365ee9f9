"""Answers that are kept: a task that comes again is not computed again, and nothing is kept for ever."""

from __future__ import annotations

import errno
from unittest.mock import Mock

import pytest
import torch

from neurosurgeon.cloud import reply_cache
from neurosurgeon.cloud.executor import CloudResult, Deliver
from neurosurgeon.cloud.reply_cache import Asker, Chore, KeptAnswers

Got = list[CloudResult | Exception]


class Engine:
    """Computes when it is told to."""

    def __init__(self) -> None:
        self.asked: list[Deliver] = []
        self.refusal: Exception | None = None

    def compute(self, deliver: Deliver) -> None:
        if self.refusal:
            raise self.refusal
        self.asked.append(deliver)


def result(value: float = 1.0, size: int = 1) -> CloudResult:
    return CloudResult((torch.full((size,), float(value)),), 1.0, 0.0)


def value_of(got: CloudResult | Exception) -> float:
    assert isinstance(got, CloudResult)
    return got.tensors[0][0].item()


def test_a_task_that_comes_again_gets_the_kept_answer() -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    memory = result(5.0)
    engine.asked[0](memory)
    memory.tensors[0].zero_()  # the answer may lie in the memory of its question, which is used again
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    assert len(engine.asked) == 1
    assert value_of(got[1]) == 5.0


def test_an_answer_that_cannot_be_copied_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    for _ in range(2):
        answers.submit(b"1", "question", Asker(engine.compute, got.append))
    monkeypatch.setattr(reply_cache.mmap, "mmap", Mock(side_effect=OSError(errno.ENOMEM, "no memory")))
    engine.asked[0](result(5.0))
    monkeypatch.undo()
    engine.asked[1](result(6.0))
    assert list(map(value_of, got)) == [5.0, 6.0]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_kept_answer_is_the_answer_whatever_its_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    first, second = torch.randint(0, 2, shape).to(dtype), torch.rand(shape).to(dtype).expand(2, *shape)[1]
    engine.asked[0](CloudResult((first, second), 1.0, 0.0))
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    assert isinstance(got[1], CloudResult)
    for kept, tensor in zip(got[1].tensors, (first, second), strict=True):
        assert kept.dtype == dtype and torch.equal(kept, tensor)


def test_a_task_that_comes_again_while_it_is_computed_waits_for_that() -> None:
    answers, engine, first, second = KeptAnswers(), Engine(), Got(), Got()
    answers.submit(b"1", "question", Asker(engine.compute, first.append))
    answers.submit(b"1", "question", Asker(engine.compute, second.append))
    engine.asked[0](result(5.0))
    assert len(engine.asked) == 1
    assert value_of(first[0]) == value_of(second[0]) == 5.0


def test_what_failed_or_was_dropped_is_computed_for_who_still_waits() -> None:
    answers, engine, first, second, third = KeptAnswers(), Engine(), Got(), Got(), Got()
    for got in (first, second, third):
        answers.submit(b"1", "question", Asker(engine.compute, got.append))
    engine.asked[0](ValueError("dropped"))
    assert len(engine.asked) == 2
    engine.asked[1](result(5.0))
    assert isinstance(first[0], ValueError)
    assert value_of(second[0]) == value_of(third[0]) == 5.0


def test_a_refusal_is_told_and_not_kept() -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    engine.refusal = ValueError("busy")
    with pytest.raises(ValueError, match="busy"):
        answers.submit(b"1", "question", Asker(engine.compute, got.append))
    engine.refusal = None
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    assert len(engine.asked) == 1


def test_who_waits_hears_that_the_second_attempt_is_refused() -> None:
    answers, engine, first, second = KeptAnswers(), Engine(), Got(), Got()
    answers.submit(b"1", "question", Asker(engine.compute, first.append))
    answers.submit(b"1", "question", Asker(engine.compute, second.append))
    engine.refusal = ValueError("busy")
    engine.asked[0](ValueError("dropped"))
    assert second == [engine.refusal]


def test_other_tasks_and_other_questions_are_computed() -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    for key, question in ((b"1", "question"), (b"2", "question"), (b"1", "another")):
        answers.submit(key, question, Asker(engine.compute, got.append))
    assert len(engine.asked) == 3
    for number, deliver in enumerate(engine.asked):
        deliver(result(number))
    answers.submit(b"1", "another", Asker(engine.compute, got.append))
    assert [value_of(one) for one in got] == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("is_done", [True, False])
def test_what_is_not_to_be_kept_is_computed_again(is_done: bool) -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    if is_done:
        engine.asked[0](result(1.0))
    answers.forget([b"1", b"2"])
    if not is_done:
        engine.asked[0](result(1.0))
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    engine.asked[1](result(2.0))
    assert [value_of(one) for one in got] == [1.0, 2.0]


def test_answers_are_forgotten_in_time() -> None:
    answers, engine, got = KeptAnswers(kept_s=-1.0), Engine(), Got()
    for _ in range(2):
        answers.submit(b"1", "question", Asker(engine.compute, got.append))
        engine.asked[-1](result())
    assert len(engine.asked) == 2


@pytest.mark.parametrize("bound", ["bytes", "number"])
def test_memory_is_bounded_and_the_oldest_go_first(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, engine, got = KeptAnswers(max_bytes=4 * 3 * 10), Engine(), Got()
    if bound == "number":
        monkeypatch.setattr(reply_cache, "MAX_KEPT", 3)
    size = 10 if bound == "bytes" else 1
    for number in range(5):
        answers.submit(bytes([number]), "question", Asker(engine.compute, got.append))
        engine.asked[-1](result(number, size))
    for number in (2, 3, 4):
        answers.submit(bytes([number]), "question", Asker(engine.compute, got.append))
    assert len(engine.asked) == 5
    answers.submit(bytes([1]), "question", Asker(engine.compute, got.append))
    assert len(engine.asked) == 6


def test_a_question_is_released_behind_its_answer_and_the_copy_of_it() -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    memory = result(5.0)
    answers.submit(b"1", "question", Asker(engine.compute, got.append, memory.tensors[0].zero_))
    answers.submit(b"1", "question", Asker(engine.compute, got.append, lambda: got.append(ValueError("released"))))
    engine.asked[0](memory)
    assert value_of(got[0]) == 0.0  # has long been sent when the memory is used again
    assert value_of(got[1]) == 5.0
    assert isinstance(got[2], ValueError)


@pytest.mark.parametrize("asks_before", [True, False])
def test_an_answer_that_is_to_be_kept_later_is_there_for_whoever_asks_again(asks_before: bool) -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    later: list[Chore] = []
    asker = Asker(engine.compute, got.append, later=lambda chore, result_bytes: later.append(chore))
    answers.submit(b"1", "question", asker)
    if asks_before:
        answers.submit(b"1", "question", Asker(engine.compute, got.append))
    engine.asked[0](result(5.0))
    assert list(map(value_of, got)) == [5.0]
    answers.submit(b"1", "question", Asker(engine.compute, got.append))  # whoever does the chore may be held up
    assert list(map(value_of, got)) == [5.0] * (2 + asks_before)
    later[0]()
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    assert list(map(value_of, got)) == [5.0] * (3 + asks_before)
    assert len(engine.asked) == 1


def test_a_failure_that_is_to_be_settled_later_is_computed_anew_for_whoever_asks_again() -> None:
    answers, engine, got = KeptAnswers(), Engine(), Got()
    later: list[Chore] = []
    asker = Asker(engine.compute, got.append, later=lambda chore, result_bytes: later.append(chore))
    answers.submit(b"1", "question", asker)
    engine.asked[0](ValueError("it broke"))
    answers.submit(b"1", "question", Asker(engine.compute, got.append))
    engine.asked[1](result(5.0))
    later[0]()
    assert isinstance(got[0], ValueError)
    assert value_of(got[1]) == 5.0
