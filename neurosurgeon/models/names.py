"""The names of all networks: the four classic ones, torchvision's, and the user's own.

A name may end in ``@SIZE``: the side of the square input image in pixels, if it is not the network's usual size. That
of a network that is not the user's may then end in ``#CLASSES``: its number of classes, if it is not the usual one, as
in ``resnet18#10`` and ``resnet18@64#10``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosurgeon.graph.spec import IMAGENET, Preprocessing
from neurosurgeon.models.own_models import OwnModels
from neurosurgeon.utils.errors import InputSizeError, UnknownModelError, UsageError

if TYPE_CHECKING:  # torch takes a second to import, which names and spelling checks of the classic four do not need
    from types import ModuleType

    from torch import nn

    from neurosurgeon.models.program import Example

USUAL_SIZE = 224
USUAL_CLASSES = 1000  # of the classic networks
SEGMENTATION = "torchvision.models.segmentation"
MAX_SIZE = 2048  # of an image's side: a peer may request it, and the tensors of a network grow with its square
MAX_CLASSES = 32_768  # a peer may request it, and the last layer of a network grows with it


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """The class of a classic network, its number of layers, and torchvision's name of it, if there is one."""

    module: str
    class_name: str
    layers: int  # known without building it, to refuse a wrong partition point at once; a test checks it
    torchvision_name: str | None = None


ZOO: Mapping[str, ZooEntry] = {
    "alex_net": ZooEntry("neurosurgeon.models.AlexNet", "AlexNet", 22, "alexnet"),
    "vgg_net": ZooEntry("neurosurgeon.models.VggNet", "VggNet", 53, "vgg16_bn"),
    "le_net": ZooEntry("neurosurgeon.models.LeNet", "LeNet", 12),
    "mobile_net": ZooEntry("neurosurgeon.models.MobileNet", "MobileNet", 23, "mobilenet_v2"),
}
ALIASES = {"alexnet": "alex_net", "vggnet": "vgg_net", "lenet": "le_net", "mobilenet": "mobile_net"}


class NameParts(NamedTuple):
    """A name without its endings, the size of its images, pixels, and the number of its classes; None: not given."""

    base: str
    size: int | None = None
    classes: int | None = None

    def __str__(self) -> str:
        size, classes = ("" if value is None else f"{sign}{value}" for sign, value in zip("@#", self[1:], strict=True))
        return f"{self.base}{size}{classes}"


def name_parts(name: str) -> NameParts:
    """Return the parts of a name. Raises: InputSizeError, UsageError: what is after ``@`` or ``#`` is no number."""
    rest, hash_sign, classes = name.partition("#")
    base, at, size = rest.partition("@")
    if at and not _is_number(size, MAX_SIZE):
        raise InputSizeError(f"{size[:32]!r} is no size of an image's side: choose 1 to {MAX_SIZE} pixels")
    if hash_sign and not _is_number(classes, MAX_CLASSES):
        raise UsageError(f"{classes[:32]!r} is no number of classes: choose 1 to {MAX_CLASSES}")
    return NameParts(base, int(size) if at else None, int(classes) if hash_sign else None)


def _is_number(text: str, limit: int) -> bool:
    return bool(re.fullmatch(r"[1-9][0-9]{0,5}", text)) and int(text) <= limit


def input_size(name: str) -> int:
    """Return the side of a network's square input image, pixels."""
    parts = name_parts(name)
    return parts.size or _usual_size(parts.base)


# ---------------------------------------------------------------- torchvision


def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's networks for classification and segmentation."""
    return (*_names_of("torchvision.models"), *_names_of(SEGMENTATION))


def _names_of(module: str) -> tuple[str, ...]:
    models = _import_torchvision()
    return tuple(models.list_models(module=importlib.import_module(module)))


def _import_torchvision() -> ModuleType:
    from neurosurgeon.models.torchvision_compat import import_torchvision

    try:
        return import_torchvision()
    except ImportError as exc:
        raise UnknownModelError(
            f"unknown model: choose from {', '.join(ZOO)}; others need one more package: pip install torchvision"
        ) from exc


def torchvision_weights(name: str) -> Any:
    """Return torchvision's best weights for a network, with their ``url`` and ``get_state_dict``; None without any."""
    known = torchvision_name(name)
    return None if known is None else _import_torchvision().get_model_weights(known).DEFAULT


def torchvision_name(name: str) -> str | None:
    """Return torchvision's name of a network; None if it has none."""
    base = name_parts(name).base
    return ZOO[base].torchvision_name if base in ZOO else None if is_own(name) else base


def _usual_size(base: str) -> int:
    """Return the image size for which a network was trained; for torchvision's, that of its best weights."""
    if base in ZOO or is_own(base):
        return USUAL_SIZE
    settings = torchvision_weights(base).transforms.keywords
    return int(settings.get("crop_size") or settings["resize_size"])  # segmentation crops nothing


def usual_classes(name: str) -> int | None:
    """Return the number of classes with which a network is built by itself; None for the user's own."""
    base = name_parts(name).base
    if is_own(base):
        return None
    return USUAL_CLASSES if base in ZOO else len(torchvision_weights(base).meta["categories"])


def preprocessing_of(name: str, module: nn.Module) -> Preprocessing:
    """Return how an image becomes the input of a network: as its torchvision weights or its timm settings say."""
    base = name_parts(name).base
    if base in ZOO:
        return IMAGENET
    if not is_own(base):
        return _of_torchvision(torchvision_weights(base).transforms.keywords)
    settings = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    if not isinstance(settings, Mapping) or "mean" not in settings or "std" not in settings:
        return IMAGENET
    mean, std = (tuple(float(value) for value in settings[key]) for key in ("mean", "std"))
    share = 1 / float(settings.get("crop_pct") or 1 / IMAGENET.resize_share)
    return Preprocessing(mean, std, share, str(settings.get("interpolation") or IMAGENET.interpolation))


def _of_torchvision(transforms: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of torchvision's ImageClassification preset with these settings."""
    interpolation = getattr(transforms.get("interpolation"), "value", IMAGENET.interpolation)
    resized = transforms.get("resize_size", 256)  # what the preset has by itself
    share = resized / transforms.get("crop_size", resized)
    mean, std = tuple(transforms.get("mean", IMAGENET.mean)), tuple(transforms.get("std", IMAGENET.std))
    return Preprocessing(mean, std, share, interpolation)


def is_own(name: str) -> bool:
    """Return whether a network is the user's own."""
    return ":" in name


# ---------------------------------------------------------------- names to modules


class Catalogue:
    """All networks that have a name: the classic four, torchvision's, and the user's own.

    Args:   model_files: Python files with functions that return modules; they are run. modules: modules by name.
            examples: the inputs of modules by name: a tuple, a dict of arguments by name, or one tensor.
    Raises: UsageError: a file cannot be run, or defines no network.
    """

    def __init__(
        self,
        model_files: Iterable[Path] = (),
        modules: Mapping[str, nn.Module] | None = None,
        examples: Mapping[str, Any] | None = None,
    ) -> None:
        self.own = OwnModels(model_files, modules, examples)

    def example(self, name: str) -> Example:
        """Return the arguments with which a network of a canonical name is traced: the user's, or one image of noise.

        Raises: UsageError: the user's function raises, or its network has an example and a size of images, too.
        """
        from neurosurgeon.models.program import Example

        base, size, _ = name_parts(name)
        given = self.own.example(base) if is_own(base) else None
        if given is None:
            return Example.of_image(input_size(name))
        if size is not None:
            raise UsageError(f"{base} has an example of its inputs: leave out --input-size")
        return Example.of(given)

    def canonical_name(self, name: str) -> str:
        """Return the canonical name of a network: ``mobilenet`` becomes ``mobile_net``, usual numbers are left out.

        Raises: UnknownModelError: there is no such network; the message lists known ones.
                UsageError: two networks have this name, or it has a senseless number of classes.
                InputSizeError: the text after ``@`` is no valid size.
        """
        base, size, classes = name_parts(name)
        base = self._canonical_base(base)
        if classes is not None and is_own(base):
            raise UsageError(f"{base} has the classes that its function gives it: leave out --classes and #{classes}")
        usual = None if classes is None else usual_classes(base)
        return str(
            NameParts(base, None if size in (None, _usual_size(base)) else size, None if classes == usual else classes)
        )

    def choose(self, name: str, size: int | None, classes: int | None = None) -> str:
        """Return the canonical name of a network for images of ``size`` pixels, with so many classes; None: as usual.

        Raises: UsageError: there is no such network, or two sizes or numbers of classes are given.
        """
        parts = name_parts(name)
        if size is not None and parts.size is not None:
            raise UsageError(f"{name} names a size already: leave out --input-size")
        if classes is not None and parts.classes is not None:
            raise UsageError(f"{name} names a number of classes already: leave out --classes")
        return self.canonical_name(str(NameParts(parts.base, size or parts.size, classes or parts.classes)))

    def build_module(self, name: str) -> nn.Module:
        """Return a new module of a canonical name.

        Parameters are on the meta device, with shapes and no memory, except those of the user's own networks.

        Raises: UsageError: a model file raises. InputSizeError: the network cannot be built for such images.
        """
        base, _, classes = name_parts(name)
        if is_own(base):
            return self.own.build(base)
        from neurosurgeon.models.tracing import without_storage

        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        if base in ZOO:
            entry = ZOO[base]
            return without_storage(partial(getattr(importlib.import_module(entry.module), entry.class_name), **options))
        size = input_size(name)
        options |= _options(base, size)
        try:
            return without_storage(lambda: _import_torchvision().get_model(base, weights=None, **options))
        except (ValueError, AssertionError, RuntimeError) as exc:  # transformers check their size when they are built
            raise InputSizeError(f"{base} cannot take images of {size}x{size}: {exc}") from exc

    def _canonical_base(self, name: str) -> str:
        own = self.own.full_name(name)
        if own is not None:
            if ":" not in name and (name in ZOO or name in ALIASES or name in torchvision_names()):
                raise UsageError(f"{name} is in a model file and torchvision's, too: write {own}, or rename yours")
            return own
        canonical = ALIASES.get(name, name)
        if canonical in ZOO or (":" not in name and canonical in torchvision_names()):
            return canonical
        raise UnknownModelError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        own = self.own.names
        if name in _import_torchvision().list_models():
            return (
                f"{name} is no network for classification or segmentation: of torchvision, these alone are known by "
                "name; use a --model-file"
            )
        if ":" in name:
            known = f": of model files there are {', '.join(own)}" if own else ": no model file was given"
            return f"unknown model {name[:64]!r}{known} (--model-file FILE.py, on both sides)"
        near = difflib.get_close_matches(name, torchvision_names(), 3)
        others = f"such as {', '.join(near)}" if near else "such as resnet50"
        named = "".join(f", {known}" for known in own)
        return f"unknown model {name[:64]!r}: choose from {', '.join(ZOO)}{named}, or torchvision's, {others}"


def _options(name: str, size: int) -> dict[str, Any]:
    """Return torchvision's arguments for a network that fits its weights."""
    if name in ("googlenet", "inception_v3"):  # without the heads that only training uses
        return {"aux_logits": False, "init_weights": False, "transform_input": True}
    if name in _names_of(SEGMENTATION):
        return {"weights_backbone": None}
    if name.startswith("vit_"):
        return {"image_size": size}
    return {"input_size": (size, size)} if name.startswith("maxvit_") else {}
