"""Numbers of classes: in the names of networks, in weights files, and on command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.names import Catalogue, NameParts, name_parts
from neurosurgeon.models.weights import check_pretrained, seeded_state
from neurosurgeon.models.weights_sources import WeightsSources, fitted_name, model_of_weights, parse_weights
from neurosurgeon.utils.errors import UsageError, WeightsError
from tests.networks import ENGINE, load_network, model_graph, skeleton

CATALOGUE = Catalogue()


@pytest.fixture(scope="module")
def of_ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of le_net with ten classes, as a training loop writes it."""
    path = tmp_path_factory.mktemp("weights") / "ten.pth"
    state = seeded_state("trained", skeleton("le_net#10"))
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("lenet#10", "le_net#10"),
        ("le_net#1000", "le_net"),
        ("le_net@224#10", "le_net#10"),
        ("le_net@64#10", "le_net@64#10"),
        ("resnet18#1000", "resnet18"),
        ("fcn_resnet50#21", "fcn_resnet50"),
        ("fcn_resnet50#1000", "fcn_resnet50#1000"),
    ],
)
def test_a_usual_number_of_classes_is_left_out(name: str, canonical: str) -> None:
    assert CATALOGUE.canonical_name(name) == canonical


@pytest.mark.parametrize("name", ["le_net#0", "le_net#", "le_net#ten", "le_net#10@64", "le_net#1#2", "le_net#100000"])
def test_a_senseless_number_of_classes_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no number of classes: choose 1 to 32768"):
        CATALOGUE.canonical_name(name)


def test_the_parts_of_a_name() -> None:
    assert name_parts("resnet18@64#10") == NameParts("resnet18", 64, 10)
    assert str(NameParts("resnet18", None, 10)) == "resnet18#10"


def test_the_flag_gives_the_number_once() -> None:
    assert CATALOGUE.choose("lenet", 64, 10) == "le_net@64#10"
    with pytest.raises(UsageError, match="names a number of classes already"):
        CATALOGUE.choose("lenet#10", None, 10)


def test_the_users_own_network_has_its_own_classes() -> None:
    own = Catalogue(modules={"mine": torch.nn.Linear(2, 2)})
    with pytest.raises(UsageError, match="module:mine has the classes that its function gives it"):
        own.choose("mine", None, 10)


@pytest.mark.parametrize("name", ["alex_net", "mobile_net", "squeezenet1_1", "vit_b_16", "googlenet"])
def test_networks_are_built_with_other_numbers_of_classes(name: str) -> None:
    shapes = [
        {key: tuple(value.shape) for key, value in skeleton(each).state_dict().items()} for each in (name, f"{name}#7")
    ]
    assert {shapes[1][key][0] for key in shapes[0] if shapes[0][key] != shapes[1][key]} == {7}


def test_another_number_of_classes_is_another_graph() -> None:
    ten = model_graph("le_net#10")
    assert ten.digest != model_graph("le_net").digest
    assert ten.outputs[0].spec.shape == (1, 10)


# ---------------------------------------------------------------- files


def test_a_file_names_the_number_of_its_classes(of_ten: Path) -> None:
    assert fitted_name(CATALOGUE, "le_net", of_ten) == "le_net#10"
    assert fitted_name(CATALOGUE, "le_net@64", of_ten) == "le_net@64#10"
    assert model_of_weights(CATALOGUE, of_ten) == "le_net#10"


@pytest.mark.parametrize("name", ["mobile_net", "squeezenet1_1"])
def test_the_last_layer_may_be_of_any_kind(tmp_path: Path, name: str) -> None:
    torch.save(seeded_state("trained", skeleton(f"{name}#3")), tmp_path / "w.pth")
    assert fitted_name(CATALOGUE, name, tmp_path / "w.pth") == f"{name}#3"


def test_a_given_number_of_classes_is_not_changed(of_ten: Path) -> None:
    assert fitted_name(CATALOGUE, "le_net#10", of_ten) == "le_net#10"
    with pytest.raises(WeightsError, match=r"has shape \(10, \d+\), expected \(9, \d+\)"):
        fitted_name(CATALOGUE, "le_net#9", of_ten)


@pytest.mark.parametrize("changed", ["classifier.4.bias", "features.0.weight"])
def test_files_that_differ_in_more_are_refused(tmp_path: Path, changed: str) -> None:
    state = seeded_state("trained", skeleton("le_net#10"))
    torch.save(state | {changed: torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth does not fit le_net: .* has shape"):
        fitted_name(CATALOGUE, "le_net", tmp_path / "w.pth")


def test_an_engine_names_the_network_that_fits(of_ten: Path) -> None:
    with pytest.raises(WeightsError, match=r"it may fit le_net#10: pass --classes, or that name"):
        ENGINE.open("le_net", WeightsSource(of_ten))
    ref = load_network("le_net#10", WeightsSource(of_ten)).ref
    assert ref.weights_digest != load_network("le_net#10").ref.weights_digest
    assert (ref.is_seeded, ref.labels) == (False, None)


def test_only_the_fixed_seed_is_untrained(of_ten: Path) -> None:
    from neurosurgeon.engine.torch_engine import TorchEngine

    assert load_network("le_net").ref.is_seeded
    own = TorchEngine(Catalogue(modules={"mine": torch.nn.Conv2d(3, 1, 1)}))
    assert not own.open("mine").ref.is_seeded


def test_pretrained_weights_have_the_usual_classes() -> None:
    with pytest.raises(WeightsError, match="torchvision's weights of resnet18 have 1000 classes"):
        check_pretrained("resnet18#10")


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize("text", ["{}", "lenet={}", "le_net#10={}"])
def test_weights_of_a_command_line_name_their_network(of_ten: Path, text: str) -> None:
    sources = parse_weights(CATALOGUE, [text.format(of_ten)], pretrained=False)
    assert [sources.named(name) for name in ("le_net", "le_net@64", "le_net#7", "resnet18")] == [
        "le_net#10",
        "le_net@64#10",
        "le_net#7",
        "resnet18",
    ]
    assert sources["le_net@64#10"].file == sources["le_net#10"].file == of_ten
    assert sources["le_net"].file is None


def test_files_of_two_numbers_of_classes_are_told_apart() -> None:
    sources = WeightsSources({"le_net#2": Path("2"), "le_net#3": Path("3")}, pretrained=False)
    with pytest.raises(UsageError, match="weights files for le_net#2 and le_net#3: name one of them, not le_net"):
        sources.named("le_net")
    plain = WeightsSources({"le_net": Path("1000"), "le_net#3": Path("3")}, pretrained=False)
    assert plain.named("le_net") == "le_net"


def test_torchvision_has_no_weights_of_other_numbers() -> None:
    sources = WeightsSources({}, pretrained=True)
    assert sources["resnet18"].pretrained
    assert not sources["resnet18#10"].pretrained


def test_what_is_no_checkpoint_is_said_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="Git LFS"):
        parse_weights(CATALOGUE, [str(tmp_path / "w.pth")], pretrained=False)
