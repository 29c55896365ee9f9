"""The networks and partitions of a cloud: each is made once, the least recently used go, and wrong requests fail."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from neurosurgeon.cloud import store as store_module
from neurosurgeon.cloud.executor import Executor
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.engine import torch_engine
from neurosurgeon.engine.base import SEEDED, WeightsSource
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.spec import Array
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.net.messages import Request
from neurosurgeon.utils.errors import (
    GraphError,
    PartitionError,
    ProtocolError,
    UnknownModelError,
    WeightsError,
)
from tests.networks import Network, cut, load_network, model_graph, random_input, run

IMAGE = np.zeros((1, 3, 224, 224), np.float32)


class WatchedEngine(TorchEngine):
    """An engine that notes the networks that it traces and opens, which are those of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.traced: list[str] = []
        self.opened: list[str] = []

    def graph(self, name: str) -> TracedGraph:
        if not self.has_graph(name):
            self.traced.append(name)
        return super().graph(name)

    def open(self, name: str, weights: WeightsSource = SEEDED) -> Network:
        self.opened.append(name)
        return load_network(name)  # the same object for every store


class Store(NetworkStore):
    """A store with an engine and an executor of its own."""

    def __init__(self, **options: Any) -> None:
        self.engine = WatchedEngine()
        self.executor = Executor(self.engine)
        super().__init__(self.executor, {}, **options)


Start = Callable[..., Store]


@pytest.fixture
def start() -> Iterator[Start]:
    """Make stores whose workers end with the test."""
    stores: list[Store] = []

    def start_one(**options: Any) -> Store:
        stores.append(Store(**options))
        return stores[-1]

    yield start_one
    for one in stores:
        one.executor.close()


@pytest.fixture
def store(start: Start) -> Store:
    return start()


def request_of(network: Network, point: int = 0, **changes: Any) -> Request:
    """Return the request for a cloud partition."""
    graph = network.graph
    mask = pack_nodes(graph, graph.edge_nodes(point))
    return Request(network.ref.name, mask, graph.digest, network.ref.weights_digest)._replace(**changes)


def task_at(network: Network, point: int) -> tuple[Request, Sequence[Array]]:
    """Return a request and its boundary tensors."""
    return request_of(network, point), run(cut(network, point).edge, [random_input()]).arrays


# ---------------------------------------------------------------- partitions


def test_a_partition_that_was_asked_for_before_is_known(store: Store, network: Network) -> None:
    request = request_of(network)
    assert store.partition(request, [IMAGE]) is store.partition(request, [IMAGE])


def test_a_partition_that_was_prepared_is_known(
    store: Store, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(network)
    assert store.prepare(request.preparation) == network.ref.weights_digest
    monkeypatch.setattr(torch_engine.TorchNetwork, "partition", None)
    assert store.partition(request, [IMAGE]).network is network.ref


def test_a_partition_is_known_only_as_long_as_its_network_is_in_memory(start: Start, network: Network) -> None:
    store = start(max_models=1)
    first = request_of(network)
    partition = store.partition(first, [IMAGE])
    store.network("alex_net")
    assert store.partition(first, [IMAGE]) is not partition


def test_partitions_that_were_dropped_are_kept_nowhere_else(
    store: Store, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PARTITIONS", 2)
    tasks = [task_at(network, point) for point in (1, 2, 3, 4)]
    partitions = [weakref.ref(store.partition(*task)) for task in tasks]
    assert [partition() is None for partition in partitions] == [True, True, False, False]
    assert store.partition(*tasks[3]) is partitions[3]()
    assert store.partition(*tasks[0]).edge_nodes == network.graph.edge_nodes(1)  # made again


def test_the_partition_that_is_asked_for_most_often_stays(
    store: Store, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PARTITIONS", 2)
    request = request_of(network)
    often = store.partition(request, [IMAGE])
    for point in (1, 2, 3, 4):
        store.partition(*task_at(network, point))
        assert store.partition(request, [IMAGE]) is often


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "x_net"}, UnknownModelError),
        ({"graph_digest": "0" * 32}, GraphError),
        ({"weights_digest": "0" * 32}, WeightsError),
        ({"edge_nodes": b""}, PartitionError),
    ],
)
def test_a_wrong_request_is_refused_however_often_the_right_one_was_asked_for(
    store: Store, network: Network, changes: dict[str, Any], error: type[Exception]
) -> None:
    request = request_of(network)
    store.partition(request, [IMAGE])
    for _ in range(2):
        with pytest.raises(error):
            store.partition(request._replace(**changes), [IMAGE])


@pytest.mark.parametrize(
    "arrays",
    [
        [IMAGE, IMAGE],
        [],
        [IMAGE[..., 1:]],
        [np.zeros((2, 3, 224, 224), np.float32)],
        [IMAGE.astype("float16")],
        [IMAGE.astype("int64")],
    ],
    ids=["two", "none", "width", "batch", "float16", "integer"],
)
def test_arrays_that_are_no_boundary_tensors_of_the_cut_are_refused(
    store: Store, network: Network, arrays: list[Array]
) -> None:
    request = request_of(network)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"of this cut: expected .*\(1, 3, 224, 224\).*, got \["):
            store.partition(request, arrays)


# ---------------------------------------------------------------- networks


def test_a_network_is_loaded_once(store: Store) -> None:
    assert store.network("le_net") is store.network("lenet")
    assert store.engine.opened == ["le_net"]


def test_a_model_that_does_not_exist_is_refused(store: Store) -> None:
    with pytest.raises(UnknownModelError):
        store.network("resnet")


def test_the_network_not_used_for_longest_goes(start: Start) -> None:
    store = start(max_models=2)
    for name in ("le_net", "alex_net", "le_net", "mobile_net", "le_net", "alex_net"):
        store.network(name)
    assert store.engine.opened == ["le_net", "alex_net", "mobile_net", "alex_net"]


def test_a_network_that_waits_to_run_lives_on(start: Start, network: Network) -> None:
    store = start(max_models=1)
    result = store.executor.submit("edge", store.partition(request_of(network), [IMAGE]), [random_input()])
    store.network("mobile_net")
    assert result.result().arrays[0].shape == (1, 1000)
    assert store.engine.opened == ["le_net", "mobile_net"]


def test_only_a_network_that_is_served_is_built(start: Start) -> None:
    store = start(served=("resnet18", "mobile_net@64"))
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
            store.network(name)
        with pytest.raises(UnknownModelError):
            store.graph(name, "0" * 32)
    assert (store.engine.traced, store.engine.opened) == ([], [])
    assert store.network("mobilenet@64").ref.name == "mobile_net@64"


def test_graphs_that_peers_ask_for_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "MAX_GRAPHS", 2)
    for _ in range(2):
        for size in (33, 34, 35):
            name = f"mobile_net@{size}"
            assert store.graph(name, model_graph(name).digest).model == name
            assert len(store.engine._graphs) <= 2
    assert store.engine.has_graph("mobile_net@35")
