"""Which layers the collector measures: drawn at random over the space that real networks use, and built to be run.

Draws are log-spaced and follow the habit of networks, whose channels grow as their feature maps shrink; a share of
them follows no habit at all. The sequence is fixed by its seed, so that a collection can stop and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.operations import ACTIVATION_NAMES
from neurosurgeon.models.torchvision_compat import import_torchvision
from neurosurgeon.predictor.kernel_flops import Work, row_work

MAX_GFLOPS = 5.0  # VGG's largest convolution has 3.7
MAX_TENSOR_BYTES = 32e6
MAX_WEIGHT_BYTES = 420e6  # VGG's first linear layer has 411 MB
LONG_MS = 8.0  # layers beyond are drawn the more rarely the longer they take, so that all lengths get like time
USUAL_WIDTHS = (7, 14, 28, 56, 112)  # halvings of 224
USUAL_WIDTH_SHARE = 0.6
HABIT_SHARE = 0.6  # of the draws whose channels follow the width
POWER_OF_2_SHARE, MULTIPLE_OF_8_SHARE = 0.35, 0.4

Config = dict[str, int]


class Sample(NamedTuple):
    """A layer ready to run: call ``run`` on ``inputs``."""

    run: Callable[..., object]
    inputs: tuple[Tensor, ...]

    def to(self, device: str) -> Sample:
        """Return the same layer on a device; on a GPU tensors are dense, as networks run there."""
        if device == "cpu":
            return self
        run = self.run.to(device) if isinstance(self.run, nn.Module) else self.run
        return Sample(run, tuple(value.to(device) for value in self.inputs))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to draw a configuration of one kind, and how to build the layer it describes."""

    share: float  # of all rows
    draw: Callable[[np.random.Generator], Config]
    build: Callable[[Config], Sample]


# ---------------------------------------------------------------- drawing


def _log_int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(round(np.exp(rng.uniform(np.log(low), np.log(high)))))


def _width(rng: np.random.Generator, low: int = 2) -> int:
    return int(rng.choice(USUAL_WIDTHS)) if rng.random() < USUAL_WIDTH_SHARE else _log_int(rng, low, 224)


def _channels(rng: np.random.Generator, width: int) -> int:
    if rng.random() < HABIT_SHARE:
        drawn = 80 * (56 / max(width, 4)) ** 0.95 * np.exp(rng.normal(0, 0.9))
        return _rounded(rng, float(np.clip(drawn, 3, 2304)))
    return _rounded(rng, _log_int(rng, 3, 2304))


def _rounded(rng: np.random.Generator, channels: float) -> int:
    """Round as networks do: to a power of two, or three of them; to a multiple of 8; or not at all."""
    draw = rng.random()
    if draw < POWER_OF_2_SHARE:
        power = 1 << round(float(np.log2(channels)))
        return max(8, power * 3 // 4 if rng.random() < 0.2 else power)
    return max(8, int(channels) // 8 * 8) if draw < POWER_OF_2_SHARE + MULTIPLE_OF_8_SHARE else int(channels)


def _plane(rng: np.random.Generator) -> Config:
    width = _width(rng)
    return {"HW": width, "Cin": _channels(rng, width)}


def _plane_or_vector(rng: np.random.Generator) -> Config:
    return {"HW": 1, "Cin": _log_int(rng, 8, 25_000)} if rng.random() < 0.2 else _plane(rng)


def _conv(rng: np.random.Generator) -> Config:
    draw = rng.random()
    if draw < 0.06:
        return _stem(rng)
    if draw < 0.14:
        return _squeeze(rng)
    if draw < 0.18:
        return _wide(rng)
    kernel = int(rng.choice([1, 1, 1, 1, 1, 3, 3, 3, 3, 5, 7, int(rng.integers(1, 12))]))
    width = max(_width(rng), kernel)
    cin = _channels(rng, width)
    cout = _channels(rng, width) if rng.random() < 0.4 else max(4, int(cin * rng.choice([0.25, 0.5, 1, 1, 1, 2, 4])))
    groups = 1
    if draw > 0.86:
        group_width = int(rng.choice([4, 8, 16, 24, 32, 48, 64]))
        groups = max(2, cin // group_width)
        cin = groups * group_width
        cout = cin if rng.random() < 0.8 else groups * max(1, cout // groups)
        kernel = 3 if kernel == 1 else kernel
    stride = int(rng.choice([1, 1, 1, 1, 1, 2, 2, 3])) if width > kernel else 1
    padding = kernel // 2 if rng.random() < 0.85 else 0
    return _conv_config(rng, max(width, kernel), kernel, stride, padding, cin, cout, groups)


def _stem(rng: np.random.Generator) -> Config:
    """Draw a first layer, which reads the image."""
    kernel, width = int(rng.choice([3, 3, 5, 7, 7, 11])), int(rng.choice([224, 224, 224, 192, 160, 128, 96]))
    stride = int(rng.choice([1, 2, 2, 2, 4]))
    return _conv_config(rng, width, kernel, stride, int(rng.choice([0, kernel // 2])), 3, _log_int(rng, 8, 96), 1)


def _squeeze(rng: np.random.Generator) -> Config:
    """Draw a convolution of a pooled map, as in squeeze-and-excitation."""
    cin, cout = _log_int(rng, 8, 1200), _log_int(rng, 4, 1200)
    return _conv_config(rng, 1, 1, 1, 0, cin, cout, 1)


def _wide(rng: np.random.Generator) -> Config:
    """Draw a late layer of a wide network, whose weights fill the caches."""
    width, kernel = int(rng.choice([7, 7, 14, 14, 8, 12, 16])), int(rng.choice([1, 3, 3]))
    cin, cout = (_rounded(rng, _log_int(rng, 384, 2048)) for _ in range(2))
    return _conv_config(rng, width, kernel, int(rng.choice([1, 1, 2])), kernel // 2, cin, cout, 1)


def _conv_config(
    rng: np.random.Generator, width: int, kernel: int, stride: int, padding: int, cin: int, cout: int, groups: int
) -> Config:
    return {
        "HW": width,
        "kernel": kernel,
        "stride": stride,
        "Cin": cin,
        "Cout": cout,
        "padding": padding,
        "groups": groups,
        "bias": int(rng.random() < 0.8),  # a folded batch norm leaves one
    }


def _dw_conv(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([3, 3, 3, 3, 5, 5, 7, int(rng.integers(2, 12))]))
    width = max(_width(rng), kernel)
    channels = max(2, _channels(rng, width))
    stride = int(rng.choice([1, 1, 2]))
    return _conv_config(rng, width, kernel, stride, kernel // 2, channels, channels, channels)


def _linear(rng: np.random.Generator) -> Config:
    return {"in_features": _log_int(rng, 32, 50_000), "out_features": _log_int(rng, 10, 4608)}


def _maxpool(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([2, 3, 3, 3, 5]))
    width = max(kernel, _width(rng))
    return {
        "HW": width,
        "kernel": kernel,
        "stride": int(rng.choice([1, 2, 2, 2, 3])),
        "Cin": _channels(rng, width),
        "padding": int(rng.choice([0, kernel // 2])),
    }


def _avgpool(rng: np.random.Generator) -> Config:
    """Draw a global pool, an adaptive one, or a window of 2 or 3."""
    plane = _plane(rng)
    width = plane["HW"]
    draw = rng.random()
    if draw < 0.5:
        output = 1
    elif draw < 0.75:
        output = min(width, int(rng.choice([2, 4, 6, 7])))
    else:
        output = max(1, width // 2)
    return {**plane, "output": output, "kernel": -(-width // output)}


def _activation(rng: np.random.Generator) -> Config:
    shares = np.array([8, 3, 2, 2, 2, 2, 1, 1], dtype=float)
    function = int(rng.choice(len(ACTIVATION_NAMES), p=shares / shares.sum()))
    return {**_plane_or_vector(rng), "function": function, "inplace": int(rng.random() < 0.7)}


def _broadcast(rng: np.random.Generator, share: float) -> Config:
    return {**_plane(rng), "broadcast": int(rng.random() < share)}


def _concat(rng: np.random.Generator) -> Config:
    config = _plane(rng)
    return {**config, "inputs": min(int(rng.choice([2, 2, 2, 3, 4, 6, 10, 20])), config["Cin"])}


def _matmul(rng: np.random.Generator) -> Config:
    """Draw a linear layer on tokens, or the scores of attention: products of every head, of every window."""
    if rng.random() < 0.6:
        inner = _rounded(rng, _log_int(rng, 32, 3072))
        columns = _rounded(rng, inner * float(rng.choice([0.25, 0.5, 1, 2, 3, 4, 4])))
        return {"batch": 1, "rows": _log_int(rng, 8, 6000), "inner": inner, "columns": columns, "linear": 1}
    tokens, head = int(rng.choice([49, 49, 50, 64, 197, _log_int(rng, 8, 1024)])), int(rng.choice([32, 32, 64, 80]))
    sizes = (tokens, head, tokens) if rng.random() < 0.5 else (tokens, tokens, head)
    batch = _log_int(rng, 1, 2048)
    return {"batch": batch, "rows": sizes[0], "inner": sizes[1], "columns": sizes[2], "linear": 0}


def _layer_norm(rng: np.random.Generator) -> Config:
    return {"rows": _log_int(rng, 8, 60_000), "width": _rounded(rng, _log_int(rng, 24, 2048))}


def _softmax(rng: np.random.Generator) -> Config:
    if rng.random() < 0.2:
        return {"rows": 1, "width": _log_int(rng, 10, 25_000)}
    return {"rows": _log_int(rng, 8, 200_000), "width": int(rng.choice([49, 50, 64, 197, _log_int(rng, 8, 1024)]))}


def _attention(rng: np.random.Generator) -> Config:
    """Draw attention of all tokens, as in vision transformers, or inside the windows of a map (swin)."""
    heads = int(rng.choice([3, 4, 6, 8, 12, 16, 24, 32]))
    if rng.random() < 0.5:
        tokens, width = int(rng.choice([50, 197, _log_int(rng, 8, 1024)])), heads * int(rng.choice([32, 64, 64, 80]))
        return {"groups": 1, "tokens": tokens, "width": width, "heads": heads, "windowed": 0}
    side, windows = int(rng.choice([7, 7, 8])), int(rng.choice([1, 2, 3, 4, 5, 8, 9]))
    return {"groups": windows**2, "tokens": side**2, "width": 32 * heads, "heads": heads, "windowed": 1}


# ---------------------------------------------------------------- building


def _tensor(*shape: int) -> Tensor:
    value = torch.full(shape, 0.5)  # any ordinary number: no arithmetic unit looks at it
    return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value


def _input(config: Config) -> Tensor:
    if config["HW"] == 1 and "kernel" not in config:
        return _tensor(1, config["Cin"])
    return _tensor(1, config["Cin"], config["HW"], config["HW"])


def _of_module(make: Callable[[Config], nn.Module]) -> Callable[[Config], Sample]:
    def build(config: Config) -> Sample:
        with torch.device("meta"):
            empty = make(config)
        module = empty.to_empty(device="cpu").eval()
        for values in (*module.parameters(), *module.buffers()):  # means, so that results stay ordinary numbers
            values.data.fill_(1 / values[0].numel() if values.dim() > 1 else 1)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Sample(module, (_input(config),))

    return build


def _build_linear(config: Config) -> Sample:
    sample = _of_module(lambda c: nn.Linear(c["in_features"], c["out_features"]))({**config, "HW": 1, "Cin": 1})
    return Sample(sample.run, (_tensor(1, config["in_features"]),))


def _conv_module(config: Config) -> nn.Module:
    return nn.Conv2d(
        config["Cin"],
        config["Cout"],
        config["kernel"],
        config["stride"],
        config["padding"],
        groups=config["groups"],
        bias=bool(config["bias"]),
    )


def _avgpool_module(config: Config) -> nn.Module:
    if config["kernel"] == 2 and config["output"] > 7:
        return nn.AvgPool2d(2)
    return nn.AdaptiveAvgPool2d(config["output"])


def _build_activation(config: Config) -> Sample:
    run = getattr(functional, ACTIVATION_NAMES[config["function"]])
    can_work_in_place = ACTIVATION_NAMES[config["function"]] in ("relu", "relu6", "hardswish", "hardsigmoid", "silu")
    return Sample(partial(run, inplace=bool(config["inplace"])) if can_work_in_place else run, (_input(config),))


def _build_pair(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Config], Sample]:
    def build(config: Config) -> Sample:
        first = _input(config)
        second = _tensor(1, config["Cin"], 1, 1) if config["broadcast"] and first.dim() == 4 else _input(config)
        return Sample(operation, (first, second))

    return build


def _build_concat(config: Config) -> Sample:
    inputs, channels = config["inputs"], config["Cin"]
    sizes = [channels // inputs + (index < channels % inputs) for index in range(inputs)]
    parts = [_input({"HW": config["HW"], "Cin": size, "kernel": 0}) for size in sizes]
    return Sample(lambda *tensors: torch.cat(tensors, 1), tuple(parts))


def _build_matmul(config: Config) -> Sample:
    first = _tensor(config["batch"], config["rows"], config["inner"])
    if config["linear"]:
        return Sample(_of_module(lambda c: nn.Linear(c["inner"], c["columns"]))(_NO_PLANE | config).run, (first,))
    return Sample(torch.matmul, (first, _tensor(config["batch"], config["columns"], config["inner"]).mT))


def _build_layer_norm(config: Config) -> Sample:
    norm = _of_module(lambda c: nn.LayerNorm(c["width"]))(_NO_PLANE | config)
    return Sample(norm.run, (_tensor(1, config["rows"], config["width"]),))


def _build_softmax(config: Config) -> Sample:
    return Sample(partial(torch.softmax, dim=-1), (_tensor(1, config["rows"], config["width"]),))


def _build_attention(config: Config) -> Sample:
    width, heads = config["width"], config["heads"]
    if not config["windowed"]:
        module = _of_module(lambda c: _SelfAttention(width, heads))(_NO_PLANE | config).run
        return Sample(module, (_tensor(1, config["tokens"], width),))
    side, windows = math.isqrt(config["tokens"]), math.isqrt(config["groups"])
    module = _of_module(lambda c: _WindowAttention(width, heads, side))(_NO_PLANE | config).run
    return Sample(module, (torch.full((1, side * windows, side * windows, width), 0.5),))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class _WindowAttention(nn.Module):
    """Swin's attention, its windows shifted by half as in every second block."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.empty(1, heads, side * side, side * side))
        self.heads, self.side = heads, side
        self.attend = import_torchvision("torchvision.models.swin_transformer").shifted_window_attention

    def forward(self, x: Tensor) -> Tensor:
        sides = [self.side, self.side]
        shift = [self.side // 2, self.side // 2]
        weights = (self.qkv.weight, self.projection.weight, self.bias)
        biases = {"qkv_bias": self.qkv.bias, "proj_bias": self.projection.bias}
        output: Tensor = self.attend(x, *weights, sides, self.heads, shift, **biases, training=False)
        return output


_NO_PLANE = {"HW": 1, "Cin": 1}  # what `_of_module` makes an input of, which is not used


def _build_shuffle(config: Config) -> Sample:
    channels = max(2, config["Cin"] // 2 * 2)
    value = _tensor(1, channels, config["HW"], config["HW"])
    transposed = value.view(1, 2, channels // 2, config["HW"], config["HW"]).transpose(1, 2)
    return Sample(Tensor.contiguous, (transposed,))


RECIPES: Mapping[LayerKind, Recipe] = {
    LayerKind.CONV: Recipe(0.50, _conv, _of_module(_conv_module)),
    LayerKind.DW_CONV: Recipe(0.12, _dw_conv, _of_module(_conv_module)),
    LayerKind.LINEAR: Recipe(0.05, _linear, _build_linear),
    LayerKind.MAXPOOL: Recipe(
        0.04, _maxpool, _of_module(lambda c: nn.MaxPool2d(c["kernel"], c["stride"], c["padding"]))
    ),
    LayerKind.AVGPOOL: Recipe(0.05, _avgpool, _of_module(_avgpool_module)),
    LayerKind.BATCHNORM: Recipe(0.04, _plane, _of_module(lambda c: nn.BatchNorm2d(c["Cin"]))),
    LayerKind.ACTIVATION: Recipe(0.08, _activation, _build_activation),
    LayerKind.ADD: Recipe(0.03, partial(_broadcast, share=0.0), _build_pair(torch.add)),
    LayerKind.MULTIPLY: Recipe(0.03, partial(_broadcast, share=0.8), _build_pair(torch.mul)),
    LayerKind.CONCAT: Recipe(0.03, _concat, _build_concat),
    LayerKind.DROPOUT: Recipe(0.01, _plane_or_vector, _of_module(lambda c: nn.Dropout())),
    LayerKind.FLATTEN: Recipe(0.015, _plane, _of_module(lambda c: nn.Flatten())),
    LayerKind.SHUFFLE: Recipe(0.01, _plane, _build_shuffle),
    LayerKind.MATMUL: Recipe(0.06, _matmul, _build_matmul),
    LayerKind.LAYER_NORM: Recipe(0.02, _layer_norm, _build_layer_norm),
    LayerKind.SOFTMAX: Recipe(0.02, _softmax, _build_softmax),
    LayerKind.ATTENTION: Recipe(0.03, _attention, _build_attention),
}


def draw_layer(
    rng: np.random.Generator, max_bytes: float, kinds: Sequence[LayerKind] = tuple(RECIPES)
) -> tuple[LayerKind, Config]:
    """Return a random layer of a random kind, not too large to measure.

    Args: max_bytes: of one layer's weights and tensors, where memory is short.
    """
    shares = np.array([RECIPES[kind].share for kind in kinds])
    shares /= shares.sum()
    while True:
        kind = kinds[rng.choice(len(kinds), p=shares)]
        config = RECIPES[kind].draw(rng)
        is_affordable = rng.random() < LONG_MS / expected_ms(kind, config)
        if is_affordable and is_measurable(row_work(kind, config), max_bytes):
            return kind, config


def expected_ms(kind: LayerKind, config: Config) -> float:
    """Return about what a layer takes on any machine: good enough to group layers by size."""
    work = row_work(kind, config)
    return 0.005 + work.flops / 50e6 + (work.input_bytes + work.output_bytes + work.weight_bytes) / 8e6


def is_measurable(work: Work, max_bytes: float) -> bool:
    """Return whether a layer has an output, and fits into time and memory."""
    tensors = max(work.input_bytes, work.output_bytes)
    return (
        work.output_bytes > 0
        and work.flops <= MAX_GFLOPS * 1e9
        and tensors <= MAX_TENSOR_BYTES
        and work.weight_bytes <= MAX_WEIGHT_BYTES
        and work.input_bytes + work.output_bytes + work.weight_bytes <= max_bytes
    )
