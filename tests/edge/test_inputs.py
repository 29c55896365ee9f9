"""Images to inputs: equal to torchvision's evaluation transform; files that are no images are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from numpy.typing import NDArray
from PIL import Image

from neurosurgeon.edge.inputs import load_image, read_image
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
