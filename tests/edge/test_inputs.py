"""Images and arrays to inputs: pixels equal to torchvision's transform, several inputs by name; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from neurosurgeon.edge.inputs import NetworkInputs, inputs_of, load_image, read_image
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.graph.trees import map_leaves, take_apart
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.preprocess import as_values
from neurosurgeon.models.torchvision_compat import import_torchvision
from neurosurgeon.utils.errors import InputError

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"


@pytest.fixture(scope="module")
def reference() -> Callable[[Path], NDArray[np.float32]]:
    """torchvision's own transform of a file, (224, 224, 3)."""
    import_torchvision()
    transforms = import_torchvision("torchvision.transforms")
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def apply(path: Path) -> NDArray[np.float32]:
        with Image.open(path) as image:
            pixels: NDArray[np.float32] = transform(image.convert("RGB")).permute(1, 2, 0).numpy()
        return pixels

    return apply


def values(path: Path) -> NDArray[np.float32]:
    """Return the input values of a network, (224, 224, 3)."""
    return as_values(torch.from_numpy(load_image(path)))[0].permute(1, 2, 0).numpy()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return an image of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_photo_equals_torchvisions_transform(reference: Callable[[Path], NDArray[np.float32]], name: str) -> None:
    np.testing.assert_allclose(values(PHOTOS / name), reference(PHOTOS / name), atol=1e-6)


@pytest.mark.parametrize(
    "size",
    [(640, 427), (427, 640), (256, 256), (224, 224), (300, 299), (1, 1), (3, 2), (17, 500), (1023, 257), (257, 258)],
)
def test_an_image_of_any_size_equals_torchvisions_transform(
    tmp_path: Path, reference: Callable[[Path], NDArray[np.float32]], size: tuple[int, int]
) -> None:
    noise(*size).save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    assert (pixels.shape, pixels.dtype) == ((224, 224, 3), np.uint8)
    np.testing.assert_allclose(values(tmp_path / "image.png"), reference(tmp_path / "image.png"), atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_an_image_of_any_mode_equals_torchvisions_transform(
    tmp_path: Path, reference: Callable[[Path], NDArray[np.float32]], mode: str
) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    noise(300, 280, mode).save(path)
    np.testing.assert_allclose(values(path), reference(path), atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50), b"GIF89a"])
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "input.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"input\.jpg cannot be read as an image"):
        read_image(tmp_path / "input.jpg")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
def test_a_truncated_photo_is_refused(tmp_path: Path, kept: float) -> None:
    whole = (PHOTOS / "china.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read"):
        read_image(tmp_path / "cut.jpg")


def test_any_exception_of_a_decoder_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfinished(path: Path) -> None:
        raise NotImplementedError("pixel format")

    monkeypatch.setattr(Image, "open", unfinished)
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "texture.dds")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path)


def test_an_image_too_large_to_decode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(300, 300).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png cannot be read"):
        read_image(tmp_path / "bomb.png")


# ---------------------------------------------------------------- several inputs


ONE, OTHER, THIRD = (np.full((1, 4), number, np.float32) for number in (1, 2, 3))


class Sums(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensors = take_apart((args, kwargs), lambda value: isinstance(value, torch.Tensor))[1]
        return torch.stack(tensors).sum(0)


def inputs_like(example: Any) -> NetworkInputs:
    """Return the inputs of a network of the user with this example."""
    tree = map_leaves(example, lambda leaf: torch.from_numpy(leaf.copy()) if isinstance(leaf, np.ndarray) else leaf)
    return inputs_of(TorchEngine(Catalogue(modules={"own": Sums()}, examples={"own": tree})), "module:own")


@pytest.mark.parametrize(
    ("example", "given", "expected"),
    [
        (ONE, OTHER, [2]),
        ((ONE,), (OTHER,), [2]),
        (ONE, OTHER.tolist(), []),  # float64
        (ONE, {"any name": OTHER}, [2]),
        ((ONE, OTHER), (OTHER, ONE), [2, 1]),
        ((ONE, OTHER), [OTHER, ONE], [2, 1]),
        ((ONE, OTHER), (ONE, ONE), [1, 1]),  # one array twice
        ((ONE, OTHER), {"1": OTHER, "0": ONE}, [1, 2]),
        ((ONE, OTHER), {"arr_1": OTHER, "arr_0": ONE}, [1, 2]),
        ((ONE, OTHER), {"a": ONE, "b": OTHER}, []),
        ((ONE, OTHER), (ONE,), []),
        ((ONE, OTHER), ONE, []),
        ({"x": ONE, "mask": OTHER}, {"mask": OTHER, "x": ONE}, [1, 2]),
        ({"x": ONE, "mask": OTHER}, (ONE, OTHER), [1, 2]),
        ({"x": ONE, "mask": OTHER}, {"x": ONE, "musk": OTHER}, []),
        ({"x": ONE, "mask": OTHER}, {"x": ONE}, []),
        ({"x": ONE, "scale": 2}, {"x": OTHER}, [2]),
        ({"x": ONE, "scale": 2}, {"x": OTHER, "scale": 2}, [2]),
        ({"x": ONE, "scale": 2}, {"x": OTHER, "scale": 3}, []),  # would be ignored
        ({"x": ONE, "pair": (OTHER, THIRD)}, {"pair": (OTHER, THIRD), "x": ONE}, [1, 2, 3]),
        ({"x": ONE, "pair": (OTHER, THIRD)}, {"pair.1": THIRD, "pair.0": OTHER, "x": ONE}, [1, 2, 3]),
        (({"a": ONE, "b": OTHER},), {"b": OTHER, "a": ONE}, [1, 2]),
        (({"a": ONE, "b": OTHER},), ({"b": OTHER, "a": ONE},), [1, 2]),
        ((ONE, [OTHER, THIRD]), (ONE, [OTHER, THIRD]), [1, 2, 3]),
        ((ONE, [OTHER, THIRD]), (ONE, OTHER, THIRD), [1, 2, 3]),
    ],
)
def test_inputs_are_bound_by_position_by_name_or_as_the_module_takes_them(
    example: Any, given: Any, expected: list[int]
) -> None:
    inputs = inputs_like(example)
    if expected:
        assert [array.flat[0] for array in inputs.bind(given)] == expected
        return
    with pytest.raises(InputError, match=r"inputs? (of module:own|array): expected .*, got "):
        inputs.bind(given)


def test_one_tensor_that_is_two_inputs_of_the_example_stays_one() -> None:
    tensor = torch.ones(1, 4)
    inputs = inputs_of(TorchEngine(Catalogue(modules={"own": Sums()}, examples={"own": (tensor, tensor)})), "own")
    assert len(inputs.bind((ONE, ONE))) == 1
    with pytest.raises(InputError, match="expected 1 .*, got 2"):
        inputs.bind((ONE, OTHER))


def test_arrays_of_a_file_are_bound_by_their_names(tmp_path: Path) -> None:
    inputs = inputs_like({"x": ONE, "mask": OTHER})
    np.savez(tmp_path / "named.npz", mask=OTHER, x=ONE)
    np.savez(tmp_path / "ordered.npz", ONE, OTHER)
    np.savez(tmp_path / "others.npz", a=ONE, b=OTHER)
    for name in ("named", "ordered"):
        assert [array.flat[0] for array in inputs.read(tmp_path / f"{name}.npz")] == [1, 2]
    with pytest.raises(InputError, match=r"expected 2 \(x float32 \(1, 4\), mask float32 \(1, 4\)\), got a, b"):
        inputs.read(tmp_path / "others.npz")
