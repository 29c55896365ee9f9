"""Build layers of drawn configurations, and time them in turn.

Values are 0.5 and weights are means: any ordinary numbers, because no arithmetic unit is faster for some of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.operations import ACTIVATION_NAMES
from neurosurgeon.models.torchvision_compat import import_torchvision
from neurosurgeon.predictor.sampling import Config, Layer
from neurosurgeon.utils.timing import now_ms, thread_ms


class RunnableLayer(NamedTuple):
    """A layer with its inputs: call ``run`` on ``inputs``."""

    run: Callable[..., object]
    inputs: tuple[Tensor, ...]

    def to(self, device: str) -> RunnableLayer:
        """Return the same layer on a device; on a GPU tensors are dense, as networks run there."""
        if device == "cpu":
            return self
        run = self.run.to(device) if isinstance(self.run, nn.Module) else self.run
        return RunnableLayer(run, tuple(value.to(device) for value in self.inputs))


# ---------------------------------------------------------------- timing


def build_layers(block: Sequence[Layer], device: str) -> list[RunnableLayer]:
    """Return the layers of a block, ready to run."""
    return [BUILDERS[kind](config).to(device) for kind, config in block]


def time_layers(layers: Sequence[RunnableLayer], device: str) -> list[float]:
    """Run every layer of a block once, in turn; return the time of each, (layers,), ms."""
    with torch.inference_mode():
        return _time_on_gpu(layers) if device == "cuda" else _time_on_cpu(layers)


def lower_quartile(times_ms: Sequence[float]) -> float:
    """Return the lower quartile of repeated times: that of the device undisturbed."""
    return statistics.quantiles(times_ms, n=4, method="inclusive")[0]


def _time_on_cpu(layers: Sequence[RunnableLayer]) -> list[float]:
    """Time with the clock; a single thread, which other programs may interrupt, by its CPU time if that is less."""
    is_one_thread = torch.get_num_threads() == 1
    times_ms = []
    for run, inputs in layers:
        copies = _fresh_copies(inputs)
        cpu_start_ms, start_ms = thread_ms(), now_ms()
        run(*copies)
        wall_ms, cpu_ms = now_ms() - start_ms, thread_ms() - cpu_start_ms
        times_ms.append(min(wall_ms, cpu_ms) if is_one_thread else wall_ms)
    return times_ms


def _time_on_gpu(layers: Sequence[RunnableLayer]) -> list[float]:
    """Time with events, which the GPU stamps between one layer and the next."""
    events = []
    for run, inputs in layers:
        copies = _fresh_copies(inputs)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run(*copies)
        after.record()
        events.append((before, after))
    torch.cuda.synchronize()
    return [float(before.elapsed_time(after)) for before, after in events]


def _fresh_copies(inputs: Iterable[Tensor]) -> list[Tensor]:
    """Return copies in new memory, the first written last: as if the layer before had just made them."""
    return [torch.empty_like(value).copy_(value) for value in reversed(tuple(inputs))][::-1]


# ---------------------------------------------------------------- building


Builder = Callable[[Config], RunnableLayer]


def _tensor(*shape: int) -> Tensor:
    value = torch.full(shape, 0.5)
    return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value


def _input(config: Config) -> Tensor:
    if config["HW"] == 1 and "kernel" not in config:
        return _tensor(1, config["Cin"])
    return _tensor(1, config["Cin"], config["HW"], config["HW"])


def _module(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module in inference mode, its weights filled without drawing random ones."""
    with torch.device("meta"):
        empty = make()
    module = empty.to_empty(device="cpu").eval()
    for values in (*module.parameters(), *module.buffers()):  # means, so that results stay ordinary numbers
        values.data.fill_(1 / values[0].numel() if values.dim() > 1 else 1)
    filled: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return filled


def _on_plane(make: Callable[[Config], nn.Module]) -> Builder:
    """Return the builder of a module whose input is a feature map of the configuration."""
    return lambda config: RunnableLayer(_module(lambda: make(config)), (_input(config),))


def _build_linear(config: Config) -> RunnableLayer:
    inputs, outputs = config["in_features"], config["out_features"]
    return RunnableLayer(_module(lambda: nn.Linear(inputs, outputs)), (_tensor(1, inputs),))


def _conv(config: Config) -> nn.Module:
    cin, cout, kernel, stride, padding = (config[name] for name in ("Cin", "Cout", "kernel", "stride", "padding"))
    return nn.Conv2d(cin, cout, kernel, stride, padding, groups=config["groups"], bias=bool(config["bias"]))


def _avgpool(config: Config) -> nn.Module:
    if config["kernel"] == 2 and config["output"] > 7:
        return nn.AvgPool2d(2)
    return nn.AdaptiveAvgPool2d(config["output"])


def _build_activation(config: Config) -> RunnableLayer:
    name = ACTIVATION_NAMES[config["function"]]
    run = getattr(functional, name)
    can_work_in_place = name in ("relu", "relu6", "hardswish", "hardsigmoid", "silu")
    return RunnableLayer(partial(run, inplace=bool(config["inplace"])) if can_work_in_place else run, (_input(config),))


def _pair(operation: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    """Return the builder of an operation on two feature maps, or on one and a value for each channel."""

    def build(config: Config) -> RunnableLayer:
        first = _input(config)
        second = _tensor(1, config["Cin"], 1, 1) if config["broadcast"] and first.dim() == 4 else _input(config)
        return RunnableLayer(operation, (first, second))

    return build


def _build_concat(config: Config) -> RunnableLayer:
    inputs, channels = config["inputs"], config["Cin"]
    sizes = [channels // inputs + (index < channels % inputs) for index in range(inputs)]
    parts = [_tensor(1, size, config["HW"], config["HW"]) for size in sizes]
    return RunnableLayer(lambda *tensors: torch.cat(tensors, 1), tuple(parts))


def _build_shuffle(config: Config) -> RunnableLayer:
    channels = max(2, config["Cin"] // 2 * 2)
    value = _tensor(1, channels, config["HW"], config["HW"])
    transposed = value.view(1, 2, channels // 2, config["HW"], config["HW"]).transpose(1, 2)
    return RunnableLayer(Tensor.contiguous, (transposed,))


def _build_matmul(config: Config) -> RunnableLayer:
    batch, rows, inner, columns = (config[name] for name in ("batch", "rows", "inner", "columns"))
    first = _tensor(batch, rows, inner)
    if config["linear"]:
        return RunnableLayer(_module(lambda: nn.Linear(inner, columns)), (first,))
    return RunnableLayer(torch.matmul, (first, _tensor(batch, columns, inner).mT))


def _build_layer_norm(config: Config) -> RunnableLayer:
    width = config["width"]
    return RunnableLayer(_module(lambda: nn.LayerNorm(width)), (_tensor(1, config["rows"], width),))


def _build_softmax(config: Config) -> RunnableLayer:
    return RunnableLayer(partial(torch.softmax, dim=-1), (_tensor(1, config["rows"], config["width"]),))


def _build_attention(config: Config) -> RunnableLayer:
    width, heads = config["width"], config["heads"]
    if not config["windowed"]:
        return RunnableLayer(_module(lambda: _SelfAttention(width, heads)), (_tensor(1, config["tokens"], width),))
    side, windows = math.isqrt(config["tokens"]), math.isqrt(config["groups"])
    tokens = torch.full((1, side * windows, side * windows, width), 0.5)
    return RunnableLayer(_module(lambda: _WindowAttention(width, heads, side)), (tokens,))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class _WindowAttention(nn.Module):
    """The attention of Swin, its windows shifted by half their width as in every second block."""

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


BUILDERS: Mapping[LayerKind, Builder] = {
    LayerKind.CONV: _on_plane(_conv),
    LayerKind.DW_CONV: _on_plane(_conv),
    LayerKind.LINEAR: _build_linear,
    LayerKind.MAXPOOL: _on_plane(lambda config: nn.MaxPool2d(config["kernel"], config["stride"], config["padding"])),
    LayerKind.AVGPOOL: _on_plane(_avgpool),
    LayerKind.BATCHNORM: _on_plane(lambda config: nn.BatchNorm2d(config["Cin"])),
    LayerKind.ACTIVATION: _build_activation,
    LayerKind.ADD: _pair(torch.add),
    LayerKind.MULTIPLY: _pair(torch.mul),
    LayerKind.CONCAT: _build_concat,
    LayerKind.DROPOUT: _on_plane(lambda config: nn.Dropout()),
    LayerKind.FLATTEN: _on_plane(lambda config: nn.Flatten()),
    LayerKind.SHUFFLE: _build_shuffle,
    LayerKind.MATMUL: _build_matmul,
    LayerKind.LAYER_NORM: _build_layer_norm,
    LayerKind.SOFTMAX: _build_softmax,
    LayerKind.ATTENTION: _build_attention,
}
