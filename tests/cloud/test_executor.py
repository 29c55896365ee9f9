"""The executor: its results are those of the whole network, in a fair order, in batches, and within its limits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.cloud import executor as executor_module
from neurosurgeon.cloud.executor import CLIENT_SHARE, CloudResult, Executor, ExecutorLimits
from neurosurgeon.engine.base import Partition, PartitionResult
from neurosurgeon.engine.torch_engine import TorchPartition, as_array, as_tensor
from neurosurgeon.graph.spec import Array, TensorSpec
from neurosurgeon.utils.errors import BusyError, NeurosurgeonError
from neurosurgeon.utils.load import Load
from tests.equality import assert_equal
from tests.networks import ENGINE, cut, load_network, pixels, random_input, run, run_whole

WAIT_S = 10.0  # a test that needs this long has hung
Start = Callable[..., Executor]


class CountedPartition:
    """A cloud partition that notes how many tasks each run computes."""

    batch_sizes: list[int] = []

    def __init__(self, partition: TorchPartition) -> None:
        self.partition = partition

    def __getattr__(self, name: str) -> Any:
        return getattr(self.partition, name)

    def run(self, arrays: Sequence[Array]) -> PartitionResult | None:
        """Run it."""
        self.batch_sizes.append(len(arrays[0]))
        return self.partition.run(arrays)


@cache
def cloud_partition(model: str, point: int) -> Any:
    """Return the one partition that all tasks of this cut run."""
    return CountedPartition(cut(load_network(model), point).cloud)


def partition_of(module: nn.Module) -> Any:
    """Return a partition that takes five values."""
    module_as_part: Any = module
    inputs = (TensorSpec((1, 5)),)
    network = load_network("le_net").ref
    return CountedPartition(TorchPartition(network, frozenset(), inputs, inputs, module_as_part, "cpu"))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start executors that end with the test."""
    executors: list[Executor] = []

    def start_one(**limits: Any) -> Executor:
        executors.append(Executor(ENGINE, ExecutorLimits(**limits)))
        return executors[-1]

    yield start_one
    for one in executors:
        one.close()


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    one = Executor(ENGINE)
    yield one
    one.close()


class Edge:
    """A client that collects its results."""

    def __init__(self, executor: Executor, model: str = "le_net") -> None:
        self.executor, self.model = executor, model
        self.results: deque[Future[CloudResult]] = deque()

    def submit(self, point: int = 0, arrays: Sequence[Array] | None = None) -> None:
        """Submit a task."""
        partition = cloud_partition(self.model, point)
        self.results.append(self.executor.submit(self, partition, arrays or [random_input()]))

    def result(self) -> CloudResult:
        """Return the next result."""
        return self.results.popleft().result(WAIT_S)

    def ask(self, point: int = 0, arrays: Sequence[Array] | None = None) -> CloudResult:
        """Return the result of a task."""
        self.submit(point, arrays)
        return self.result()


class Gate:
    """Holds one worker until it is opened."""

    def __init__(self, executor: Executor) -> None:
        self.reached, self._may_go_on = threading.Event(), threading.Event()
        self._job = executor.submit_job(self._hold, "gate")
        assert self.reached.wait(WAIT_S)

    def _hold(self) -> None:
        self.reached.set()
        assert self._may_go_on.wait(WAIT_S)

    def open(self) -> None:
        """Let the worker go on."""
        self._may_go_on.set()
        self._job.result(WAIT_S)


# ---------------------------------------------------------------- the result


@pytest.mark.parametrize("point", [0, 1, 6, 11])
def test_the_result_is_that_of_the_whole_network(executor: Executor, point: int) -> None:
    network = load_network("le_net")
    boundary_tensors = run(cut(network, point).edge, [random_input()]).arrays
    result = Edge(executor).ask(point, boundary_tensors)
    assert_equal(result.arrays[0], run_whole(network, random_input()), same_setup=True)
    assert result.compute_ms >= 0
    assert result.queue_ms >= 0


def test_many_edges_at_once_all_get_their_own_result(start: Start) -> None:
    executor = start(workers=3)
    inputs = [random_input() * (n + 1) for n in range(6)]
    alone = [Edge(executor).ask(0, [array.copy("K")]).arrays[0] for array in inputs]
    edges = [Edge(executor) for _ in inputs]
    for edge, array in zip(edges, inputs, strict=True):
        edge.submit(0, [array])
    together = [edge.result().arrays[0] for edge in edges]
    for one, other in zip(alone, together, strict=True):
        assert_equal(other, one, same_setup=True)


def test_an_error_while_computing_belongs_to_its_task(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    edge = Edge(executor)
    with monkeypatch.context() as broken:
        broken.setattr(CountedPartition, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            edge.ask()
    assert edge.ask().arrays[0].shape == (1, 1000)


def test_a_callback_that_fails_costs_no_worker(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    def fail(future: Future[CloudResult]) -> None:
        raise RuntimeError("the edge is gone")

    edge, gate = Edge(executor), Gate(executor)
    executor.submit(edge, cloud_partition("le_net", 0), [random_input()]).add_done_callback(fail)
    gate.open()
    assert edge.ask().arrays[0].shape == (1, 1000)
    assert caplog.text.count("RuntimeError: the edge is gone") == 1


def test_a_result_shares_no_memory_with_its_input(executor: Executor) -> None:
    array = np.ones((1, 5), np.float32)
    result = executor.submit("edge", partition_of(IsAView()), [array]).result(WAIT_S)
    array[:] = 0
    assert np.array_equal(result.arrays[0], np.ones(5, np.float32))


class IsAView(nn.Module):
    """A partition that computes nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x[0],)


def test_a_job_gets_a_worker_for_itself(executor: Executor) -> None:
    assert executor.submit_job(lambda: threading.current_thread().name).result().startswith("compute")
    with pytest.raises(ZeroDivisionError):
        executor.submit_job(lambda: 1 / 0).result()


# ---------------------------------------------------------------- a job while no worker computes


def test_while_a_job_runs_alone_all_workers_wait(start: Start) -> None:
    executor, computed = start(workers=3), SimpleQueue[str]()
    gates = [Gate(executor), Gate(executor)]

    def job() -> bool:
        futures = [executor.submit_job(lambda: computed.put("task")) for _ in range(3)]
        return not any(future.done() for future in futures) and computed.empty()

    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(executor.run_alone, job)
        for gate in gates:
            assert not alone.done()
            gate.open()
        assert alone.result(WAIT_S)
    assert [computed.get(timeout=WAIT_S) for _ in range(3)] == ["task"] * 3


def test_jobs_that_run_alone_take_turns(start: Start) -> None:
    executor, running = start(workers=2), threading.Lock()

    def job(number: int) -> int:
        assert running.acquire(blocking=False)
        running.release()
        return number

    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(lambda number: executor.run_alone(lambda: job(number)), range(8))
        assert list(asked) == list(range(8))


def test_a_job_that_fails_alone_costs_no_worker(start: Start) -> None:
    executor = start(workers=2)
    with pytest.raises(ZeroDivisionError):
        executor.run_alone(lambda: 1 / 0)
    assert executor.run_alone(lambda: 5) == 5
    assert Edge(executor).ask().arrays[0].shape == (1, 1000)


@pytest.mark.parametrize(("workers", "max_queue"), [(3, 1), (CLIENT_SHARE + 2, 64)])
def test_a_full_queue_refuses_no_job_that_runs_alone(start: Start, workers: int, max_queue: int) -> None:
    executor = start(workers=workers, max_queue=max_queue)
    gates = [Gate(executor) for _ in range(workers)]
    edge = Edge(executor)
    edge.submit()
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(executor.run_alone, lambda: 5)
        for gate in gates:
            gate.open()
        assert alone.result(WAIT_S) == 5
    assert edge.result().arrays[0].shape == (1, 1000)


def test_a_closed_executor_runs_no_job_alone(start: Start) -> None:
    executor = start(workers=2)
    executor.close()
    with pytest.raises(NeurosurgeonError, match="stopping"):
        executor.run_alone(lambda: 5)


# ---------------------------------------------------------------- the queue


def test_edges_take_turns(start: Start) -> None:
    executor, order = start(), SimpleQueue[Hashable]()
    gate = Gate(executor)
    for name in ("a", "a", "a", "b", "c"):
        future = executor.submit(name, cloud_partition("le_net", 0), [random_input()])
        future.add_done_callback(lambda _, name=name: order.put(name))  # type: ignore[misc]
    gate.open()
    assert [order.get(timeout=WAIT_S) for _ in range(5)] == ["a", "b", "c", "a", "a"]


def test_a_full_queue_says_when_to_ask_again(start: Start) -> None:
    executor = start(max_queue=2)
    first, second = Edge(executor), Edge(executor)
    first.ask()
    gate = Gate(executor)
    first.submit()
    second.submit()
    with pytest.raises(BusyError, match="the cloud is busy: 2 tasks wait") as caught:
        second.submit()
    assert caught.value.retry_ms >= max(executor_module.MIN_RETRY_MS, executor.load.service_ms)
    gate.open()
    assert first.result().queue_ms > 0
    second.result()
    second.ask()


def test_one_edge_cannot_take_all_the_places(start: Start) -> None:
    executor = start()
    greedy, other = Edge(executor), Edge(executor)
    gate = Gate(executor)
    for _ in range(CLIENT_SHARE):
        greedy.submit()
    with pytest.raises(BusyError, match="of this edge"):
        greedy.submit()
    other.submit()
    gate.open()
    other.result()


def test_the_waiting_tasks_of_a_client_that_left_are_dropped(start: Start) -> None:
    executor = start()
    gone, other = Edge(executor), Edge(executor)
    gate = Gate(executor)
    for _ in range(3):
        gone.submit()
    other.submit()
    assert executor.drop(gone) == 3
    assert executor.drop(gone) == 0
    gate.open()
    other.result()
    for _ in range(3):
        with pytest.raises(CancelledError):
            gone.result()


def test_a_closing_executor_finishes_the_tasks_that_are_queued(start: Start) -> None:
    executor = start(workers=2)
    edge = Edge(executor)
    for _ in range(5):
        edge.submit()
    executor.close()
    assert [edge.result().arrays[0].shape for _ in range(5)] == [(1, 1000)] * 5
    with pytest.raises(NeurosurgeonError, match="stopping"):
        edge.submit()


def test_two_workers_compute_at_the_same_time(start: Start) -> None:
    executor = start(workers=2)
    together = threading.Barrier(2)
    waits = [executor.submit_job(lambda: together.wait(WAIT_S), name) for name in "ab"]
    assert sorted(wait.result(WAIT_S) for wait in waits) == [0, 1]


def test_workers_share_the_threads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    executor = start(threads=4, workers=2)
    assert executor.threads == 2
    assert executor.submit_job(torch.get_num_threads).result() == 2


# ---------------------------------------------------------------- batches


@pytest.fixture
def batch_sizes() -> list[int]:
    """The number of tasks of each run from now on."""
    CountedPartition.batch_sizes.clear()
    return CountedPartition.batch_sizes


@pytest.mark.parametrize(("model", "point"), [("le_net", 0), ("le_net", 9), ("mobile_net", 10), ("alex_net", 6)])
def test_a_batch_gives_each_task_the_result_that_it_gets_alone(
    start: Start, batch_sizes: list[int], model: str, point: int
) -> None:
    executor = start(max_batch=4)
    edges = [Edge(executor, model) for _ in range(4)]
    edge_partition = cut(load_network(model), point).edge
    inputs = [run(edge_partition, [random_input() * (n + 1)]).arrays for n in range(4)]
    copies = [[array.copy("K") for array in arrays] for arrays in inputs]
    alone = [edge.ask(point, arrays) for edge, arrays in zip(edges, copies, strict=True)]
    gate = Gate(executor)
    for edge, arrays in zip(edges, inputs, strict=True):
        edge.submit(point, arrays)
    gate.open()
    together = [edge.result() for edge in edges]
    assert batch_sizes == [1, 1, 1, 1, 4]
    for one, other in zip(alone, together, strict=True):
        assert_equal(other.arrays[0], one.arrays[0], same_setup=False)
    assert len({result.compute_ms for result in together}) == 1


def test_only_tasks_of_one_network_and_point_share_a_batch(start: Start, batch_sizes: list[int]) -> None:
    executor = start(max_batch=8)
    edge = Edge(executor)
    other_point = run(cut(load_network("le_net"), 1).edge, [random_input()]).arrays
    gate = Gate(executor)
    for _ in range(2):
        edge.submit()
    edge.submit(1, other_point)
    edge.submit()
    gate.open()
    for _ in range(4):
        edge.result()
    assert batch_sizes == [2, 1, 1]


def test_an_image_as_pixels_and_one_as_values_share_no_batch(start: Start, batch_sizes: list[int]) -> None:
    executor = start(max_batch=8)
    edge = Edge(executor)
    gate = Gate(executor)
    for array in (pixels(), pixels(), random_input()):
        edge.submit(0, [array])
    gate.open()
    outputs = [edge.result().arrays[0] for _ in range(3)]
    assert batch_sizes == [2, 1]
    for output in outputs:
        assert_equal(output, outputs[0], same_setup=False)


class MixesImages(nn.Module):
    """A partition whose output depends on the other images of the batch."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.softmax(dim=0),)


class KnowsOneImage(nn.Module):
    """A partition that takes one image for granted."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.reshape(1, -1).cumsum(1),)


class KeepsImagesApart(nn.Module):
    """A partition that may run as a batch."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.relu().sum(dim=1),)


class WantsOneImage(nn.Module):
    """A partition that checks it."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert len(x) == 1
        return (x.relu(),)


class AnswersYesOrNo(nn.Module):
    """A partition whose outputs have no magnitude."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x > 1,)


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (MixesImages(), [1, 1, 1]),
        (KnowsOneImage(), [1, 1, 1]),
        (WantsOneImage(), [1, 1, 1]),
        (AnswersYesOrNo(), [1, 1, 1]),
        (KeepsImagesApart(), [3]),
    ],
    ids=["mixes", "one image", "wants one", "yes or no", "apart"],
)
def test_tasks_share_a_batch_only_where_it_changes_no_output(
    start: Start, batch_sizes: list[int], module: nn.Module, sizes: list[int]
) -> None:
    executor = start(max_batch=4)
    partition: Partition = partition_of(module)
    arrays = [np.full((1, 5), number, np.float32) for number in range(3)]
    gate = Gate(executor)
    futures = [executor.submit("edge", partition, [array.copy()]) for array in arrays]
    gate.open()
    for array, future in zip(arrays, futures, strict=True):
        result = future.result(WAIT_S)
        assert_equal(result.arrays[0], as_array(module(as_tensor(array))[0]), same_setup=sizes != [3])
    assert batch_sizes == sizes


@pytest.mark.parametrize(("max_batch", "sizes"), [({"max_batch": 2}, [2, 2, 1]), ({}, [1, 1, 1])])
def test_a_batch_is_no_larger_than_allowed_on_a_cpu_one(
    start: Start, batch_sizes: list[int], max_batch: dict[str, int], sizes: list[int]
) -> None:
    executor = start(**max_batch)
    edge = Edge(executor)
    gate = Gate(executor)
    for _ in range(sum(sizes)):
        edge.submit()
    gate.open()
    for _ in range(sum(sizes)):
        edge.result()
    assert batch_sizes == sizes


def test_a_task_waits_for_others_only_until_the_batch_is_full(start: Start, batch_sizes: list[int]) -> None:
    executor = start(max_batch=2, batch_wait_ms=1e6)
    edges = [Edge(executor), Edge(executor)]
    for edge in edges:
        edge.submit()
    for edge in edges:
        edge.result()
    assert batch_sizes == [2]


def test_a_task_of_another_kind_ends_the_wait(start: Start, batch_sizes: list[int]) -> None:
    executor = start(max_batch=2, batch_wait_ms=1e6)
    edge = Edge(executor)
    edge.submit()
    assert executor.submit_job(lambda: 5).result() == 5
    edge.result()
    assert batch_sizes == [1]


def test_a_batch_that_fails_is_run_one_by_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    run_alone = CountedPartition.run

    def fail_together(partition: CountedPartition, arrays: Sequence[Array]) -> PartitionResult | None:
        if len(arrays[0]) > 1:
            raise RuntimeError("out of memory")
        return run_alone(partition, arrays)

    monkeypatch.setattr(CountedPartition, "run", fail_together)
    executor = start(max_batch=8)
    edge = Edge(executor)
    gate = Gate(executor)
    for _ in range(3):
        edge.submit()
    gate.open()
    assert [edge.result().arrays[0].shape for _ in range(3)] == [(1, 1000)] * 3


# ---------------------------------------------------------------- load


def test_the_load_has_the_waits_and_times_of_tasks(start: Start) -> None:
    executor = start()
    assert executor.load == Load()
    edge = Edge(executor)
    gate = Gate(executor)
    edge.submit()
    gate.open()
    result = edge.result()
    executor.close()
    load = executor.load
    assert load.service_ms >= result.compute_ms
    assert 0 < load.queue_ms <= result.queue_ms
