"""Names to models and weights: seeds that never change, files that fit or are refused, torchvision's checkpoints."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neurosurgeon.cli.process import ROOT
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.checkpoints import read_checkpoint
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.torchvision_compat import imagenet_labels, import_torchvision
from neurosurgeon.models.weights import seeded_state, weights_digest
from neurosurgeon.models.weights_sources import model_of_weights
from neurosurgeon.utils.errors import UnknownModelError, WeightsError
from tests.networks import load_network, model_graph, skeleton

State = dict[str, Tensor]

# The weights of the fixed seed never change: an edge and a cloud of different releases must agree.
PINNED_DIGESTS = {
    "le_net": "6d8faaae3d8ac755c8049a94b879c065",
    "mobile_net": "2dcba9035405681947fd978e023422c2",
}


@pytest.fixture
def state() -> State:
    """The parameters of a small network, different from those of the fixed seed."""
    made = seeded_state("le_net", skeleton("le_net"))
    made["classifier.4.bias"] = torch.arange(1000.0) / 1024
    return made


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def digest_of(path: Path, name: str = "le_net") -> str:
    """Return the weights digest of a network with a weights file."""
    return load_network(name, WeightsSource(path)).ref.weights_digest


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("alias", ["mobilenet", "mobile_net"])
def test_both_spellings_of_mobile_net_work(alias: str) -> None:
    assert Catalogue().canonical_name(alias) == "mobile_net"


def test_an_unknown_name_lists_known_ones() -> None:
    with pytest.raises(UnknownModelError, match="'resnet'.*alex_net, vgg_net, le_net, mobile_net"):
        Catalogue().canonical_name("resnet")


def test_an_engine_traces_a_model_once() -> None:
    assert model_graph("le_net") is model_graph("le_net")


def test_names_and_command_lines_do_not_import_torch() -> None:
    script = "import sys, neurosurgeon.models.weights, neurosurgeon.cli.edge; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


# ---------------------------------------------------------------- the fixed seed


@pytest.mark.parametrize("name", PINNED_DIGESTS)
def test_seeded_weights_never_change(name: str) -> None:
    assert load_network(name).ref.weights_digest == PINNED_DIGESTS[name]


def test_seeded_weights_are_the_same_in_every_process() -> None:
    script = (
        "from neurosurgeon.engine.torch_engine import TorchEngine\n"
        f"print(*(TorchEngine().open(name).ref.weights_digest for name in {list(PINNED_DIGESTS)}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120, capture_output=True, text=True
    )
    assert other.stdout.split() == list(PINNED_DIGESTS.values())


def test_seeded_weights_keep_the_scale_of_activations() -> None:
    state = seeded_state("mobile_net", skeleton("mobile_net"))
    weight = state["features.18.0.weight"]
    assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.01)  # He et al. 2015
    assert (state["features.0.1.running_var"] > 0).all()


# ---------------------------------------------------------------- the digest


def test_one_other_weight_makes_another_digest(state: State) -> None:
    before = weights_digest(state)
    state["features.3.weight"][0, 0, 0, 0] += 1e-6
    assert weights_digest(state) != before


def test_equal_bytes_of_another_shape_make_another_digest() -> None:
    assert weights_digest({"a": torch.zeros(2, 3)}) != weights_digest({"a": torch.zeros(3, 2)})


def test_the_digest_ignores_order_and_memory_layout(state: State) -> None:
    shuffled = dict(reversed(state.items()))
    shuffled["features.3.weight"] = shuffled["features.3.weight"].contiguous(memory_format=torch.channels_last)
    assert weights_digest(shuffled) == weights_digest(state)


def test_the_digest_ignores_the_counter_of_training_batches() -> None:
    state = {"norm.weight": torch.ones(3)}
    assert weights_digest({**state, "norm.num_batches_tracked": torch.tensor(7)}) == weights_digest(state)


# ---------------------------------------------------------------- weights files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "data-parallel", "both"],
)
def test_a_checkpoint_in_any_usual_wrapping_gives_its_weights(
    tmp_path: Path, state: State, wrap: Callable[[State], Any]
) -> None:
    assert digest_of(saved(tmp_path / "le_net.pt", wrap(state))) == weights_digest(state)


def test_a_safetensors_file_gives_its_weights(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "le_net.safetensors")
    assert digest_of(tmp_path / "le_net.safetensors") == weights_digest(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_as_float32(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "le_net.pt", {key: value.to(dtype) for key, value in state.items()})
    network = load_network("le_net", WeightsSource(path))
    assert network.ref.weights_digest == weights_digest({key: v.to(dtype).float() for key, v in state.items()})
    assert {parameter.dtype for parameter in network.module.parameters()} == {torch.float32}


def test_a_checkpoint_without_batch_counters_fits(tmp_path: Path) -> None:
    state = seeded_state("mobile_net", skeleton("mobile_net"))
    path = saved(tmp_path / "m.pt", {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")})
    assert digest_of(path, "mobile_net") == PINNED_DIGESTS["mobile_net"]


def without_bias(state: State) -> State:
    return {key: value for key, value in state.items() if key != "features.0.bias"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_bias, "features.0.bias is missing"),
        (lambda state: {**state, "classifier.4.bias": torch.zeros(10)}, r"shape \(10,\), expected \(1000,\)"),
        (lambda state: {**state, "head.weight": torch.zeros(1)}, "head.weight is not a parameter"),
        (lambda state: {}, "features.0.weight is missing"),
    ],
    ids=["missing key", "wrong shape", "extra key", "empty"],
)
def test_weights_that_do_not_fit_name_file_model_and_key(
    tmp_path: Path, state: State, change: Callable[[State], State], said: str
) -> None:
    path = saved(tmp_path / "odd.pt", change(state))
    with pytest.raises(WeightsError, match=rf"odd\.pt does not fit le_net: .*{said}"):
        load_network("le_net", WeightsSource(path))


@pytest.mark.parametrize("name", ["garbage.pt", "garbage.safetensors", "garbage"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name} (cannot be read|is empty)"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"lr": 0.1}, torch.zeros(3)])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(WeightsError, match=r"list\.pt holds no state_dict"):
        read_checkpoint(saved(tmp_path / "list.pt", content))


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=f"{name} does not exist"):
        read_checkpoint(tmp_path / name)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: Callable[[object, Path], Any]) -> None:
    path, proof = tmp_path / "bomb.pt", tmp_path / "ran"
    writer({"features.0.weight": Bomb(proof)}, path)
    with pytest.raises(WeightsError, match=r"bomb\.pt cannot be read"):
        read_checkpoint(path)
    assert not proof.exists()


def test_the_pickle_of_the_test_above_does_run_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["le_net", "mobile_net"])
def test_the_model_of_a_weights_file_is_found(tmp_path: Path, name: str) -> None:
    assert model_of_weights(Catalogue(), saved(tmp_path / "some.pt", seeded_state(name, skeleton(name)))) == name


def test_weights_of_no_model_list_the_known_models(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"other\.pt fits none of alex_net, vgg_net, le_net, mobile_net"):
        model_of_weights(Catalogue(), saved(tmp_path / "other.pt", {"w": torch.zeros(3)}))


# ---------------------------------------------------------------- torchvision's checkpoints


@pytest.fixture
def mobile_state() -> State:
    """A state in place of torchvision's checkpoint."""
    state = seeded_state("mobile_net", skeleton("mobile_net"))
    state["classifier.1.bias"] = torch.zeros(1000)
    return state


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], State]], None]:
    """Replace torchvision's download; it gives nothing to a caller that does not check its hash."""

    def replace(get: Callable[[], State]) -> None:
        enum = import_torchvision().MobileNet_V2_Weights
        monkeypatch.setattr(enum, "get_state_dict", lambda self, *, progress, check_hash: get() if check_hash else {})

    return replace


PRETRAINED = WeightsSource(pretrained=True)


def test_pretrained_weights_are_those_of_torchvision(
    downloads: Callable[[Callable[[], State]], None], mobile_state: State
) -> None:
    downloads(lambda: mobile_state)
    network = load_network.__wrapped__("mobile_net", PRETRAINED)  # not from the cache, and not into it
    assert network.ref.weights_digest == weights_digest(mobile_state) != PINNED_DIGESTS["mobile_net"]
    assert network.ref.labels == imagenet_labels()


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_names_the_address_to_fetch(
    downloads: Callable[[Callable[[], State]], None], error: Exception
) -> None:
    def fail() -> State:
        raise error

    downloads(fail)
    with pytest.raises(WeightsError, match=rf"{error}.*https://download\.pytorch\.org/\S+\.pth.*--weights"):
        load_network("mobile_net", PRETRAINED)


def test_no_pretrained_weights_names_the_models_with_them() -> None:
    with pytest.raises(WeightsError, match="le_net; it has them for alex_net, vgg_net, mobile_net"):
        load_network("le_net", PRETRAINED)


def official_name(path: Path, stem: str) -> Path:
    """Rename a file as torchvision names its own: with the start of its SHA-256."""
    return path.rename(path.with_name(f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


def test_torchvisions_checkpoint_is_known_by_its_hash(tmp_path: Path, mobile_state: State) -> None:
    path = official_name(saved(tmp_path / "download", mobile_state), "mobilenet_v2")
    assert load_network("mobile_net", WeightsSource(path)).ref.labels == imagenet_labels()


@pytest.mark.parametrize("name", ["mobilenet_v2-00000000.pth", "mobilenet_v2.pth", "mine.pt"])
def test_any_other_checkpoint_has_no_labels(tmp_path: Path, mobile_state: State, name: str) -> None:
    path = saved(tmp_path / name, mobile_state)
    assert load_network("mobile_net", WeightsSource(path)).ref.labels is None


def test_the_hash_alone_does_not_make_a_checkpoint_official(tmp_path: Path, mobile_state: State) -> None:
    path = official_name(saved(tmp_path / "download", mobile_state), "resnet50")
    assert load_network("mobile_net", WeightsSource(path)).ref.labels is None


def test_seeded_weights_have_no_labels() -> None:
    assert all(load_network(name).ref.labels is None for name in ("le_net", "mobile_net"))


def test_there_are_a_thousand_classes() -> None:
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert labels[0] == "tench"


def test_every_entry_of_the_zoo_is_a_model() -> None:
    assert set(ZOO) == {"alex_net", "vgg_net", "le_net", "mobile_net"}


@pytest.mark.parametrize("name", list(ZOO))
def test_the_number_of_layers_in_the_zoo_is_that_of_the_model(name: str) -> None:
    assert ZOO[name].layers == len(model_graph(name).layers)
