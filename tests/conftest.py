"""What tests share: one cloud process for all, a real photo, and networks built once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sklearn.datasets

from utils.cli import ServiceProcess


@pytest.fixture(scope="session")
def cloud_process() -> Iterator[ServiceProcess]:
    """A running cloud_api.py on free ports of loopback: ``ports[0]`` for tasks, ``ports[1]`` for bandwidth."""
    with ServiceProcess(["cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as process:
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
    """Where what takes seconds to make is kept for all tests: fitted forests, and the speed of this machine."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("forests", "speeds"):
        (cache / name).mkdir()
    return cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """Keep what tests learn out of the user's cache, and of each other's."""
    kept = tmp_path / "cache" / "neurosurgeon"
    kept.mkdir(parents=True)
    for shared in shared_cache.iterdir():
        (kept / shared.name).symlink_to(shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
