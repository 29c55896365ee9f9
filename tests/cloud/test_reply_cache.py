"""Replies that are kept: a task that comes again is not computed again, and nothing is kept for ever."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from neurosurgeon.cloud import reply_cache
from neurosurgeon.cloud.executor import CloudResult
from neurosurgeon.cloud.reply_cache import MAX_REPLY_BYTES, ReplyCache


class Engine:
    """Computes when it is told to."""

    def __init__(self) -> None:
        self.asked: list[Future[CloudResult]] = []
        self.refusal: Exception | None = None

    def compute(self) -> Future[CloudResult]:
        if self.refusal:
            raise self.refusal
        self.asked.append(Future())
        return self.asked[-1]


def result(value: float = 1.0, size: int = 1) -> CloudResult:
    return CloudResult((torch.full((size,), float(value)),), 1.0, 0.0)


def value_of(future: Future[CloudResult]) -> float:
    return future.result(0).tensors[0][0].item()


def test_a_task_that_comes_again_gets_a_copy_of_the_reply() -> None:
    cache, engine = ReplyCache(), Engine()
    cache.get_or_compute(b"1", "question", engine.compute)
    first = result(5.0)
    engine.asked[0].set_result(first)
    first.tensors[0].zero_()
    assert value_of(cache.get_or_compute(b"1", "question", engine.compute)) == 5.0
    assert len(engine.asked) == 1


def test_a_reply_that_cannot_be_copied_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: CloudResult) -> CloudResult:
        raise MemoryError

    cache, engine = ReplyCache(), Engine()
    monkeypatch.setattr(CloudResult, "copy", fail)
    futures = [cache.get_or_compute(b"1", "question", engine.compute) for _ in range(2)]
    engine.asked[0].set_result(result(5.0))
    assert list(map(value_of, futures)) == [5.0, 5.0]
    assert caplog.text.count("Traceback") == 1
    cache.get_or_compute(b"1", "question", engine.compute)
    assert len(engine.asked) == 2


@pytest.mark.parametrize(("size", "is_kept"), [(MAX_REPLY_BYTES // 4, True), (MAX_REPLY_BYTES // 4 + 1, False)])
def test_a_large_reply_is_computed_again(size: int, is_kept: bool) -> None:
    cache, engine = ReplyCache(), Engine()
    cache.get_or_compute(b"1", "question", engine.compute)
    engine.asked[0].set_result(result(5.0, size))
    cache.get_or_compute(b"1", "question", engine.compute)
    assert len(engine.asked) == 2 - is_kept


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_kept_reply_is_the_reply_whatever_its_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cache, engine = ReplyCache(), Engine()
    cache.get_or_compute(b"1", "question", engine.compute)
    first, second = torch.randint(0, 2, shape).to(dtype), torch.rand(shape).to(dtype).expand(2, *shape)[1]
    engine.asked[0].set_result(CloudResult((first, second), 1.0, 0.0))
    kept = cache.get_or_compute(b"1", "question", engine.compute).result(0)
    for copy, tensor in zip(kept.tensors, (first, second), strict=True):
        assert copy.dtype == dtype and torch.equal(copy, tensor)
        assert copy.untyped_storage().nbytes() == tensor.nbytes


def test_a_task_that_comes_again_while_it_is_computed_waits_for_that() -> None:
    cache, engine = ReplyCache(), Engine()
    futures = [cache.get_or_compute(b"1", "question", engine.compute) for _ in range(2)]
    engine.asked[0].set_result(result(5.0))
    assert len(engine.asked) == 1
    assert list(map(value_of, futures)) == [5.0, 5.0]


def test_what_failed_is_computed_for_who_asks_then() -> None:
    cache, engine = ReplyCache(), Engine()
    futures = [cache.get_or_compute(b"1", "question", engine.compute) for _ in range(2)]
    engine.asked[0].set_exception(ValueError("it broke"))
    assert [str(future.exception(0)) for future in futures] == ["it broke"] * 2
    third = cache.get_or_compute(b"1", "question", engine.compute)
    engine.asked[1].set_result(result(5.0))
    assert value_of(third) == 5.0


def test_what_is_cancelled_is_computed_for_who_still_waits() -> None:
    cache, engine = ReplyCache(), Engine()
    again: list[Future[CloudResult]] = []

    def ask(future: Future[CloudResult] | None = None) -> None:
        again.append(cache.get_or_compute(b"1", "question", engine.compute))

    for _ in range(2):
        cache.get_or_compute(b"1", "question", engine.compute).add_done_callback(ask)
    engine.asked[0].cancel()
    engine.asked[1].set_result(result(5.0))
    assert list(map(value_of, again)) == [5.0, 5.0]
    assert len(engine.asked) == 2


def test_a_cancelled_computation_is_not_waited_for_before_its_callbacks_ran() -> None:
    cache, engine = ReplyCache(), Engine()
    futures: list[Future[CloudResult]] = []

    def compute() -> Future[CloudResult]:
        future = engine.compute()
        if len(engine.asked) == 1:  # this callback runs before the cache's
            future.add_done_callback(lambda _: futures.append(cache.get_or_compute(b"1", "question", compute)))
        return future

    cache.get_or_compute(b"1", "question", compute)
    engine.asked[0].cancel()
    engine.asked[1].set_result(result(5.0))
    assert list(map(value_of, futures)) == [5.0]
    assert value_of(cache.get_or_compute(b"1", "question", compute)) == 5.0
    assert len(engine.asked) == 2


def test_a_refusal_is_raised_and_not_kept() -> None:
    cache, engine = ReplyCache(), Engine()
    engine.refusal = ValueError("busy")
    with pytest.raises(ValueError, match="busy"):
        cache.get_or_compute(b"1", "question", engine.compute)
    engine.refusal = None
    cache.get_or_compute(b"1", "question", engine.compute)
    assert len(engine.asked) == 1


def test_other_tasks_and_other_questions_are_computed() -> None:
    cache, engine = ReplyCache(), Engine()
    futures = [
        cache.get_or_compute(key, question, engine.compute)
        for key, question in ((b"1", "question"), (b"2", "question"), (b"1", "another"))
    ]
    assert len(engine.asked) == 3
    for number, future in enumerate(engine.asked):
        future.set_result(result(number))
    futures.append(cache.get_or_compute(b"1", "another", engine.compute))
    assert list(map(value_of, futures)) == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("is_done", [True, False])
def test_what_is_not_to_be_kept_is_computed_again(is_done: bool) -> None:
    cache, engine = ReplyCache(), Engine()
    first = cache.get_or_compute(b"1", "question", engine.compute)
    if is_done:
        engine.asked[0].set_result(result(1.0))
    cache.forget([b"1", b"2"])
    if not is_done:
        engine.asked[0].set_result(result(1.0))
    second = cache.get_or_compute(b"1", "question", engine.compute)
    engine.asked[1].set_result(result(2.0))
    assert [value_of(first), value_of(second)] == [1.0, 2.0]


def test_replies_are_forgotten_in_time() -> None:
    cache, engine = ReplyCache(kept_s=-1.0), Engine()
    for _ in range(2):
        cache.get_or_compute(b"1", "question", engine.compute)
        engine.asked[-1].set_result(result())
    assert len(engine.asked) == 2


@pytest.mark.parametrize("bound", ["bytes", "number"])
def test_memory_is_bounded_and_the_oldest_go_first(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, engine = ReplyCache(max_bytes=4 * 3 * 10), Engine()
    if bound == "number":
        monkeypatch.setattr(reply_cache, "MAX_KEPT", 3)
    size = 10 if bound == "bytes" else 1
    for number in range(5):
        cache.get_or_compute(bytes([number]), "question", engine.compute)
        engine.asked[-1].set_result(result(number, size))
    for number in (2, 3, 4):
        cache.get_or_compute(bytes([number]), "question", engine.compute)
    assert len(engine.asked) == 5
    cache.get_or_compute(bytes([1]), "question", engine.compute)
    assert len(engine.asked) == 6
