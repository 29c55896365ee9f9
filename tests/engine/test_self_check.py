"""The check before a network's first answer: wrong programs are refused, rounding is not, and a result is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.engine import self_check, torch_engine
from neurosurgeon.engine.base import Partition, PartitionResult, Side
from neurosurgeon.engine.self_check import check, observe, verify
from neurosurgeon.engine.torch_engine import TorchEngine, TorchNetwork
from neurosurgeon.graph.compare import TOLERANCE, difference
from neurosurgeon.graph.spec import Array
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.preprocess import as_array
from neurosurgeon.models.program import Example
from neurosurgeon.utils.errors import MismatchError
from tests.equality import assert_equal
from tests.networks import cut, run, run_whole

INPUT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
IMAGES = as_array(INPUT)


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Check every network of these tests; return the directory of kept results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    return tmp_path / "empty" / "neurosurgeon" / "checks"


class Calls(nn.Module):
    """A convolution, and a function of what it makes."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.norm(self.conv(x)))


def opened(module: nn.Module) -> TorchNetwork:
    """Return a module of a user, opened as any network."""
    return TorchEngine(Catalogue(modules={"own": module}, examples={"own": INPUT})).open("module:own")


def fails_to_export() -> None:
    if torch.compiler.is_exporting():
        raise NotImplementedError


# ---------------------------------------------------------------- wrong programs


def doubles_when_traced(self: Any, x: Tensor) -> Tensor:
    return x * 2 if torch.compiler.is_exporting() else x


def doubles_other_types(self: Any, x: Tensor) -> Tensor:
    fails_to_export()
    return x if type(x) is Tensor else x * 2


@pytest.mark.parametrize(
    ("forward", "tracer", "cause"),
    [
        (doubles_when_traced, "torch.export", "makes numbers of tensors"),
        (doubles_other_types, "torch.fx", "decides by the type of its arguments"),
    ],
)
def test_a_wrong_program_is_refused_with_the_probable_cause(
    forward: Callable[..., Tensor], tracer: str, cause: str, nothing_is_kept: Path
) -> None:
    said = f"module:own, traced by {tracer}, computes something else .* differ by 1 of the largest value.*{cause}"
    with pytest.raises(MismatchError, match=said) as caught:
        opened(Calls(forward))
    assert "\n" not in str(caught.value)
    assert not nothing_is_kept.exists()


def test_a_wrong_program_is_refused_with_the_first_part_that_differs() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Calls(doubles_when_traced), nn.ReLU())
    with pytest.raises(MismatchError, match=r"first in 1 \(Calls\)"):
        opened(model)


class WithoutCuts:
    """A network that is right whole, and wrong at every cut."""

    def __init__(self, network: TorchNetwork) -> None:
        self._network = network
        self.graph, self.module, self.build = network.graph, network.module, network.build

    def partition(self, edge_nodes: frozenset[int], side: Side) -> Partition:
        partition: Any = self._network.partition(edge_nodes, side)
        if side is Side.EDGE:
            return partition  # type: ignore[no-any-return]

        class Wrong:
            def run(self, arrays: list[Array]) -> PartitionResult:
                result = partition.run(arrays)
                return PartitionResult(tuple(array + 1 for array in result.arrays), result.compute_ms)

        wrong: Any = Wrong()
        return wrong  # type: ignore[no-any-return]


def test_a_wrong_cut_is_refused() -> None:
    network = opened(Calls(lambda self, x: torch.relu(x).tanh()))
    example = Example.of(INPUT)
    truth = observe(network.build(), "own", network.graph, example)
    check(network, truth)
    with pytest.raises(MismatchError, match=r"module:own cut after \w+ gives another answer than whole"):
        check(WithoutCuts(network), truth)


# ---------------------------------------------------------------- state


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return x * self.calls


def appends(self: Any, x: Tensor) -> Tensor:
    self.seen.append(1)
    return x * len(self.seen)


def adds(self: Any, x: Tensor) -> Tensor:
    self.total.add_(x[0, 0, 0])
    return x + self.total


@pytest.mark.parametrize(
    ("forward", "attributes"), [(counts, {"calls": 0}), (appends, {"seen": []}), (adds, {"total": torch.zeros(8)})]
)
def test_state_is_refused_with_the_name_of_the_attribute(
    forward: Callable[..., Tensor], attributes: dict[str, Any]
) -> None:
    (name,) = attributes
    said = f"another answer when it runs again .*forward changes its attribute 0.{name}; pass that as an input"
    with pytest.raises(MismatchError, match=said):
        opened(nn.Sequential(Calls(forward, **attributes)))


def test_state_outside_of_the_module_is_refused() -> None:
    seen: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(1)
        return x * len(seen)

    with pytest.raises(MismatchError, match=r"forward \(.*test_self_check.py, line \d+\) keeps state"):
        opened(Calls(forward))


def test_state_that_no_answer_depends_on_is_accepted() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2

    opened(Calls(forward, calls=0))


def test_another_structure_of_the_answer_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return {"traced": x} if torch.compiler.is_exporting() else {"eager": x}

    with pytest.raises(MismatchError, match="another structure than when it was traced"):
        opened(Calls(forward))


# ---------------------------------------------------------------- rounding


def test_a_network_that_enlarges_rounding_is_accepted() -> None:
    network = opened(Calls(lambda self, x: torch.sin(x * 1e5)))
    whole, own = run_whole(network, IMAGES), network.run_whole([IMAGES])[0]
    assert difference(own, whole).relative > TOLERANCE  # by the folded norm alone
    verdict = network.verify([IMAGES], [whole])
    assert verdict.is_equal
    assert verdict.relative > TOLERANCE


def test_a_wrong_network_that_enlarges_rounding_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.sin((x + 0.1 if torch.compiler.is_exporting() else x) * 1e5)

    with pytest.raises(MismatchError, match="computes something else"):
        opened(Calls(forward))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_with_few_digits_are_accepted(dtype: torch.dtype) -> None:
    model = Calls(lambda self, x: torch.relu(x)).to(dtype)
    network = TorchEngine(Catalogue(modules={"own": model}, examples={"own": INPUT.to(dtype)})).open("module:own")
    assert network.graph.outputs[0].spec.dtype == str(dtype).removeprefix("torch.")


def test_outputs_that_are_not_finite_are_compared() -> None:
    opened(Calls(lambda self, x: torch.log(x)))  # NaN where it is negative


# ---------------------------------------------------------------- memory order


def test_a_network_that_needs_its_own_memory_order_keeps_it(nothing_is_kept: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        fails_to_export()  # torch.fx keeps the view, which takes no channels-last tensor
        return torch.relu(x).view(1, -1)

    model = Calls(forward)
    for _ in range(2):  # checked, and from the kept result
        network = opened(model)
        assert not network.shared.channels_last
        edge, cloud = cut(network, 1)
        output = run(cloud, run(edge, [IMAGES]).arrays).arrays[0]
        assert_equal(output, network.run_whole([IMAGES])[0], same_setup=False)
    assert [file.read_text() for file in nothing_is_kept.iterdir()] == ["contiguous\n"]


# ---------------------------------------------------------------- kept results


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that were checked."""
    names: list[str] = []

    def note(module: nn.Module, name: str, *others: Any) -> Any:
        names.append(name)
        return observe(module, name, *others)

    monkeypatch.setattr(torch_engine, "observe", note)
    return names


def relu(self: Any, x: Tensor) -> Tensor:
    return torch.relu(x)


def relu_by_a_hook(self: Any, x: Tensor) -> Tensor:
    y = torch.relu(x)
    return y  # noqa: RET504  # the same program of other code


def test_an_equal_network_is_checked_once(checked: list[str]) -> None:
    one, other = opened(Calls(relu)), opened(Calls(relu))
    assert checked == ["module:own"]
    assert_equal(run_whole(one, IMAGES), run_whole(other, IMAGES), same_setup=True)


def test_other_weights_are_checked(checked: list[str]) -> None:
    other = Calls(relu)
    nn.init.ones_(other.conv.weight)
    opened(Calls(relu)), opened(other)
    assert len(checked) == 2


def test_other_code_is_checked(checked: list[str]) -> None:
    assert opened(Calls(relu)).graph.digest == opened(Calls(relu_by_a_hook)).graph.digest
    assert len(checked) == 2


def test_a_check_of_another_release_is_not_believed(checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened(Calls(relu))
    monkeypatch.setattr(self_check, "_code_digest", lambda: "another")
    opened(Calls(relu))
    assert len(checked) == 2


def test_a_result_that_cannot_be_kept_is_no_error(
    checked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    opened(Calls(relu)), opened(Calls(relu))
    assert len(checked) == 2
    assert "the check of the network cannot be kept" in caplog.text


# ---------------------------------------------------------------- --verify


def test_verify_compares_with_the_users_module() -> None:
    network = opened(Calls(lambda self, x: (torch.relu(x), x.argmax())))
    right = network.run_whole([IMAGES])
    assert verify(network, [INPUT], right) == (0.0, 0.0, True)
    wrong = (right[0].copy(), right[1])
    wrong[0].flat[3] += 1.0
    verdict = network.verify([IMAGES], wrong)
    assert not verdict.is_equal
    assert verdict.max_abs_diff == pytest.approx(1.0)
    assert verdict.relative == pytest.approx(1.0 / right[0].max())
    assert not network.verify([IMAGES], right[:1]).is_equal
    assert not network.verify([IMAGES], (right[0], np.array(right[1] + 1))).is_equal
