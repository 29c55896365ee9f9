"""Files of weights as people have them: wrappers, prefixes, and files that are no checkpoints, each named."""

from __future__ import annotations

import argparse
import io
import logging
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neurosurgeon.models.checkpoints import fitting_names, read_checkpoint
from neurosurgeon.utils.errors import WeightsError

State = dict[str, Any]
PATH = Path("some.pth")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())


def state(value: float = 1.0) -> State:
    return {"stem.weight": torch.full((2, 3), value), "stem.bias": torch.zeros(2)}


OWN = state()


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# ---------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda plain: {"state_dict": plain},
        lambda plain: {"model_state_dict": plain, "optimizer_state_dict": {"state": {}}, "loss": 0.3},
        lambda plain: {"net": plain, "acc": torch.tensor(0.9), "epoch": 4},
        lambda plain: {"model": {"state_dict": plain}},
        lambda plain: {"params": plain, "params_ema": state(2.0)},
        lambda plain: {"state_dict": plain, "state_dict_ema": state(2.0), "arch": "mine"},
        lambda plain: {"model_ema": plain},
        lambda plain: {"state_dict": plain, "model": "resnet18", "weights": {"decay": 0.1}},
        lambda plain: {"state_dict": plain, "args": argparse.Namespace(lr=0.1, out=Path("runs"))},
        lambda plain: {"state_dict": plain, "best": np.float64(0.5), "seen": np.int64(3)},
    ],
)
def test_weights_are_unwrapped(tmp_path: Path, wrap: Callable[[State], State]) -> None:
    given = read_checkpoint(written(tmp_path / "w.pth", wrap(state())))
    assert set(given) == set(OWN)
    assert torch.equal(given["stem.weight"], OWN["stem.weight"])


def test_averaged_weights_beside_the_plain_ones_are_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_checkpoint(written(tmp_path / "w.pth", {"model": state(), "model_ema": state(2.0)}))
    assert "using the weights under model; averages (EMA) are under model_ema" in caplog.text


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": state(), "net": state(2.0)}, "model and net"),
        ({"ema": state(), "params_ema": state(2.0)}, "ema and params_ema"),
        ({**state(), "model": state(2.0)}, r"stem\.weight and model"),
    ],
)
def test_a_mix_of_weights_is_refused(tmp_path: Path, content: State, names: str) -> None:
    with pytest.raises(WeightsError, match=f"holds {names}: which of them is meant is unclear"):
        read_checkpoint(written(tmp_path / "w.pth", content))


def test_unknown_wrappers_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no state_dict .*its keys: student, teacher"):
        read_checkpoint(written(tmp_path / "w.pth", {"student": state(), "teacher": state()}))


def test_a_checkpoint_that_holds_itself_ends(tmp_path: Path) -> None:
    content: State = {"weight": torch.zeros(1)}
    content["model"] = content
    assert "weight" in read_checkpoint(written(tmp_path / "w.pth", content))


# ---------------------------------------------------------------- prefixes


def prefixed(prefix: str, plain: State = OWN) -> State:
    return {prefix + key: value for key, value in plain.items()}


PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_cut(prefix: str) -> None:
    assert fitting_names(prefixed(prefix), OWN, PATH) == OWN


@pytest.mark.parametrize("part", ["module.", "model.", "module.model."])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_part_of_the_network_with_the_name_of_a_prefix_stays(part: str, prefix: str) -> None:
    own = prefixed(part)
    assert fitting_names(prefixed(prefix, own), own, PATH) == own


def test_a_part_called_module_beside_others_stays() -> None:
    own = {**OWN, "module.weight": torch.ones(1)}
    assert fitting_names(own, own, PATH) == own


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_of_parts_are_cut_unless_the_network_has_them(wrapper: str) -> None:
    wrapped = {f"stem.{wrapper}{key.removeprefix('stem.')}": value for key, value in OWN.items()}
    assert fitting_names(prefixed("module.", wrapped), OWN, PATH) == OWN
    assert fitting_names(wrapped, wrapped, PATH) == wrapped


def test_values_of_the_training_loop_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    beside = {"criterion.weight": torch.ones(3), "loss.scale": torch.ones(1)}
    assert fitting_names({**prefixed("model."), **beside}, OWN, PATH) == OWN
    assert "2 values without the prefix model." in caplog.text


def test_nothing_is_left_out_without_a_prefix() -> None:
    given = {**OWN, "criterion.weight": torch.ones(3)}
    assert fitting_names(given, OWN, PATH) == given


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({**prefixed("model."), **prefixed("net.")}, r"model\. and net\."),
        ({**prefixed("model."), "stem.bias": torch.ones(2)}, r"model\. and stem\.bias"),
    ],
)
def test_names_that_fit_twice_are_refused(given: State, names: str) -> None:
    with pytest.raises(WeightsError, match=f"holds {names}"):
        fitting_names(given, OWN, PATH)


# ---------------------------------------------------------------- files that are no checkpoints


def whole_module(path: Path) -> None:
    torch.save(net(), path)


def whole_module_in_the_old_format(path: Path) -> None:
    torch.save(net(), path, _use_new_zipfile_serialization=False)


def scripted(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"net/{name}", b"")


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(net(), (torch.zeros(1, 3, 8, 8),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def in_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"), io.BytesIO())


def in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.pth", b"1")


def of_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def cut_off(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_off_in_the_old_format(path: Path) -> None:
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])


def cut_off_safetensors(path: Path) -> None:
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-4])


def of_bytes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "LFS": (of_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "Git LFS.*git lfs pull"),
    "HTML": (of_bytes(b"\n <!DOCTYPE HTML><title>Not found</title>"), "web page.*download the file itself"),
    "XML": (of_bytes(b"<?xml version='1.0'?><Error>AccessDenied</Error>"), "XML page"),
    "JSON": (of_bytes(b'{"weight_map": {}}'), "is JSON text"),
    "gzip": (of_bytes(b"\x1f\x8b\x08\x00rest"), "gzip: unpack it"),
    "xz": (of_bytes(b"\xfd7zXZ\x00rest"), "xz: unpack it"),
    "HDF5": (of_bytes(b"\x89HDF\r\n\x1a\nrest"), "HDF5"),
    "ONNX": (of_bytes(b"\x08\x07\x12\x07pytorch\x1a\x032.1"), "ONNX network.*state_dict"),
    "empty": (of_bytes(b""), "is empty"),
    "tar": (in_tar, "tar archive: unpack it"),
    "zip": (in_zip, "ZIP archive.*unpack it"),
    "array": (of_arrays, "array of NumPy"),
    "module": (whole_module, r"a whole module \(torch.nn.*Sequential\): load it where it was saved.*state_dict"),
    "old module": (whole_module_in_the_old_format, "a whole module .*load it where it was saved"),
    "TorchScript": (scripted, "TorchScript network.*state_dict"),
    "export": (exported, r"torch\.export, not a checkpoint.*state_dict"),
    "cut off": (cut_off, "damaged or ends too early"),
    "cut off, old": (cut_off_in_the_old_format, "damaged or ends too early"),
    "cut off, safetensors": (cut_off_safetensors, "damaged or ends too early"),
    "objects": (
        lambda path: torch.save({"state_dict": state(), "f": WeightsError}, path),
        "Python objects.*WeightsError",
    ),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    write, said = NO_CHECKPOINTS[kind]
    write(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=said) as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "w.pth" in str(caught.value)


def test_an_onnx_file_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(bytes(100))
    with pytest.raises(WeightsError, match="ONNX"):
        read_checkpoint(tmp_path / "w.onnx")


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth"])
def test_both_formats_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    for write in (save_file, torch.save):
        write(state(), tmp_path / name)
        given = read_checkpoint(tmp_path / name)
        assert isinstance(given["stem.bias"], Tensor)
        (tmp_path / name).unlink()


def test_a_plain_checkpoint_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        fitting_names(read_checkpoint(written(tmp_path / "w.pth", state())), OWN, tmp_path)
    assert not caplog.records
