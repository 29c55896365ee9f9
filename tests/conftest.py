"""Fixtures of all tests: one cloud process, a real photo, and networks built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sklearn.datasets
import torch

from neurosurgeon.cli.process import ServiceProcess
from tests.equality import THREADS

torch.set_num_threads(THREADS)  # before any fixture computes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Begin every test with one thread, whatever tests before it, and the scripts they ran here, have set."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def cloud_process() -> Iterator[ServiceProcess]:
    """A running cloud_api.py on free ports of loopback: ``ports[0]`` for tasks, ``ports[1]`` for bandwidth.

    It computes with as many threads as the tests, so that its answers have the same bits.
    """
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", str(THREADS)]
    with ServiceProcess(command, services=2) as process:
        yield process


@pytest.fixture(scope="session")
def cloud(cloud_process: ServiceProcess) -> ServiceProcess:
    """The running cloud; some tests have another one under this name."""
    return cloud_process


@pytest.fixture
def address(cloud: ServiceProcess) -> list[str]:
    """The flags that lead an edge to the running cloud."""
    return ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]


@pytest.fixture(scope="session")
def photo() -> Path:
    """A real photo that ships inside scikit-learn."""
    return Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of values that take seconds to make: forests, the speed of this machine, checks of networks."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("forests", "speeds", "checks"):
        (cache / name).mkdir()
    return cache


@pytest.fixture(scope="session", autouse=True)
def cache_of_shared_clouds(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[None]:
    """Keep the clouds that several tests share, which start before `own_cache`, out of the user's cache, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(make_cache(tmp_path_factory.mktemp("clouds"), shared_cache)))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))  # no collection of the user's is read
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """Give each test a cache of its own, apart from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(make_cache(tmp_path, shared_cache)))


def make_cache(directory: Path, shared_cache: Path) -> Path:
    """Make a cache directory with the shared values of all tests; return its value of ``XDG_CACHE_HOME``."""
    kept = directory / "cache" / "neurosurgeon"
    kept.mkdir(parents=True)
    for shared in shared_cache.iterdir():
        (kept / shared.name).symlink_to(shared)
    return directory / "cache"
