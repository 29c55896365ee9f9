"""Image files to pixels. Pillow decodes: torchvision's own codecs need a CUDA build of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neurosurgeon.utils.errors import InputError

# torchvision's evaluation transform for the classic networks (its ImageClassification preset).
RESIZE_TO, CROP_TO = 256, 224  # for other crops, in proportion
MAX_ASPECT = 100  # scaled to 256, a longer strip would take gigabytes


def read_image(path: Path, size: int = CROP_TO) -> NDArray[np.uint8]:
    """Return an image resized and cropped, (size, size, 3) uint8.

    Raises: InputError: the file is missing or no image.
    """
    return np.array(_resize_and_crop(_decode(path), size))


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
                return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert("RGB")
            image = file.convert("RGBA") if "transparency" in file.info else file
            return image.convert("RGB")
    except FileNotFoundError as exc:
        raise InputError(f"input image {path} does not exist") from exc
    except Exception as exc:  # Pillow's decoders raise whatever they come upon in a damaged file
        raise InputError(f"input {path} cannot be read as an image: pass a JPEG, PNG or similar") from exc


def _resize_and_crop(image: Image.Image, crop: int) -> Image.Image:
    """Return the centre of the image, scaled so that its shorter side is a seventh longer."""
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise InputError(f"an image of {image.width}x{image.height} has no sensible centre: crop it first")
    resized = round(crop * RESIZE_TO / CROP_TO)
    width, height = (resized * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))
