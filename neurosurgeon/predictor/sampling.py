"""Draw the layers that the collector measures, at random over the space that real networks use.

Draws are log-spaced and follow the habit of networks, whose channels grow as their feature maps shrink; a share of
them follows no habit. The sequence is fixed by its seed, so that a collection can stop and continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.operations import ACTIVATION_NAMES
from neurosurgeon.predictor.kernel_flops import Work, row_work

MAX_GFLOPS = 5.0  # VGG's largest convolution has 3.7
MAX_TENSOR_BYTES = 32e6
MAX_WEIGHT_BYTES = 420e6  # VGG's first linear layer has 411 MB
LONG_MS = 8.0  # a longer layer is drawn less often, in proportion, so that all lengths get about the same time
USUAL_WIDTHS = (7, 14, 28, 56, 112)  # halvings of 224
USUAL_WIDTH_SHARE = 0.6
HABIT_SHARE = 0.6  # of the draws whose channels follow the width
POWER_OF_2_SHARE, MULTIPLE_OF_8_SHARE = 0.35, 0.4

Config = dict[str, int]  # values by column name
Layer = tuple[LayerKind, Config]
Draw = Callable[[np.random.Generator], Config]


class Recipe(NamedTuple):
    """The share of a kind in all rows, and the function that draws a configuration of it."""

    share: float
    draw: Draw


# ---------------------------------------------------------------- drawing


def _draw_log_int(rng: np.random.Generator, low: int, high: int) -> int:
    return int(round(np.exp(rng.uniform(np.log(low), np.log(high)))))


def _draw_width(rng: np.random.Generator) -> int:
    return int(rng.choice(USUAL_WIDTHS)) if rng.random() < USUAL_WIDTH_SHARE else _draw_log_int(rng, 2, 224)


def _draw_channels(rng: np.random.Generator, width: int) -> int:
    if rng.random() < HABIT_SHARE:
        drawn = 80 * (56 / max(width, 4)) ** 0.95 * np.exp(rng.normal(0, 0.9))
        return _round_channels(rng, float(np.clip(drawn, 3, 2304)))
    return _round_channels(rng, _draw_log_int(rng, 3, 2304))


def _round_channels(rng: np.random.Generator, channels: float) -> int:
    """Return channels rounded as in networks: to a power of two or 3/4 of it, to a multiple of 8, or not at all."""
    draw = rng.random()
    if draw < POWER_OF_2_SHARE:
        power = 1 << round(float(np.log2(channels)))
        return max(8, power * 3 // 4 if rng.random() < 0.2 else power)
    return max(8, int(channels) // 8 * 8) if draw < POWER_OF_2_SHARE + MULTIPLE_OF_8_SHARE else int(channels)


def _draw_plane(rng: np.random.Generator) -> Config:
    width = _draw_width(rng)
    return {"HW": width, "Cin": _draw_channels(rng, width)}


def _draw_plane_or_vector(rng: np.random.Generator) -> Config:
    return {"HW": 1, "Cin": _draw_log_int(rng, 8, 25_000)} if rng.random() < 0.2 else _draw_plane(rng)


def _draw_conv(rng: np.random.Generator) -> Config:
    draw = rng.random()
    if draw < 0.06:
        return _draw_stem(rng)
    if draw < 0.14:
        return _draw_squeeze(rng)
    if draw < 0.18:
        return _draw_wide(rng)
    kernel = int(rng.choice([1, 1, 1, 1, 1, 3, 3, 3, 3, 5, 7, int(rng.integers(1, 12))]))
    width = max(_draw_width(rng), kernel)
    cin = _draw_channels(rng, width)
    if rng.random() < 0.4:
        cout = _draw_channels(rng, width)
    else:
        cout = max(4, int(cin * rng.choice([0.25, 0.5, 1, 1, 1, 2, 4])))
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


def _draw_stem(rng: np.random.Generator) -> Config:
    """Draw a first layer, which reads the image."""
    kernel, width = int(rng.choice([3, 3, 5, 7, 7, 11])), int(rng.choice([224, 224, 224, 192, 160, 128, 96]))
    stride = int(rng.choice([1, 2, 2, 2, 4]))
    return _conv_config(rng, width, kernel, stride, int(rng.choice([0, kernel // 2])), 3, _draw_log_int(rng, 8, 96), 1)


def _draw_squeeze(rng: np.random.Generator) -> Config:
    """Draw a convolution of a pooled map, as in squeeze-and-excitation."""
    cin, cout = _draw_log_int(rng, 8, 1200), _draw_log_int(rng, 4, 1200)
    return _conv_config(rng, 1, 1, 1, 0, cin, cout, 1)


def _draw_wide(rng: np.random.Generator) -> Config:
    """Draw a late layer of a wide network, whose weights fill the caches."""
    width, kernel = int(rng.choice([7, 7, 14, 14, 8, 12, 16])), int(rng.choice([1, 3, 3]))
    cin, cout = (_round_channels(rng, _draw_log_int(rng, 384, 2048)) for _ in range(2))
    return _conv_config(rng, width, kernel, int(rng.choice([1, 1, 2])), kernel // 2, cin, cout, 1)


def _conv_config(
    rng: np.random.Generator, width: int, kernel: int, stride: int, padding: int, cin: int, cout: int, groups: int
) -> Config:
    sizes = {"HW": width, "kernel": kernel, "stride": stride, "Cin": cin, "Cout": cout, "padding": padding}
    return {**sizes, "groups": groups, "bias": int(rng.random() < 0.8)}  # a folded batch norm leaves a bias


def _draw_dw_conv(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([3, 3, 3, 3, 5, 5, 7, int(rng.integers(2, 12))]))
    width = max(_draw_width(rng), kernel)
    channels = max(2, _draw_channels(rng, width))
    stride = int(rng.choice([1, 1, 2]))
    return _conv_config(rng, width, kernel, stride, kernel // 2, channels, channels, channels)


def _draw_linear(rng: np.random.Generator) -> Config:
    return {"in_features": _draw_log_int(rng, 32, 50_000), "out_features": _draw_log_int(rng, 10, 4608)}


def _draw_maxpool(rng: np.random.Generator) -> Config:
    kernel = int(rng.choice([2, 3, 3, 3, 5]))
    width = max(kernel, _draw_width(rng))
    config = {"HW": width, "kernel": kernel, "stride": int(rng.choice([1, 2, 2, 2, 3]))}
    return {**config, "Cin": _draw_channels(rng, width), "padding": int(rng.choice([0, kernel // 2]))}


def _draw_avgpool(rng: np.random.Generator) -> Config:
    """Draw a global pool, an adaptive one, or a window of 2 or 3."""
    plane = _draw_plane(rng)
    width = plane["HW"]
    draw = rng.random()
    if draw < 0.5:
        output = 1
    elif draw < 0.75:
        output = min(width, int(rng.choice([2, 4, 6, 7])))
    else:
        output = max(1, width // 2)
    return {**plane, "output": output, "kernel": -(-width // output)}


def _draw_activation(rng: np.random.Generator) -> Config:
    shares = np.array([8, 3, 2, 2, 2, 2, 1, 1], dtype=float)
    function = int(rng.choice(len(ACTIVATION_NAMES), p=shares / shares.sum()))
    return {**_draw_plane_or_vector(rng), "function": function, "inplace": int(rng.random() < 0.7)}


def _draw_broadcast(rng: np.random.Generator, share: float) -> Config:
    return {**_draw_plane(rng), "broadcast": int(rng.random() < share)}


def _draw_concat(rng: np.random.Generator) -> Config:
    config = _draw_plane(rng)
    return {**config, "inputs": min(int(rng.choice([2, 2, 2, 3, 4, 6, 10, 20])), config["Cin"])}


def _draw_matmul(rng: np.random.Generator) -> Config:
    """Draw a linear layer on tokens, or the scores of attention: products of every head, of every window."""
    if rng.random() < 0.6:
        inner = _round_channels(rng, _draw_log_int(rng, 32, 3072))
        columns = _round_channels(rng, inner * float(rng.choice([0.25, 0.5, 1, 2, 3, 4, 4])))
        return {"batch": 1, "rows": _draw_log_int(rng, 8, 6000), "inner": inner, "columns": columns, "linear": 1}
    tokens = int(rng.choice([49, 49, 50, 64, 197, _draw_log_int(rng, 8, 1024)]))
    head = int(rng.choice([32, 32, 64, 80]))
    sizes = (tokens, head, tokens) if rng.random() < 0.5 else (tokens, tokens, head)
    batch = _draw_log_int(rng, 1, 2048)
    return {"batch": batch, "rows": sizes[0], "inner": sizes[1], "columns": sizes[2], "linear": 0}


def _draw_layer_norm(rng: np.random.Generator) -> Config:
    return {"rows": _draw_log_int(rng, 8, 60_000), "width": _round_channels(rng, _draw_log_int(rng, 24, 2048))}


def _draw_softmax(rng: np.random.Generator) -> Config:
    if rng.random() < 0.2:
        return {"rows": 1, "width": _draw_log_int(rng, 10, 25_000)}
    rows = _draw_log_int(rng, 8, 200_000)
    return {"rows": rows, "width": int(rng.choice([49, 50, 64, 197, _draw_log_int(rng, 8, 1024)]))}


def _draw_attention(rng: np.random.Generator) -> Config:
    """Draw attention of all tokens, as in vision transformers, or inside the windows of a map (swin)."""
    heads = int(rng.choice([3, 4, 6, 8, 12, 16, 24, 32]))
    if rng.random() < 0.5:
        tokens = int(rng.choice([50, 197, _draw_log_int(rng, 8, 1024)]))
        width = heads * int(rng.choice([32, 64, 64, 80]))
        return {"groups": 1, "tokens": tokens, "width": width, "heads": heads, "windowed": 0}
    side, windows = int(rng.choice([7, 7, 8])), int(rng.choice([1, 2, 3, 4, 5, 8, 9]))
    return {"groups": windows**2, "tokens": side**2, "width": 32 * heads, "heads": heads, "windowed": 1}


RECIPES: Mapping[LayerKind, Recipe] = {
    LayerKind.CONV: Recipe(0.50, _draw_conv),
    LayerKind.DW_CONV: Recipe(0.12, _draw_dw_conv),
    LayerKind.LINEAR: Recipe(0.05, _draw_linear),
    LayerKind.MAXPOOL: Recipe(0.04, _draw_maxpool),
    LayerKind.AVGPOOL: Recipe(0.05, _draw_avgpool),
    LayerKind.BATCHNORM: Recipe(0.04, _draw_plane),
    LayerKind.ACTIVATION: Recipe(0.08, _draw_activation),
    LayerKind.ADD: Recipe(0.03, partial(_draw_broadcast, share=0.0)),
    LayerKind.MULTIPLY: Recipe(0.03, partial(_draw_broadcast, share=0.8)),
    LayerKind.CONCAT: Recipe(0.03, _draw_concat),
    LayerKind.DROPOUT: Recipe(0.01, _draw_plane_or_vector),
    LayerKind.FLATTEN: Recipe(0.015, _draw_plane),
    LayerKind.SHUFFLE: Recipe(0.01, _draw_plane),
    LayerKind.MATMUL: Recipe(0.06, _draw_matmul),
    LayerKind.LAYER_NORM: Recipe(0.02, _draw_layer_norm),
    LayerKind.SOFTMAX: Recipe(0.02, _draw_softmax),
    LayerKind.ATTENTION: Recipe(0.03, _draw_attention),
}


def draw_layer(rng: np.random.Generator, max_bytes: float, kinds: Sequence[LayerKind] = tuple(RECIPES)) -> Layer:
    """Return a random layer of a random kind, not too large to measure.

    Args: max_bytes: upper limit of the layer's weights and tensors together.
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
    """Return a rough latency of a layer on any machine, ms, to group layers by size."""
    work = row_work(kind, config)
    return 0.005 + work.flops / 50e6 + work.traffic_bytes / 8e6


def is_measurable(work: Work, max_bytes: float) -> bool:
    """Return whether a layer has an output, and is within the limits of time and memory."""
    tensors = max(work.input_bytes, work.output_bytes)
    return (
        work.output_bytes > 0
        and work.flops <= MAX_GFLOPS * 1e9
        and tensors <= MAX_TENSOR_BYTES
        and work.weight_bytes <= MAX_WEIGHT_BYTES
        and work.traffic_bytes <= max_bytes
    )
