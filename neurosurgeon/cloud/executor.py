"""The cloud's workers: they run cloud partitions, in a bounded order that is fair to every edge.

Theory of operation. `submit` puts a task into a `FairQueue`, which `Executor._lock` guards, and one item into `_wake`
for a worker to take. A worker takes the task whose turn it is, with those that can run in one batch with it, runs the
partition, and sets the results of their futures. Done callbacks run on the worker, which they must not block.

All computing happens on the workers. OpenMP keeps a team of threads for every thread that computes; with more teams
than cores it makes them sleep at each barrier, and small networks take twice as long (MobileNetV2 on two cores: 20 ms
in place of 10). So several workers share the CPU threads among them, and a network is loaded on a thread that ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from neurosurgeon.cloud.scheduler import FairQueue, QueueFullError
from neurosurgeon.engine.base import Engine, Partition
from neurosurgeon.graph.spec import Array
from neurosurgeon.utils.errors import BusyError, NeurosurgeonError
from neurosurgeon.utils.load import Load, LoadMeter
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.metrics import Metrics
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0  # a running partition of a large network on a small machine
CLIENT_SHARE = 16  # tasks of one edge that may wait: enough to keep a worker busy over any link, a quarter of all
MIN_RETRY_MS = 5.0  # the shortest wait before a retry
# A batch of four lets a CPU do 1.0 to 2.9 times as many tasks (tests/benchmark/batching.py), but its results differ
# from single ones in the last bits: on a CPU, where both sides otherwise compute the same bits, it is an option.
MAX_BATCH = {"cpu": 1, "cuda": 8}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """How much the workers do at once."""

    threads: int = 1  # CPU threads of all workers together
    workers: int = 1
    max_batch: int | None = None  # tasks that run as one; None: the default of the device
    batch_wait_ms: float = 0.0  # how long a task waits for others to run with; 0: only for those that already wait
    max_queue: int = 64  # tasks that wait, of all edges


class CloudResult(NamedTuple):
    """The result of a task, and its times in the cloud.

    ``compute_ms`` is the wall time of the batch; each task of it reports the full value.
    """

    arrays: tuple[Array, ...]
    compute_ms: float
    queue_ms: float

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum([array.nbytes for array in self.arrays])

    def copy(self) -> CloudResult:
        """Return the result with arrays in memory of their own."""
        return self._replace(arrays=tuple([array.copy("K") for array in self.arrays]))


class _Task(NamedTuple):
    """One partition to run; tasks of one partition may run as one batch."""

    partition: Partition  # one object for each network and cut
    arrays: Sequence[Array]
    future: Future[CloudResult]
    submitted_ms: float


class _Job(NamedTuple):
    """Work other than a task, which needs a worker for itself."""

    run: Callable[[], Any]
    future: Future[Any]


class Executor:
    """Runs cloud partitions on a few workers.

    There is one by default: one partition at a time uses all cores, so that no other disturbs its measured time.
    """

    def __init__(
        self, engine: Engine, limits: ExecutorLimits = ExecutorLimits(), metrics: Metrics | None = None
    ) -> None:
        self.engine = engine
        self.metrics = metrics or Metrics()
        self.threads = max(1, engine.use_threads(limits.threads) // limits.workers)  # CPU threads of one worker
        self._limits = limits
        self._meter = LoadMeter()
        self._lock = threading.Lock()  # guards the queue
        self._queue: FairQueue[_Task | _Job] = FairQueue(limits.max_queue, min(CLIENT_SHARE, limits.max_queue))
        self._alone = threading.Lock()  # held by the one caller of `run_alone`
        self._wake: SimpleQueue[None] = SimpleQueue()  # an item for each that was queued; SimpleQueue.get waits in C
        self._workers = [
            threading.Thread(target=self._work, name=f"compute {number}", daemon=True)
            for number in range(limits.workers)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def _max_batch(self) -> int:
        return self._limits.max_batch or MAX_BATCH[self.engine.device]

    @property
    def load(self) -> Load:
        """The recent wait and service time of tasks."""
        return self._meter.load(now_ms())

    def submit(self, client: Hashable, partition: Partition, arrays: Sequence[Array]) -> Future[CloudResult]:
        """Queue a partition with its inputs, and return the future result, which shares no memory with them.

        Its callbacks run on the worker, which they must not block, or on the thread that calls `drop`.

        Args:   client: the edge whose turn the task takes.
        Raises: BusyError: the queue is full, or the client's share of it. NeurosurgeonError: the executor is closed.
        """
        future: Future[CloudResult] = Future()
        self._put(client, _Task(partition, arrays, future, now_ms()))
        return future

    def submit_job(self, job: Callable[[], Result], client: Hashable = None) -> Future[Result]:
        """Queue a job that needs a worker for itself, and return its future result.

        Raises: as `submit`.
        """
        future: Future[Result] = Future()
        self._put(client, _Job(job, future))
        return future

    def run_alone(self, job: Callable[[], Result]) -> Result:
        """Return the result of a job during which no worker computes. May block.

        Every worker gets a job and waits for all others; one of them runs ``job``. A full queue does not refuse it.

        Raises: an error of the job.
        """
        barrier = threading.Barrier(len(self._workers))

        def run() -> list[Result]:
            is_first = barrier.wait() == 0  # all workers are here
            try:
                return [job()] if is_first else []
            finally:
                barrier.wait()  # the job is done

        futures: list[Future[list[Result]]] = [Future() for _ in self._workers]
        with self._alone:  # two of them would wait for each other
            try:
                for future in futures:  # each is a client of its own, so that its job waits for no other task
                    self._put(future, _Job(run, future), is_limited=False)
            except Exception:
                barrier.abort()  # releases the workers that already wait
                raise
            (result,) = [result for future in futures for result in future.result()]
            return result

    def drop(self, client: Hashable) -> int:
        """Cancel the waiting tasks of a client that has left; return their number. A running task is finished."""
        with self._lock:
            dropped = self._queue.drop(client)
        for item in dropped:
            item.future.cancel()
        return len(dropped)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish the tasks that are queued, within ``timeout_s``, and end the workers."""
        with self._lock:
            self._queue.is_closed = True
        deadline_ms = now_ms() + timeout_s * MS_PER_S
        for _ in self._workers:
            self._wake.put(None)
        for worker in self._workers:
            worker.join(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))

    def _put(self, client: Hashable, item: _Task | _Job, *, is_limited: bool = True) -> None:
        with self._lock:
            if self._queue.is_closed:
                raise NeurosurgeonError("task refused: the cloud is stopping; retry when it has restarted")
            try:
                self._queue.put(client, item, is_limited=is_limited)
            except QueueFullError as exc:
                retry_ms = max(MIN_RETRY_MS, len(self._queue) * self.load.service_ms / len(self._workers))
                raise BusyError(f"the cloud is busy: {exc}", retry_ms) from exc
        self._wake.put(None)

    # ---------------------------------------------------------------- the workers

    def _work(self) -> None:
        self.engine.use_threads(self.threads)
        while True:
            with self._lock:
                item = self._queue.take()
                is_over = self._queue.is_closed
            if item is not None:
                try:
                    self._run(item)
                except Exception as exc:
                    internal_error(log, exc, f"{threading.current_thread().name}: a task could not be finished")
            elif is_over:
                return
            else:
                self._wake.get()

    def _run(self, item: _Task | _Job) -> None:
        if isinstance(item, _Job):
            try:
                item.future.set_result(item.run())
            except Exception as exc:
                item.future.set_exception(exc)
            return
        batch = [item]
        results: Sequence[CloudResult | Exception]
        try:
            if self._max_batch > 1 and item.partition.can_batch:
                batch += self._batch_with(item)
            results = self._run_batch(batch)
        except Exception as exc:  # an internal error: no edge may wait for these tasks
            results = [exc] * len(batch)
        for task, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                task.future.set_exception(result)
            else:
                task.future.set_result(result)
        self.metrics.batch(len(batch))

    def _run_batch(self, batch: Sequence[_Task]) -> list[CloudResult | Exception]:
        """Return the results of a batch; record its waits and times before the replies, which carry the load."""
        self._meter.started(len(batch))
        start_ms = now_ms()
        results = run_batch(batch, start_ms)
        end_ms = now_ms()
        for task in batch:
            self._meter.ended(start_ms - task.submitted_ms, end_ms - start_ms, end_ms)
        return results

    def _batch_with(self, first: _Task) -> list[_Task]:
        """Return the tasks that run in one batch with ``first``.

        Waits for more until the batch is full, `ExecutorLimits.batch_wait_ms` is over, or another item is queued.
        """

        def is_alike(item: _Task | _Job) -> bool:
            return (
                isinstance(item, _Task)
                and item.partition is first.partition
                and [array.dtype for array in item.arrays] == [array.dtype for array in first.arrays]
            )

        room = self._max_batch - 1
        found: list[_Task | _Job] = []
        deadline_ms = now_ms() + self._limits.batch_wait_ms
        while True:
            with self._lock:
                found += self._queue.take_alike(is_alike, room - len(found))
                is_over = len(found) == room or len(self._queue) > 0 or self._queue.is_closed
            wait_s = (deadline_ms - now_ms()) / MS_PER_S
            if is_over or wait_s <= 0:
                break
            with suppress(Empty):
                self._wake.get(timeout=wait_s)
        self._wake.put(None)  # one that was used up here may have been meant for another worker
        return [task for task in found if isinstance(task, _Task)]


def run_batch(tasks: Sequence[_Task], start_ms: float) -> list[CloudResult | Exception]:
    """Run tasks of one partition as one batch, and return the result of each, or its error.

    A batch that fails is run again one by one: it may be too large, and no task fails because of another.
    """
    waits_ms = [start_ms - task.submitted_ms for task in tasks]
    try:
        inputs = tasks[0].arrays
        if len(tasks) > 1:
            inputs = [np.concatenate(alike) for alike in zip(*(task.arrays for task in tasks), strict=True)]
        result = tasks[0].partition.run(inputs)
        assert result is not None  # noqa: S101  # for mypy: no event stops it
        outputs = [  # a partition may return a view of its input
            array.copy("K") if any(np.may_share_memory(array, other) for other in inputs) else array
            for array in result.arrays
        ]
        parts = zip(*(np.split(output, len(tasks)) for output in outputs), strict=True) if len(tasks) > 1 else [outputs]
        return [CloudResult(tuple(part), result.compute_ms, w) for part, w in zip(parts, waits_ms, strict=True)]
    except Exception as exc:  # fails the task, and does not end the worker
        if len(tasks) == 1:
            return [exc]
        return [single for task in tasks for single in run_batch([task], start_ms)]
