"""The engine: it computes what the whole network does, in a fair order, in batches, and within its bounds."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.cloud import executor
from neurosurgeon.cloud.executor import CLIENT_SHARE, CloudEngine, CloudResult, EngineLimits, WireSpec
from neurosurgeon.engine.torch_engine import HalfResult, random_input, run_half, run_whole, stand_in
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import TensorSpec
from neurosurgeon.models import zoo
from neurosurgeon.models.zoo import Cut, Network, load_network, model_graph
from neurosurgeon.net.messages import Request
from neurosurgeon.utils.errors import (
    BusyError,
    GraphError,
    NeurosurgeonError,
    PartitionError,
    ProtocolError,
    UnknownModelError,
    WeightsError,
)
from tests.equality import assert_equal

WAIT_S = 10.0  # a test that needs this long has hung
Start = Callable[..., CloudEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines that end with the test."""
    engines: list[CloudEngine] = []

    def start_one(**limits: Any) -> CloudEngine:
        engines.append(CloudEngine("cpu", 1, {}, EngineLimits(**limits)))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[CloudEngine]:
    engine = CloudEngine("cpu", 1, {})
    yield engine
    engine.close()


class Edge:
    """A client that collects its results."""

    def __init__(self, engine: CloudEngine, name: str = "edge", model: str = "le_net") -> None:
        self.engine, self.name = engine, name
        self.network = engine.network(model)
        self.results: deque[Future[CloudResult]] = deque()

    def submit(self, point: int = 0, tensors: Sequence[Tensor] | None = None) -> None:
        """Ask for a cloud half."""
        self.results.append(self.engine.submit(self, self.network.cut(point), tensors or [random_input()]))

    def result(self) -> CloudResult:
        """Return the next result."""
        return self.results.popleft().result(WAIT_S)

    def ask(self, point: int = 0, tensors: Sequence[Tensor] | None = None) -> CloudResult:
        """Return what a cloud half makes of tensors."""
        self.submit(point, tensors)
        return self.result()


class Gate:
    """Holds one worker until it is opened."""

    def __init__(self, engine: CloudEngine) -> None:
        self.reached, self._may_go_on = threading.Event(), threading.Event()
        self._job = engine.submit_job(self._hold, "gate")
        assert self.reached.wait(WAIT_S)

    def _hold(self) -> None:
        self.reached.set()
        assert self._may_go_on.wait(WAIT_S)

    def open(self) -> None:
        """Let the worker go on."""
        self._may_go_on.set()
        self._job.result(WAIT_S)


# ---------------------------------------------------------------- the answer


@pytest.mark.parametrize("point", [0, 1, 6, 11, 12])
def test_the_engine_computes_what_the_whole_network_does(engine: CloudEngine, point: int) -> None:
    network = load_network("le_net")
    crossing = run_half(network.cut(point).edge, [random_input()]).tensors
    result = Edge(engine).ask(point, crossing)
    assert_equal(result.tensors[0], run_whole(network, random_input()), same_setup=True)
    assert result.compute_ms >= 0
    assert result.queue_ms >= 0


def test_many_edges_at_once_all_get_their_own_answer(start: Start) -> None:
    engine = start(workers=3)
    inputs = [random_input() * (n + 1) for n in range(6)]
    alone = [Edge(engine).ask(0, [tensor]).tensors[0] for tensor in inputs]
    edges = [Edge(engine) for _ in inputs]
    for edge, tensor in zip(edges, inputs, strict=True):
        edge.submit(0, [tensor])
    together = [edge.result().tensors[0] for edge in edges]
    for one, other in zip(alone, together, strict=True):
        assert_equal(other, one, same_setup=True)


IMAGE = ("float32", (1, 3, 224, 224), False)


def request_of(network: Network, point: int = 0, **changes: Any) -> Request:
    """Return what asks for a cloud half."""
    graph = network.graph
    request = Request(network.name, pack_nodes(graph, graph.edge_nodes(point)), graph.digest, network.weights_digest)
    return request._replace(**changes)


def test_a_cut_that_was_asked_for_before_is_known(engine: CloudEngine) -> None:
    request = request_of(engine.network("le_net"))
    assert engine.cut(request, (IMAGE,)) is engine.cut(request, (IMAGE,))


def test_a_cut_is_known_only_as_long_as_its_network_is_warm(start: Start) -> None:
    engine = start(max_models=1)
    first = request_of(engine.network("le_net"))
    cut = engine.cut(first, (IMAGE,))
    engine.network("alex_net")
    assert engine.cut(first, (IMAGE,)) is not cut


def test_what_the_network_has_dropped_nobody_else_keeps(engine: CloudEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "MAX_CUTS", 2)
    monkeypatch.setattr(executor, "MAX_CUTS", 3)
    network = engine.network("le_net")
    asked = []
    for point in (1, 2, 3, 4):
        spec = network.cut(point).crossing[0]
        asked.append((request_of(network, point), ((spec.dtype, spec.shape, False),)))
    halves = [weakref.ref(engine.cut(*request).cloud) for request in asked]
    assert [half() is None for half in halves] == [True, True, False, False]
    assert len(engine._networks.asked("le_net")) <= 3
    assert engine.cut(*asked[0]) is network.cut(1)  # known, and made again


def test_the_cut_that_is_asked_for_most_often_stays(engine: CloudEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "MAX_CUTS", 2)
    network = engine.network("le_net")
    request = request_of(network)
    often = engine.cut(request, (IMAGE,))
    for point in (1, 2, 3, 4):
        network.cut(point)
        assert engine.cut(request, (IMAGE,)) is often


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "x_net"}, UnknownModelError),
        ({"graph_digest": "0" * 32}, GraphError),
        ({"weights_digest": "0" * 32}, WeightsError),
        ({"edge_nodes": b""}, PartitionError),
    ],
)
def test_what_does_not_fit_is_refused_however_often_the_right_one_was_asked_for(
    engine: CloudEngine, changes: dict[str, Any], error: type[Exception]
) -> None:
    request = request_of(engine.network("le_net"))
    engine.cut(request, (IMAGE,))
    for _ in range(2):
        with pytest.raises(error):
            engine.cut(request._replace(**changes), (IMAGE,))


@pytest.mark.parametrize(
    "given",
    [
        (IMAGE, IMAGE),
        (),
        (("float32", (1, 3, 224, 223), False),),
        (("float32", (2, 3, 224, 224), False),),
        (("float16", (1, 3, 224, 224), False),),
        (("int64", (1, 3, 224, 224), False),),
    ],
    ids=["two", "none", "width", "batch", "half", "integer"],
)
def test_tensors_that_do_not_cross_at_the_point_are_refused(engine: CloudEngine, given: tuple[WireSpec, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"\(1, 3, 224, 224\).*crosses at this point"):
        engine.cut(request_of(engine.network("le_net")), given)


@pytest.mark.parametrize("point", [-1, 13])
def test_a_point_that_the_model_does_not_have_is_refused(engine: CloudEngine, point: int) -> None:
    with pytest.raises(PartitionError):
        Edge(engine).submit(point)


def test_an_error_while_computing_belongs_to_whoever_asked(
    engine: CloudEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    edge = Edge(engine)
    with monkeypatch.context() as broken:
        broken.setattr(executor, "run_half", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            edge.ask()
    assert edge.ask().tensors[0].shape == (1, 1000)


def test_a_callback_that_fails_costs_no_worker(engine: CloudEngine, caplog: pytest.LogCaptureFixture) -> None:
    def fail(future: Future[CloudResult]) -> None:
        raise RuntimeError("nobody takes it")

    edge, gate = Edge(engine), Gate(engine)
    engine.submit(edge, edge.network.cut(0), [random_input()]).add_done_callback(fail)
    gate.open()
    assert edge.ask().tensors[0].shape == (1, 1000)
    assert caplog.text.count("RuntimeError: nobody takes it") == 1


def test_a_result_shares_no_memory_with_its_input(engine: CloudEngine) -> None:
    crossing = (TensorSpec((1, 5)),)
    cut = Cut(nn.Identity(), IsAView(), crossing, crossing)
    tensor = torch.ones(1, 5)
    result = engine.submit("edge", cut, [tensor]).result(WAIT_S)
    tensor.zero_()
    assert torch.equal(result.tensors[0], torch.ones(5))


class IsAView(nn.Module):
    """A half that computes nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x[0],)


def test_a_job_gets_a_worker_for_itself(engine: CloudEngine) -> None:
    assert engine.submit_job(lambda: threading.current_thread().name).result().startswith("compute")
    with pytest.raises(ZeroDivisionError):
        engine.submit_job(lambda: 1 / 0).result()


# ---------------------------------------------------------------- the queue


def test_edges_take_turns(start: Start) -> None:
    engine, order = start(), SimpleQueue[Hashable]()
    gate = Gate(engine)
    network = engine.network("le_net")
    for name in ("a", "a", "a", "b", "c"):
        future = engine.submit(name, network.cut(0), [random_input()])
        future.add_done_callback(lambda _, name=name: order.put(name))  # type: ignore[misc]
    gate.open()
    assert [order.get(timeout=WAIT_S) for _ in range(5)] == ["a", "b", "c", "a", "a"]


def test_a_full_queue_says_when_to_ask_again(start: Start) -> None:
    engine = start(max_queue=2)
    first, second = Edge(engine), Edge(engine)
    first.ask()
    gate = Gate(engine)
    first.submit()
    second.submit()
    with pytest.raises(BusyError, match="the cloud is busy: 2 tasks wait") as caught:
        second.submit()
    assert caught.value.retry_ms >= max(executor.MIN_RETRY_MS, engine.load.service_ms)
    gate.open()
    assert first.result().queue_ms > 0
    second.result()
    second.ask()


def test_one_edge_cannot_take_all_the_places(start: Start) -> None:
    engine = start()
    greedy, other = Edge(engine), Edge(engine)
    gate = Gate(engine)
    for _ in range(CLIENT_SHARE):
        greedy.submit()
    with pytest.raises(BusyError, match="of this edge"):
        greedy.submit()
    other.submit()
    gate.open()
    other.result()


def test_what_waits_for_a_client_that_left_is_dropped(start: Start) -> None:
    engine = start()
    gone, other = Edge(engine), Edge(engine)
    gate = Gate(engine)
    for _ in range(3):
        gone.submit()
    other.submit()
    assert engine.drop(gone) == 3
    assert engine.drop(gone) == 0
    gate.open()
    other.result()
    for _ in range(3):
        with pytest.raises(CancelledError):
            gone.result()


def test_a_closing_engine_finishes_what_is_queued(start: Start) -> None:
    engine = start(workers=2)
    edge = Edge(engine)
    for _ in range(5):
        edge.submit()
    engine.close()
    assert [edge.result().tensors[0].shape for _ in range(5)] == [(1, 1000)] * 5
    with pytest.raises(NeurosurgeonError, match="stopping"):
        edge.submit()


def test_two_workers_compute_at_the_same_time(start: Start) -> None:
    engine = start(workers=2)
    together = threading.Barrier(2)
    waits = [engine.submit_job(lambda: together.wait(WAIT_S), name) for name in "ab"]
    assert sorted(wait.result(WAIT_S) for wait in waits) == [0, 1]


def test_workers_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    engine = CloudEngine("cpu", 4, {}, EngineLimits(workers=2))
    assert engine.threads == 2
    assert engine.submit_job(torch.get_num_threads).result() == 2
    engine.close()


# ---------------------------------------------------------------- batches


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that is computed."""
    sizes: list[int] = []

    def counted(module: Any, tensors: Sequence[Tensor], device: str) -> HalfResult:
        sizes.append(len(tensors[0]))
        return run_half(module, tensors, device)

    monkeypatch.setattr(executor, "run_half", counted)
    return sizes


@pytest.mark.parametrize(("model", "point"), [("le_net", 0), ("le_net", 9), ("mobile_net", 10), ("alex_net", 6)])
def test_a_batch_gives_each_task_what_it_gets_alone(
    start: Start, batch_sizes: list[int], model: str, point: int
) -> None:
    engine = start(max_batch=4)
    edges = [Edge(engine, model=model) for _ in range(4)]
    edge_half = edges[0].network.cut(point).edge
    inputs = [run_half(edge_half, [random_input() * (n + 1)]).tensors for n in range(4)]
    alone = [edge.ask(point, tensors) for edge, tensors in zip(edges, inputs, strict=True)]
    gate = Gate(engine)
    for edge, tensors in zip(edges, inputs, strict=True):
        edge.submit(point, tensors)
    gate.open()
    together = [edge.result() for edge in edges]
    assert batch_sizes == [1, 1, 1, 1, 4]
    for one, other in zip(alone, together, strict=True):
        assert_equal(other.tensors[0], one.tensors[0], same_setup=False)
    assert len({result.compute_ms for result in together}) == 1


def test_only_tasks_of_one_network_and_point_share_a_batch(start: Start, batch_sizes: list[int]) -> None:
    engine = start(max_batch=8)
    edge = Edge(engine)
    other_point = run_half(edge.network.cut(1).edge, [random_input()]).tensors
    gate = Gate(engine)
    for _ in range(2):
        edge.submit()
    edge.submit(1, other_point)
    edge.submit()
    gate.open()
    for _ in range(4):
        edge.result()
    assert batch_sizes == [2, 1, 1]


def test_an_image_as_pixels_and_one_as_values_share_no_batch(start: Start, batch_sizes: list[int]) -> None:
    engine = start(max_batch=8)
    edge = Edge(engine)
    gate = Gate(engine)
    for tensor in (stand_in(), stand_in(), random_input()):
        edge.submit(0, [tensor])
    gate.open()
    answers = [edge.result().tensors[0] for _ in range(3)]
    assert batch_sizes == [2, 1]
    for answer in answers:
        assert_equal(answer, answers[0], same_setup=False)


class MixesImages(nn.Module):
    """A half whose answer depends on the other images of the batch."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.softmax(dim=0),)


class KnowsOneImage(nn.Module):
    """A half that takes one image for granted."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.reshape(1, -1).cumsum(1),)


class KeepsImagesApart(nn.Module):
    """A half that may run as a batch."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.relu().sum(dim=1),)


class WantsOneImage(nn.Module):
    """A network that says so."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert len(x) == 1
        return (x.relu(),)


class AnswersYesOrNo(nn.Module):
    """A network whose outputs have no magnitude."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x > 1,)


@pytest.mark.parametrize(
    ("half", "sizes"),
    [
        (MixesImages(), [1, 1, 1]),
        (KnowsOneImage(), [1, 1, 1]),
        (WantsOneImage(), [1, 1, 1]),
        (AnswersYesOrNo(), [1, 1, 1]),
        (KeepsImagesApart(), [3]),
    ],
    ids=["mixes", "one image", "wants one", "yes or no", "apart"],
)
def test_tasks_share_a_batch_only_where_it_changes_no_answer(
    start: Start, batch_sizes: list[int], half: nn.Module, sizes: list[int]
) -> None:
    engine = start(max_batch=4)
    crossing = (TensorSpec((1, 5)),)
    cut = Cut(nn.Identity(), half, crossing, crossing)
    tensors = [torch.full((1, 5), float(number)) for number in range(3)]
    gate = Gate(engine)
    futures = [engine.submit("edge", cut, [tensor.clone()]) for tensor in tensors]
    gate.open()
    for tensor, future in zip(tensors, futures, strict=True):
        result = future.result(WAIT_S)
        assert_equal(result.tensors[0], half(tensor)[0], same_setup=sizes != [3])
    assert batch_sizes == sizes


@pytest.mark.parametrize(("max_batch", "sizes"), [({"max_batch": 2}, [2, 2, 1]), ({}, [1, 1, 1])])
def test_a_batch_is_no_larger_than_allowed_on_a_cpu_one(
    start: Start, batch_sizes: list[int], max_batch: dict[str, int], sizes: list[int]
) -> None:
    engine = start(**max_batch)
    edge = Edge(engine)
    gate = Gate(engine)
    for _ in range(sum(sizes)):
        edge.submit()
    gate.open()
    for _ in range(sum(sizes)):
        edge.result()
    assert batch_sizes == sizes


def test_a_task_waits_for_others_only_until_the_batch_is_full(start: Start, batch_sizes: list[int]) -> None:
    engine = start(max_batch=2, batch_wait_ms=1e6)
    edges = [Edge(engine), Edge(engine)]
    for edge in edges:
        edge.submit()
    for edge in edges:
        edge.result()
    assert batch_sizes == [2]


def test_a_task_of_another_kind_ends_the_wait(start: Start, batch_sizes: list[int]) -> None:
    engine = start(max_batch=2, batch_wait_ms=1e6)
    edge = Edge(engine)
    edge.submit()
    assert engine.submit_job(lambda: 5).result() == 5
    edge.result()
    assert batch_sizes == [1]


def test_a_batch_that_fails_is_run_one_by_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_together(module: Any, tensors: Sequence[Tensor], device: str) -> HalfResult:
        if len(tensors[0]) > 1:
            raise RuntimeError("out of memory")
        return run_half(module, tensors, device)

    monkeypatch.setattr(executor, "run_half", fail_together)
    engine = start(max_batch=8)
    edge = Edge(engine)
    gate = Gate(engine)
    for _ in range(3):
        edge.submit()
    gate.open()
    assert [edge.result().tensors[0].shape for _ in range(3)] == [(1, 1000)] * 3


# ---------------------------------------------------------------- networks


def test_a_network_is_loaded_once(engine: CloudEngine) -> None:
    assert engine.network("le_net") is engine.network("lenet")


def test_a_model_that_does_not_exist_is_refused(engine: CloudEngine) -> None:
    with pytest.raises(UnknownModelError):
        engine.network("resnet")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all networks that engines load, which are those of this process."""
    names: list[str] = []

    def build(name: str, *args: Any) -> Network:
        names.append(name)
        return load_network(name, *args)

    monkeypatch.setattr(executor, "build_network", build)
    return names


def test_the_network_not_used_for_longest_goes(start: Start, built: list[str]) -> None:
    engine = start(max_models=2)
    for name in ("le_net", "alex_net", "le_net", "mobile_net", "le_net", "alex_net"):
        engine.network(name)
    assert built == ["le_net", "alex_net", "mobile_net", "alex_net"]


def test_a_network_that_waits_to_run_lives_on(start: Start, built: list[str]) -> None:
    engine = start(max_models=1)
    edge = Edge(engine)
    gate = Gate(engine)
    edge.submit()
    engine.network("mobile_net")
    gate.open()
    assert edge.result().tensors[0].shape == (1, 1000)
    assert built == ["le_net", "mobile_net"]


def test_only_what_is_served_is_built(start: Start, built: list[str], traced: list[str]) -> None:
    engine = start(models=("resnet18", "mobile_net@64"))
    assert traced == ["resnet18", "mobile_net@64"]  # before anybody asks
    for name in (
        "alex_net",
        "resnet18@64",
        "le_net",
        "vit_h_14",
        "no_net",
        "nets:mine",
        "../x",
        "le_net@0",
        "x" * 2000,
    ):
        with pytest.raises(UnknownModelError, match=r"does not serve .*: choose from resnet18, mobile_net@64$"):
            engine.network(name)
        with pytest.raises(UnknownModelError):
            engine.graph(name, "0" * 32)
    assert (len(traced), built) == (2, [])
    assert engine.network("mobilenet@64").name == "mobile_net@64"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all networks that engines trace."""
    names: list[str] = []

    def trace(name: str) -> LayerGraph:
        names.append(name)
        return model_graph(name)

    monkeypatch.setattr(executor, "model_graph", trace)
    return names


# ---------------------------------------------------------------- load


def test_the_load_tells_what_tasks_waited_and_took(start: Start) -> None:
    engine = start()
    assert (engine.load.queue_ms, engine.load.service_ms) == (0.0, 0.0)
    edge = Edge(engine)
    gate = Gate(engine)
    edge.submit()
    gate.open()
    result = edge.result()
    engine.close()
    load = engine.load
    assert load.service_ms >= result.compute_ms
    assert 0 < load.queue_ms <= result.queue_ms


def test_graphs_that_peers_ask_for_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "MAX_GRAPHS", 2)
    engine = start(models=("le_net",))
    monkeypatch.setattr(engine, "_served", lambda name: name)
    own = len(engine._graphs)
    for _ in range(2):
        for pixels in (33, 34, 35):
            name = f"mobile_net@{pixels}"
            assert engine.graph(name, model_graph(name).digest).model == name
            assert len(engine._graphs) <= own + 2
    assert "le_net" in engine._graphs
