"""The user's own networks: files run once, names that never reach an import, errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.models.names import Catalogue, input_size, torchvision_names
from neurosurgeon.models.own_models import OwnModels
from neurosurgeon.utils.errors import InputSizeError, UnknownModelError, UsageError
from tests.equality import assert_equal
from tests.networks import cut, load_network, model_graph, random_input, run, run_whole

SOURCE = """
import torch
from torch import nn
from torchvision.models import resnet18 as imported

class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=4)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.conv(x) + x)
        return self.head(x.mean((2, 3)))

def small():
    return Residual(4)

def needs(width):
    return Residual(width)

def _hidden():
    return Residual()

def no_module():
    return 3

def raises():
    raise RuntimeError("no such thing")
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def test_functions_and_modules_without_arguments_have_names(nets: Path) -> None:
    assert OwnModels([nets]).names == ["nets:Residual", "nets:small", "nets:no_module", "nets:raises"]


@pytest.mark.parametrize("name", ["nets:small", "nets.py:small", "small"])
def test_a_function_is_known_by_file_and_name_or_by_name(nets: Path, name: str) -> None:
    assert Catalogue([nets]).choose(name, None) == "nets:small"


def test_an_own_network_is_split_like_any_other(nets: Path) -> None:
    catalogue = Catalogue([nets])
    network = TorchEngine(catalogue).open(catalogue.choose("nets:small", 32))
    assert network.graph.inputs[0].shape == (1, 3, 32, 32)
    images = random_input(network.graph.inputs[0].shape)
    whole = run_whole(network, images)
    for point in range(len(network.graph.layers)):
        edge, cloud = cut(network, point)
        output = run(cloud, run(edge, [images]).arrays).arrays[0]
        assert_equal(output, whole, same_setup=True, what=f"point {point}")
    assert network.ref.labels is None


def test_a_function_draws_the_same_weights_every_time(nets: Path) -> None:
    networks = [TorchEngine(Catalogue([nets])).open("nets:small") for _ in range(2)]
    assert networks[0].ref.weights_digest == networks[1].ref.weights_digest
    own, drawn = OwnModels([nets]).build("nets:small").state_dict(), networks[0]
    assert torch.equal(own["head.weight"], drawn.module.get_parameter("head.weight"))


def test_building_leaves_the_random_numbers_of_the_process_alone(nets: Path) -> None:
    catalogue = Catalogue([nets])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    catalogue.build_module("nets:small")
    assert torch.equal(torch.rand(3), expected)


def test_a_file_is_run_once(tmp_path: Path) -> None:
    path = tmp_path / "once.py"
    path.write_text(
        "with open(__file__ + '.runs', 'a') as f: f.write('x')\nfrom torch import nn\ndef net(): return nn.ReLU()\n"
    )
    catalogue = Catalogue([path, path])
    for _ in range(2):
        catalogue.build_module(catalogue.canonical_name("net"))
    assert (tmp_path / "once.py.runs").read_text() == "x"


@pytest.mark.parametrize("name", ["os:getcwd", "nets:needs", "nets:_hidden", "nets:imported", "sys.py:exit", "x:y:z"])
def test_a_name_never_reaches_an_import(nets: Path, name: str) -> None:
    catalogue = Catalogue([nets])
    before = set(sys.modules)
    with pytest.raises(UnknownModelError, match="unknown model .*nets:small.*--model-file"):
        catalogue.canonical_name(name)
    assert set(sys.modules) == before


def test_without_files_the_flag_is_named() -> None:
    with pytest.raises(UnknownModelError, match=r"no model file was given \(--model-file FILE.py, on both sides\)"):
        Catalogue().canonical_name("nets:small")


def test_a_name_that_is_also_torchvisions_must_say_which(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from torch import nn\ndef resnet18(): return nn.Linear(224, 2)\n")
    catalogue = Catalogue([path])
    with pytest.raises(UsageError, match="resnet18 is in a model file and torchvision's, too: write mine:resnet18"):
        catalogue.canonical_name("resnet18")
    assert catalogue.canonical_name("mine:resnet18") == "mine:resnet18"


def test_a_name_in_two_files_must_say_which(tmp_path: Path) -> None:
    for stem in ("one", "two"):
        (tmp_path / f"{stem}.py").write_text("from torch import nn\ndef net(): return nn.ReLU()\n")
    catalogue = Catalogue([tmp_path / "one.py", tmp_path / "two.py"])
    with pytest.raises(UsageError, match="one:net or two:net"):
        catalogue.canonical_name("net")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import torch\nraise ValueError('gone\\naway')\n", r"bad\.py, line 2: ValueError: gone$"),
        ("def net(:\n", r"bad\.py, line 1: SyntaxError: "),
        ("import nothing_of_this_name\n", r"bad\.py, line 1: ModuleNotFoundError: "),
        ("raise SystemExit(3)\n", r"bad\.py, line 1: SystemExit: 3"),
        ("x = 3\n", r"bad\.py defines no function"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, source: str, said: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=said) as caught:
        Catalogue([path])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("no_module", "nets:no_module returns a int"), ("raises", r"nets\.py, line \d+: RuntimeError: no such thing")],
)
def test_a_function_that_makes_no_module_is_refused_in_one_line(nets: Path, name: str, said: str) -> None:
    engine = TorchEngine(Catalogue([nets]))
    with pytest.raises(UsageError, match=said):
        engine.graph(f"nets:{name}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.py does not exist"):
        Catalogue([tmp_path / "none.py"])


# ---------------------------------------------------------------- torchvision's names, and sizes


def test_torchvision_names_are_names() -> None:
    assert {"resnet50", "vit_h_14", "swin_v2_b", "regnet_y_128gf"} <= set(torchvision_names())
    assert Catalogue().canonical_name("resnet50") == "resnet50"
    assert Catalogue().canonical_name("alexnet") == "alex_net"  # the classic one


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "r3d_18", "raft_small"])
def test_other_networks_of_torchvision_are_refused(name: str) -> None:
    with pytest.raises(UnknownModelError, match=f"{name} is no network for classification or segmentation"):
        Catalogue().canonical_name(name)


@pytest.mark.parametrize(
    ("name", "size"), [("alex_net", 224), ("resnet50", 224), ("inception_v3", 299), ("efficientnet_b7", 600)]
)
def test_the_usual_size_is_that_of_the_weights(name: str, size: int) -> None:
    assert input_size(name) == size
    catalogue = Catalogue()
    assert catalogue.canonical_name(f"{name}@{size}") == name
    assert catalogue.choose(name, 96) == catalogue.canonical_name(f"{name}@96") == f"{name}@96"
    assert input_size(f"{name}@96") == 96


@pytest.mark.parametrize("size", ["", "0", "-3", "x", "1e3", "99999", "2049"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(InputSizeError, match="no size of an image's side: choose 1 to 2048"):
        Catalogue().canonical_name(f"resnet18@{size}")


def test_two_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="names a size already"):
        Catalogue().choose("resnet18@64", 96)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inception_v3@32", "inception_v3@32 cannot take an input of 32x32: .* larger than its input"),
        ("vit_b_16@100", "vit_b_16 cannot take images of 100x100"),
        ("le_net@64", "le_net@64 cannot take an input of 64x64: classifier.0: .* expects 46656 values"),
        ("alex_net@16", "alex_net@16 cannot take an input of 16x16: features"),
    ],
)
def test_a_size_that_a_network_cannot_take_is_refused(name: str, said: str) -> None:
    with pytest.raises(InputSizeError, match=said):
        model_graph(name)


def test_another_size_has_the_same_weights() -> None:
    assert load_network("mobile_net@96").ref.weights_digest == load_network("mobile_net").ref.weights_digest
