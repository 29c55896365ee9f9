"""Weights in the user's own modules: types, shared memory, extra states, and what is loaded before eval()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.weights import load_weights, weights_digest
from neurosurgeon.models.weights_sources import fitted_name
from neurosurgeon.utils.errors import WeightsError

NAME = "module:mine"


def fill(module: nn.Module, path: Path) -> nn.Module:
    """Load a file into a module, in place, as an engine does."""
    assert not load_weights(NAME, module, WeightsSource(path))
    return module


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module with other floating-point values than a new one."""
    module = make()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(0.5)
    return module


def saved(module: nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path)
    return path


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module with its floating-point tensors in another type; `Module.to` converts complex ones, too."""
    return module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


class Typed(nn.Module):
    """Holds a buffer of each kind of number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("index", torch.arange(3))
        self.register_buffer("narrow", torch.arange(3, dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("exact", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("turn", torch.tensor([1 + 2j]))
        self.register_buffer("none", torch.zeros(0, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_module_of_any_type_loads_its_own_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> nn.Module:
        return in_type(Typed(), dtype)

    module = trained(make)
    loaded = fill(make(), saved(module, tmp_path / "w.pth"))
    assert weights_digest(loaded.state_dict()) == weights_digest(module.state_dict())
    assert [tensor.dtype for tensor in loaded.buffers()] == [tensor.dtype for tensor in module.buffers()]


@pytest.mark.parametrize(("given", "own"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_floats_are_converted_to_those_of_the_module(tmp_path: Path, given: torch.dtype, own: torch.dtype) -> None:
    module = in_type(trained(Typed), given)
    expected = in_type(Typed(), own)
    expected.load_state_dict(module.state_dict())
    loaded = fill(in_type(Typed(), own), saved(module, tmp_path / "w.pth"))
    assert weights_digest(loaded.state_dict()) == weights_digest(expected.state_dict())


def changed(key: str, value: Tensor, path: Path) -> Path:
    torch.save({**Typed().state_dict(), key: value}, path)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("narrow", torch.arange(3)),
        ("index", torch.tensor([1, 0, 1], dtype=torch.uint8)),
        ("mask", torch.tensor([1, 0])),
    ],
)
def test_integers_of_another_type_keep_their_values(tmp_path: Path, key: str, value: Tensor) -> None:
    loaded = fill(Typed(), changed(key, value, tmp_path / "w.pth"))
    assert loaded.get_buffer(key).tolist() == value.tolist()
    assert loaded.get_buffer(key).dtype == Typed().get_buffer(key).dtype


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("head.weight", torch.ones(2, 3, dtype=torch.int8), "head.weight is torch.int8, expected floating-point"),
        ("head.weight", torch.ones(2, 3, dtype=torch.complex64), "head.weight is torch.complex64"),
        ("head.weight", torch.ones(2, 3).to_sparse(), "head.weight is sparse"),
        ("head.weight", torch.ones(2, 3, device="meta"), "head.weight is empty"),
        ("index", torch.ones(3), "index is torch.float32, expected torch.int64"),
        ("narrow", torch.tensor([0, 1, 2**40]), "narrow is torch.int64, expected torch.int32"),
        ("mask", torch.tensor([2, 0]), "mask is torch.int64, expected torch.bool"),
        ("turn", torch.ones(1), "turn is torch.float32, expected torch.complex64"),
        ("head.bias", torch.ones(4), r"head.bias has shape \(4,\), expected \(2,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_other_kinds_of_numbers_are_refused_by_name(tmp_path: Path, key: str, value: Tensor, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        fill(Typed(), changed(key, value, tmp_path / "w.pth"))


# ---------------------------------------------------------------- shared memory


class Shared(nn.Module):
    """Ties two weights, and reads one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.turned = self.embed.weight.t()


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    module = fill(Shared(), saved(trained(Shared), tmp_path / "w.pth"))
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.turned, module.embed.weight.t())
    assert module.turned.data_ptr() == module.embed.weight.data_ptr()


def test_tied_weights_that_are_written_once_are_not_missing(tmp_path: Path) -> None:
    module = trained(Shared)
    save_model(module, str(tmp_path / "w.safetensors"))
    loaded = fill(Shared(), tmp_path / "w.safetensors")
    assert torch.equal(loaded.head.weight, module.head.weight)


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path: Path) -> None:
    torch.save({"embed.weight": torch.zeros(4, 3), "head.weight": torch.ones(4, 3)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"embed\.weight and head\.weight are one tensor"):
        fill(Shared(), tmp_path / "w.pth")


def test_weights_that_only_look_equal_are_missing(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    twins = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.raises(WeightsError, match=r"1\.weight is missing"):
        fill(twins, tmp_path / "w.pth")


# ---------------------------------------------------------------- the module's own ways


class Adapter(nn.Module):
    """Merges its adapter into the weight when it is set to evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.update = nn.Parameter(torch.ones(2, 2))

    def train(self, mode: bool = True) -> Adapter:
        if self.training and not mode:
            self.weight.data += self.update.data
        return super().train(mode)


def test_weights_are_loaded_before_eval(tmp_path: Path) -> None:
    catalogue = Catalogue(modules={"mine": Adapter()})
    module = catalogue.build_module(NAME)
    assert module.training
    torch.save({"weight": torch.full((2, 2), 3.0), "update": torch.full((2, 2), 4.0)}, tmp_path / "w.pth")
    assert fitted_name(catalogue, NAME, tmp_path / "w.pth") == NAME
    assert fill(module, tmp_path / "w.pth").eval().weight.tolist() == [[7.0, 7.0], [7.0, 7.0]]


class WithExtraState(nn.Linear):
    """Keeps a scale beside its parameters."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(2, 2)
        self.scale = scale

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "table": torch.full((2,), self.scale)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]


def test_extra_states_are_loaded_and_digested(tmp_path: Path) -> None:
    module = WithExtraState(3.0)
    loaded = fill(WithExtraState(), saved(module, tmp_path / "w.pth"))
    assert isinstance(loaded, WithExtraState)
    assert loaded.scale == 3.0
    assert weights_digest(loaded.state_dict()) == weights_digest(module.state_dict())
    loaded.scale = 4.0
    assert weights_digest(loaded.state_dict()) != weights_digest(module.state_dict())


def test_a_missing_extra_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="_extra_state is missing"):
        fill(WithExtraState(), saved(nn.Linear(2, 2), tmp_path / "w.pth"))


class Strict(nn.Linear):
    """Loads a state in its own way, and refuses one of zeros."""

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        if not state["weight"].any():
            raise ValueError("weights of\nnothing")
        return super().load_state_dict(state, strict)


def test_a_module_may_load_in_its_own_way(tmp_path: Path) -> None:
    module = Strict(2, 2)
    assert torch.equal(fill(Strict(2, 2), saved(module, tmp_path / "w.pth")).weight, module.weight)
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth: module:mine does not load its weights: weights of nothing"):
        fill(Strict(2, 2), tmp_path / "w.pth")


def test_lazy_parameters_get_the_shapes_of_the_file(tmp_path: Path) -> None:
    loaded = fill(nn.LazyLinear(2), saved(nn.Linear(5, 2), tmp_path / "w.pth"))
    assert loaded.weight.shape == (2, 5)


def test_a_module_without_storage_gets_that_of_the_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    fill(module, saved(nn.Linear(2, 2).double(), tmp_path / "w.pth"))
    assert module.weight.device.type == "cpu"
    assert module.weight.dtype == torch.float32


@pytest.mark.parametrize("counter", [{}, {"num_batches_tracked": torch.tensor([7])}])
def test_counters_of_training_batches_do_not_matter(tmp_path: Path, counter: dict[str, Tensor]) -> None:
    state = {key: value for key, value in nn.BatchNorm2d(2).state_dict().items() if "num" not in key} | counter
    torch.save(state, tmp_path / "w.pth")
    fill(nn.BatchNorm2d(2), tmp_path / "w.pth")


# ---------------------------------------------------------------- the digest


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3.0]),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor(True),
        torch.tensor(3),
        torch.zeros(0, 3),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.ones(2, 3).t(),
    ],
)
def test_tensors_of_all_types_have_a_digest(value: Tensor) -> None:
    digest = weights_digest({"w": value})
    assert digest == weights_digest({"w": value.clone()})
    if value.numel():
        assert digest != weights_digest({"w": torch.zeros_like(value)})


@pytest.mark.parametrize("make", [lambda: torch.ones(2, 2).to_sparse(), lambda: torch.ones(2, device="meta")])
def test_tensors_without_bytes_are_refused_by_name(make: Callable[[], Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"part\.table has values that cannot be compared"):
        weights_digest({"part.table": make()})
