"""Tasks and their inputs: task files, directories, random draws, and files and arrays to the inputs of a network."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neurosurgeon.edge.arrays import SUFFIXES as ARRAY_SUFFIXES
from neurosurgeon.edge.arrays import read_arrays
from neurosurgeon.edge.pictures import CROP_TO, MODES, fitted_pixels, image_suffixes, open_image, read_image
from neurosurgeon.edge.records import Frame, QueuedTask
from neurosurgeon.engine.base import Engine
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import (
    IMAGENET,
    Array,
    Preprocessing,
    TensorSpec,
    channels_last,
    dtype_of,
    takes_images,
)
from neurosurgeon.graph.trees import Leaf
from neurosurgeon.utils.errors import InputError, UsageError

COMMENT = "#"  # begins a comment line of a task file
IMAGES_AHEAD = 4  # tasks whose images are read or being read: a long read must not delay an edge partition


def image_input(pixels: NDArray[np.uint8]) -> Array:
    """Return pixels (H, W, C) as a network's input, (1, C, H, W) uint8, channels-last as images are."""
    return pixels.transpose(2, 0, 1)[None]


def load_image(path: Path, size: int = CROP_TO) -> Array:
    """Return an image file as a network's input, (1, 3, size, size) uint8. Raises: InputError."""
    return image_input(read_image(path, size))


def network_input(given: object, spec: TensorSpec, preprocessing: Preprocessing = IMAGENET) -> Array:
    """Return the input array of a network for a given value.

    Args:   given: the path of an image or of an array (``.npy``, ``.wav``), an image of Pillow, pixels (H, W, C) uint8
            of the input's size, or an array or tensor of its own shape and type.
            spec: the input of the network. preprocessing: of its images.
    Raises: InputError: the value is no image, of another shape or type, or not finite.
    """
    if isinstance(given, str | Path):
        return _of_file(Path(given), spec, preprocessing)
    if isinstance(given, Image.Image):
        return _of_image("image", given.convert, spec, preprocessing)
    detach = getattr(given, "detach", None)  # of a tensor, which may have a gradient, or be on a GPU
    try:
        array = np.asarray(detach().cpu() if detach else given, order="C")  # flipped or strided views, too
    except (TypeError, ValueError) as exc:  # numpy makes no array of it
        kind = type(given).__name__
        raise InputError(f"input array: expected {spec.dtype} {spec.shape}, got {kind}: {exc}") from exc
    is_image = takes_images(spec)
    if is_image and array.dtype == np.uint8 and array.shape == (*spec.shape[2:], spec.shape[1]):
        return image_input(array)
    types = [spec.dtype, "uint8"] if is_image else [spec.dtype]
    if array.shape != spec.shape or dtype_of(array) not in types:
        raise InputError(f"input array: expected {' or '.join(types)} {spec.shape}, got {array.dtype} {array.shape}")
    return channels_last(array)


def _of_file(path: Path, spec: TensorSpec, preprocessing: Preprocessing) -> Array:
    if path.suffix.lower() in ARRAY_SUFFIXES:
        array = read_arrays(path)
        if isinstance(array, dict):
            raise InputError(f"input file {path} has the arrays {', '.join(array)}: the network has one input")
        _check_finite(path, array)
        if path.suffix.lower() == ".wav" and array.ndim < len(spec.shape):
            array = array.reshape((1,) * (len(spec.shape) - 1) + array.shape)
        return network_input(array, spec)
    return _of_image(str(path), partial(open_image, path), spec, preprocessing)


def _of_image(
    name: str, open_in: Callable[[str], Image.Image], spec: TensorSpec, preprocessing: Preprocessing
) -> Array:
    """Return the input for an image. Args: name: for errors. open_in: returns the image in a mode of Pillow."""
    if spec.dtype != "float32" or len(spec.shape) != 4 or spec.shape[1] not in MODES:
        raise InputError(f"input {name}: the network takes {spec.dtype} {spec.shape}, no image: pass an array (.npy)")
    count, channels, height, width = spec.shape
    if count > 1:
        raise InputError(f"input {name}: the network takes {count} images at one time: pass an array (.npy)")
    pixels = image_input(fitted_pixels(open_in(MODES[channels]), height, width, preprocessing))
    return pixels if takes_images(spec) else channels_last((pixels / 255).astype(np.float32))  # grey, or transparent


def _check_finite(path: Path, array: Array) -> None:
    if array.dtype.kind in "fc" and (count := int((~np.isfinite(array)).sum())):
        raise InputError(f"input file {path} has {count} values that are NaN or infinite: replace them")


@dataclass(frozen=True, eq=False)
class NetworkInputs:
    """Makes the inputs of a network from files, images and arrays."""

    graph: LayerGraph
    example: tuple[Array, ...]  # the inputs of a task that has none
    prepare: Callable[[Any], Any] | None  # the user's own preprocessing of an image

    def read(self, path: Path) -> tuple[Array, ...]:
        """Return the inputs of a file. Raises: InputError."""
        if path.suffix.lower() in ARRAY_SUFFIXES:
            arrays = read_arrays(path)
            for array in arrays.values() if isinstance(arrays, dict) else ():
                _check_finite(path, array)
            return self.bind(arrays if isinstance(arrays, dict) else path)
        return self.bind(self.prepare(open_image(path)) if self.prepare else path)

    def of_frame(self, frame: Frame) -> tuple[Array, ...]:
        """Return the inputs of a frame of a stream, resized and cropped as an image file. Raises: InputError."""
        if frame.error:
            raise InputError(frame.error)
        image = Image.fromarray(frame.pixels)
        return self.bind(self.prepare(image) if self.prepare else image)

    def bind(self, given: object) -> tuple[Array, ...]:
        """Return the arrays of given inputs, one for each input of the network.

        Args:   given: one input as in `network_input`; several: a tuple or list by position, or a dict by name; or the
                arguments as the user's module takes them, with the constants of its example.
        Raises: InputError: another number, name, shape or type.
        """
        specs, names = self.graph.inputs, self.graph.input_names
        values = self._values(given)
        if values is None or len(values) != len(specs):
            wanted = ", ".join(f"{name} {spec.dtype} {spec.shape}" for name, spec in zip(names, specs, strict=True))
            count = ", ".join(map(str, given)) if isinstance(given, Mapping) else len(values or ())
            raise InputError(f"inputs of {self.graph.model}: expected {len(specs)} ({wanted}), got {count}")
        scaling = self.graph.preprocessing
        arrays = []
        for name, value, spec in zip(names, values, specs, strict=True):
            try:
                arrays.append(network_input(value, spec, scaling))
            except InputError as exc:
                place = f"{self.graph.model}, {name}: " if len(names) > 1 else ""
                raise InputError(f"{place}{exc}") from exc
        return tuple(arrays)

    def _values(self, given: object) -> list[Any] | None:
        """Return the given inputs in the order of the network's; None if names are unknown."""
        args, kwargs = self.graph.input_template
        names = self.graph.input_names
        if isinstance(given, list) and len(names) == 1:  # the numbers of an array
            return [given]
        for template in (kwargs or args, *args[:1]):
            found: dict[int, Any] = {}
            if not isinstance(template, Leaf) and _is_like(template, given, found):
                return [found[index] for index in range(len(names))]
        if not isinstance(given, Mapping):
            return list(given) if isinstance(given, tuple | list) else [given]
        for keys in (names, [f"arr_{number}" for number in range(len(names))]):  # as numpy names arrays by position
            if set(given) == set(keys):
                return [given[key] for key in keys]
        return list(given.values()) if len(given) == len(names) == 1 else None


def _is_like(template: Any, given: Any, found: dict[int, Any]) -> bool:
    """Return whether given inputs have the structure of a template; put each in ``found``, by the index of its leaf."""
    if isinstance(template, Leaf):
        return found.setdefault(template.index, given) is given
    if isinstance(template, Mapping):
        is_same = isinstance(given, Mapping) and set(given) == set(template)
        return is_same and all(_is_like(part, given[key], found) for key, part in template.items())
    if isinstance(template, list | tuple):
        is_same = isinstance(given, list | tuple) and len(given) == len(template)
        return is_same and all(_is_like(*pair, found) for pair in zip(template, given, strict=True))
    return repr(given) == repr(template)


def drawn_inputs(specs: Sequence[TensorSpec], low: float, high: float) -> tuple[Array, ...]:
    """Return random inputs between two values, which may occur; the same on every run.

    Raises: InputError: the range is empty, or a type cannot be drawn.
    """
    if not -math.inf < low <= high < math.inf:
        raise InputError(f"range of inputs: expected two numbers in order, got {low:g} and {high:g}")
    generator = np.random.default_rng(0)
    arrays = []
    for spec in specs:
        kind = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype).kind
        if kind in "iu":
            arrays.append(generator.integers(math.ceil(low), math.floor(high) + 1, spec.shape).astype(spec.dtype))
        elif kind == "b":
            arrays.append(generator.random(spec.shape) < 0.5)
        elif kind == "f" and spec.dtype != "bfloat16":
            arrays.append(channels_last(generator.uniform(low, high, spec.shape).astype(spec.dtype)))
        else:
            raise InputError(f"inputs of {spec.dtype} cannot be drawn: pass an array (.npy)")
    return tuple(arrays)


def inputs_of(engine: Engine, name: str) -> NetworkInputs:
    """Return the inputs of a network. Raises: UnknownModelError, TraceError, InputSizeError."""
    return NetworkInputs(engine.graph(name), engine.example(name), engine.preparation(name))


# ---------------------------------------------------------------- tasks


def draw_tasks(count: int, seed: int | None, models: Sequence[str]) -> list[QueuedTask]:
    """Return ``count`` random tasks over the models; the same seed gives the same tasks."""
    drawn = np.random.default_rng(seed).integers(len(models), size=count)
    return [QueuedTask(number, models[index]) for number, index in enumerate(drawn, start=1)]


def read_task_file(path: Path, canonical_name: Callable[[str], str]) -> list[QueuedTask]:
    """Return the tasks of a file. Each line has a model and optionally an image, relative to the file's directory.

    Blank lines and comments are skipped. Images are not opened here: an unreadable one fails its own task alone.

    Args:   canonical_name: returns the one name of a network, or raises UnknownModelError.
    Raises: UsageError: the file cannot be read, or holds no task. UnknownModelError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # -sig: editors on Windows mark their files
    except OSError as exc:
        raise UsageError(f"task file {path} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"task file {path} cannot be read: it is no UTF-8 text") from exc
    tasks: list[QueuedTask] = []
    for number, line in enumerate(lines, start=1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith(COMMENT):
            continue
        try:
            model = canonical_name(words[0])
        except UsageError as exc:
            raise type(exc)(f"{path}, line {number}: {exc}") from exc
        tasks.append(QueuedTask(len(tasks) + 1, model, path.parent / words[1].rstrip() if len(words) > 1 else None))
    if not tasks:
        raise UsageError(f"task file {path} holds no task: a line is a model and maybe an image, as in: le_net cat.jpg")
    return tasks


def tasks_of_directory(directory: Path, models: Sequence[str]) -> list[QueuedTask]:
    """Return a task for every image of a directory, sorted by name, with the models in turn.

    Raises: UsageError: the directory cannot be listed, or has no image.
    """
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as exc:
        raise UsageError(f"image directory {directory} cannot be read: {exc.strerror or exc}") from exc
    suffixes = image_suffixes() | {*ARRAY_SUFFIXES}
    images = [path for path in files if path.suffix.lower() in suffixes]
    if not images:
        raise UsageError(f"image directory {directory} has no image: put JPEG, PNG or similar files there")
    return [
        QueuedTask(number, model, image)
        for number, (image, model) in enumerate(zip(images, itertools.cycle(models), strict=False), start=1)
    ]


ReadyTask = tuple[QueuedTask, Callable[[], tuple[Array, ...]]]  # and the function that returns its inputs


def inputs_ahead(tasks: Iterable[QueuedTask], models: Mapping[str, NetworkInputs]) -> Iterator[ReadyTask]:
    """Yield every task, and a function that returns its inputs; a thread reads the next `IMAGES_AHEAD` files."""
    reader = ThreadPoolExecutor(1, "images")
    try:
        ready: deque[ReadyTask] = deque()
        for task in tasks:
            if task.image:
                ready.append((task, reader.submit(models[task.model].read, task.image).result))
            else:
                ready.append((task, partial(_given, task.arrays or models[task.model].example)))
            if len(ready) > IMAGES_AHEAD:
                yield ready.popleft()
        yield from ready
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def inputs_of_frames(frames: Iterable[Frame | None], model: str, inputs: NetworkInputs) -> Iterator[ReadyTask | None]:
    """Yield a task for each frame, and a function that returns its inputs; None if there is no frame at the moment."""
    numbers = itertools.count(1)
    for frame in frames:
        task = frame and QueuedTask(next(numbers), model, frame=frame)
        yield (task, partial(inputs.of_frame, frame)) if task and frame else None


def _given(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return arrays
