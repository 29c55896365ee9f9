"""Image files to pixels, as every viewer shows them.

Pillow decodes: torchvision's own codecs need a CUDA build of torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from neurosurgeon.graph.spec import IMAGENET, Preprocessing
from neurosurgeon.utils.errors import InputError

CROP_TO = 224
MAX_ASPECT = 100  # scaled to 256, a longer strip would take gigabytes
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
WHITE = (255, 255, 255, 255)  # behind transparent pixels


def read_image(
    path: Path,
    size: int = CROP_TO,
    width: int | None = None,
    channels: int = 3,
    preprocessing: Preprocessing = IMAGENET,
) -> NDArray[np.uint8]:
    """Return an image resized and cropped, (size, width, channels) uint8.

    Args:   size: the height in pixels. width: None: the same. preprocessing: of the network.
    Raises: InputError: the file is missing or no image.
    """
    return fitted_pixels(open_image(path, MODES[channels]), size, width or size, preprocessing)


def fitted_pixels(image: Image.Image, height: int, width: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return an image resized and cropped, (height, width, channels) uint8. Raises: InputError: it is too narrow."""
    return np.array(_resize_and_crop(image, height, width, preprocessing)).reshape(height, width, -1)


def open_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Return an image, turned as its camera was. Raises: InputError: the file is missing or no image."""
    try:
        with Image.open(path) as file:
            file.load()  # an animation's first frame
            return _converted(_eight_bits(ImageOps.exif_transpose(file), path), mode)
    except FileNotFoundError as exc:
        raise InputError(f"input image {path} does not exist") from exc
    except InputError:
        raise
    except Exception as exc:  # Pillow's decoders raise many types for a damaged file
        raise InputError(f"input {path} cannot be read as an image: pass a JPEG, PNG or similar") from exc


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Return an image of 8 bits a channel; one of more bits is scaled by the range that its format has."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"input image {path} has NaN or infinite pixels: replace them")
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        values = values // 256
    elif image.mode == "F" and 0 <= low and high <= 1:
        values = values * 255
    elif 0 <= low and high > 255 and high <= 65535 and image.mode == "I":
        values = values // 256
    elif low < 0 or high > 255:
        raise InputError(
            f"input image {path} has pixels from {low:g} to {high:g}, expected 0 to 255 (or 0 to 1 in floats, 0 to "
            "65535 in integers): scale them"
        )
    return Image.fromarray(np.round(values).astype(np.uint8))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode; transparent pixels are shown on white, unless the mode has transparency itself."""
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not has_alpha:
        return image.convert(mode)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.replace("a", "A"))
    image = image.convert("RGBA")
    return image if mode == "RGBA" else Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert(mode)


def _resize_and_crop(image: Image.Image, height: int, width: int, preprocessing: Preprocessing) -> Image.Image:
    """Return the centre of the image, scaled so that the crop is a fixed share of its tighter side."""
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise InputError(f"an image of {image.width}x{image.height} has no sensible centre: crop it first")
    if height == width:
        resized = round(height * preprocessing.resize_share)
        scaled = [resized * side // short for side in image.size]
    else:
        scale = max(width / image.width, height / image.height) * preprocessing.resize_share
        scaled = [max(round(side * scale), crop) for side, crop in zip(image.size, (width, height), strict=True)]
    resampling = getattr(Image.Resampling, preprocessing.interpolation.upper(), Image.Resampling.BILINEAR)
    image = image.resize((scaled[0], scaled[1]), resampling)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that Pillow reads, in lower case with their dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)
