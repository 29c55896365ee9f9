"""Replies that are kept: a task that comes again is not computed again, and no reply is kept for ever."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from neurosurgeon.cloud import reply_cache
from neurosurgeon.cloud.executor import CloudResult
from neurosurgeon.cloud.reply_cache import MAX_REPLY_BYTES, ReplyCache
from neurosurgeon.graph.spec import channels_last


class Workers:
    """Computes when a test says so."""

    def __init__(self) -> None:
        self.asked: list[Future[CloudResult]] = []
        self.refusal: Exception | None = None

    def compute(self) -> Future[CloudResult]:
        if self.refusal:
            raise self.refusal
        self.asked.append(Future())
        return self.asked[-1]


def result(value: float = 1.0, size: int = 1) -> CloudResult:
    return CloudResult((np.full(size, value, np.float32),), 1.0, 0.0)


def value_of(future: Future[CloudResult]) -> float:
    return float(future.result(0).arrays[0][0])


def test_a_task_that_comes_again_gets_a_copy_of_the_reply() -> None:
    cache, workers = ReplyCache(), Workers()
    cache.get_or_compute(b"1", "question", workers.compute)
    first = result(5.0)
    workers.asked[0].set_result(first)
    first.arrays[0][:] = 0.0
    assert value_of(cache.get_or_compute(b"1", "question", workers.compute)) == 5.0
    assert len(workers.asked) == 1


def test_a_reply_that_cannot_be_copied_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: CloudResult) -> CloudResult:
        raise MemoryError

    cache, workers = ReplyCache(), Workers()
    monkeypatch.setattr(CloudResult, "copy", fail)
    futures = [cache.get_or_compute(b"1", "question", workers.compute) for _ in range(2)]
    workers.asked[0].set_result(result(5.0))
    assert list(map(value_of, futures)) == [5.0, 5.0]
    assert caplog.text.count("Traceback") == 1
    cache.get_or_compute(b"1", "question", workers.compute)
    assert len(workers.asked) == 2


@pytest.mark.parametrize(("size", "is_kept"), [(MAX_REPLY_BYTES // 4, True), (MAX_REPLY_BYTES // 4 + 1, False)])
def test_a_large_reply_is_computed_again(size: int, is_kept: bool) -> None:
    cache, workers = ReplyCache(), Workers()
    cache.get_or_compute(b"1", "question", workers.compute)
    workers.asked[0].set_result(result(5.0, size))
    cache.get_or_compute(b"1", "question", workers.compute)
    assert len(workers.asked) == 2 - is_kept


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (1, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int64", "bool"])
def test_a_kept_reply_is_the_reply_whatever_its_shape(shape: tuple[int, ...], dtype: str) -> None:
    cache, workers = ReplyCache(), Workers()
    cache.get_or_compute(b"1", "question", workers.compute)
    random = np.random.default_rng(0)
    first = channels_last(random.integers(0, 2, shape).astype(dtype))
    second = np.broadcast_to(random.uniform(0, 2, shape).astype(dtype), (2, *shape))[1, ...]
    workers.asked[0].set_result(CloudResult((first, second), 1.0, 0.0))
    kept = cache.get_or_compute(b"1", "question", workers.compute).result(0)
    for copy, array in zip(kept.arrays, (first, second), strict=True):
        assert copy.dtype == dtype and np.array_equal(copy, array)
        assert np.array_equal(copy.ravel("K"), array.ravel("K"))  # in the order of memory, too
        assert copy.base is None and not np.may_share_memory(copy, array)


def test_a_task_that_comes_again_while_it_is_computed_waits_for_that() -> None:
    cache, workers = ReplyCache(), Workers()
    futures = [cache.get_or_compute(b"1", "question", workers.compute) for _ in range(2)]
    workers.asked[0].set_result(result(5.0))
    assert len(workers.asked) == 1
    assert list(map(value_of, futures)) == [5.0, 5.0]


def test_a_failed_task_is_computed_again_when_it_comes_again() -> None:
    cache, workers = ReplyCache(), Workers()
    futures = [cache.get_or_compute(b"1", "question", workers.compute) for _ in range(2)]
    workers.asked[0].set_exception(ValueError("it broke"))
    assert [str(future.exception(0)) for future in futures] == ["it broke"] * 2
    third = cache.get_or_compute(b"1", "question", workers.compute)
    workers.asked[1].set_result(result(5.0))
    assert value_of(third) == 5.0


def test_a_cancelled_task_is_computed_again_for_the_callers_that_wait() -> None:
    cache, workers = ReplyCache(), Workers()
    again: list[Future[CloudResult]] = []

    def ask(future: Future[CloudResult] | None = None) -> None:
        again.append(cache.get_or_compute(b"1", "question", workers.compute))

    for _ in range(2):
        cache.get_or_compute(b"1", "question", workers.compute).add_done_callback(ask)
    workers.asked[0].cancel()
    workers.asked[1].set_result(result(5.0))
    assert list(map(value_of, again)) == [5.0, 5.0]
    assert len(workers.asked) == 2


def test_a_cancelled_computation_is_not_waited_for_before_its_callbacks_ran() -> None:
    cache, workers = ReplyCache(), Workers()
    futures: list[Future[CloudResult]] = []

    def compute() -> Future[CloudResult]:
        future = workers.compute()
        if len(workers.asked) == 1:  # this callback runs before the cache's
            future.add_done_callback(lambda _: futures.append(cache.get_or_compute(b"1", "question", compute)))
        return future

    cache.get_or_compute(b"1", "question", compute)
    workers.asked[0].cancel()
    workers.asked[1].set_result(result(5.0))
    assert list(map(value_of, futures)) == [5.0]
    assert value_of(cache.get_or_compute(b"1", "question", compute)) == 5.0
    assert len(workers.asked) == 2


def test_a_refusal_is_raised_and_not_kept() -> None:
    cache, workers = ReplyCache(), Workers()
    workers.refusal = ValueError("busy")
    with pytest.raises(ValueError, match="busy"):
        cache.get_or_compute(b"1", "question", workers.compute)
    workers.refusal = None
    cache.get_or_compute(b"1", "question", workers.compute)
    assert len(workers.asked) == 1


def test_other_tasks_and_other_questions_are_computed() -> None:
    cache, workers = ReplyCache(), Workers()
    futures = [
        cache.get_or_compute(key, question, workers.compute)
        for key, question in ((b"1", "question"), (b"2", "question"), (b"1", "another"))
    ]
    assert len(workers.asked) == 3
    for number, future in enumerate(workers.asked):
        future.set_result(result(number))
    futures.append(cache.get_or_compute(b"1", "another", workers.compute))
    assert list(map(value_of, futures)) == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("is_done", [True, False])
def test_a_reply_that_is_not_to_be_kept_is_computed_again(is_done: bool) -> None:
    cache, workers = ReplyCache(), Workers()
    first = cache.get_or_compute(b"1", "question", workers.compute)
    if is_done:
        workers.asked[0].set_result(result(1.0))
    cache.forget([b"1", b"2"])
    if not is_done:
        workers.asked[0].set_result(result(1.0))
    second = cache.get_or_compute(b"1", "question", workers.compute)
    workers.asked[1].set_result(result(2.0))
    assert [value_of(first), value_of(second)] == [1.0, 2.0]


def test_replies_are_forgotten_in_time() -> None:
    cache, workers = ReplyCache(kept_s=-1.0), Workers()
    for _ in range(2):
        cache.get_or_compute(b"1", "question", workers.compute)
        workers.asked[-1].set_result(result())
    assert len(workers.asked) == 2


@pytest.mark.parametrize("bound", ["bytes", "number"])
def test_memory_is_bounded_and_the_oldest_go_first(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, workers = ReplyCache(max_bytes=4 * 3 * 10), Workers()
    if bound == "number":
        monkeypatch.setattr(reply_cache, "MAX_KEPT", 3)
    size = 10 if bound == "bytes" else 1
    for number in range(5):
        cache.get_or_compute(bytes([number]), "question", workers.compute)
        workers.asked[-1].set_result(result(number, size))
    for number in (2, 3, 4):
        cache.get_or_compute(bytes([number]), "question", workers.compute)
    assert len(workers.asked) == 5
    cache.get_or_compute(bytes([1]), "question", workers.compute)
    assert len(workers.asked) == 6
