"""Pairs of networks under one name: those that compute different things need different digests, the others equal ones.

A network has two digests, of its graph and of its weights; a pair differs if either does.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models.hard.table import Base, Normed, With, features, image

Build = Callable[[], nn.Module]

HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        {setting}

    def forward(self, x{arguments}):
        y = self.stem(x)
        return {answer}
"""


@dataclass(frozen=True)
class Pair:
    """Two functions that build the networks of the edge and of the cloud, and the inputs of both."""

    name: str
    edge: Build
    cloud: Build
    inputs: Any = field(default_factory=image)
    equal: bool = False


def of_text(text: str, file: str = "net.py") -> Build:
    """Return a function that builds ``Net`` of a model file with this text, in a new directory."""

    def build() -> nn.Module:
        path = Path(tempfile.mkdtemp(prefix="digest_pair_")) / file
        path.write_text(HEAD + text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        net: nn.Module = module.Net()
        return net

    return build


def net(answer: str = "y.mean((2, 3))", setting: str = "pass", arguments: str = "", before: str = "") -> str:
    """Return the text of a network with a convolution, with other parts filled in."""
    return before + NET.format(answer=answer, setting=setting, arguments=arguments)


def texts(name: str, one: str, other: str, *, equal: bool = False) -> Pair:
    """Return the pair of two model files."""
    return Pair(name, of_text(one), of_text(other), equal=equal)


def changed(build: Build, change: Callable[[Any], object]) -> Build:
    """Return a function that builds a network, and then changes it."""

    def build_changed() -> nn.Module:
        module = build()
        change(module)
        return module

    return build_changed


def calling(part: Build) -> Build:
    """Return a function that builds a network whose features go through a part."""
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3), part())


# ---------------------------------------------------------------- settings of modules of torch

SEQUENCE = features(2, 4, 8)


class Attention(nn.Module):
    """Attends to itself."""

    def __init__(self, heads: int, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, heads, **settings)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def encoder(**settings: Any) -> Build:
    """Return a function that builds a layer of a transformer."""
    return lambda: nn.TransformerEncoderLayer(8, 2, 16, **settings)


MODULES = [
    Pair("attention-heads", lambda: Attention(2), lambda: Attention(4), SEQUENCE),
    Pair("attention-batch-first", lambda: Attention(2), lambda: Attention(2, batch_first=True), SEQUENCE),
    Pair("encoder-norm-first", encoder(), encoder(norm_first=True), SEQUENCE),
    Pair("encoder-activation", encoder(), encoder(activation="gelu"), SEQUENCE),
    Pair("encoder-eps", encoder(), encoder(layer_norm_eps=1e-2), SEQUENCE),
    Pair("layer-norm-eps", lambda: nn.LayerNorm(8), lambda: nn.LayerNorm(8, eps=0.1), SEQUENCE),
    Pair("lstm-batch-first", lambda: nn.LSTM(8, 8), lambda: nn.LSTM(8, 8, batch_first=True), SEQUENCE),
    Pair("rnn-nonlinearity", lambda: nn.RNN(8, 8), lambda: nn.RNN(8, 8, nonlinearity="relu"), SEQUENCE),
    Pair("batch-norm-eps", Normed, changed(Normed, lambda net: setattr(net.norm, "eps", 0.1))),
    *(
        Pair(name, calling(one), calling(other))
        for name, one, other in (
            ("group-norm-groups", lambda: nn.GroupNorm(2, 8), lambda: nn.GroupNorm(4, 8)),
            ("average-pool-edges", lambda: nn.AvgPool2d(3, 2, 1), lambda: nn.AvgPool2d(3, 2, 1, False, False)),
            ("average-pool-divisor", lambda: nn.AvgPool2d(3), lambda: nn.AvgPool2d(3, divisor_override=5)),
            ("pool-kind", lambda: nn.AvgPool2d(2), lambda: nn.MaxPool2d(2)),
            ("pool-ceil", lambda: nn.MaxPool2d(3, 2), lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("pool-dilation", lambda: nn.MaxPool2d(3, 1), lambda: nn.MaxPool2d(3, 1, dilation=2)),
            (
                "upsample-corners",
                lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
                lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            ),
            ("upsample-mode", lambda: nn.Upsample((40, 40)), lambda: nn.Upsample((40, 40), mode="bicubic")),
            (
                "conv-padding-mode",
                lambda: nn.Conv2d(8, 8, 3, padding=1),
                lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            ),
            (
                "conv-dilation",
                lambda: nn.Conv2d(8, 8, 3, padding=1),
                lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
            ),
            (
                "conv-stride-order",
                lambda: nn.Conv2d(8, 8, 1, stride=(1, 2)),
                lambda: nn.Conv2d(8, 8, 1, stride=(2, 1)),
            ),
            ("leaky-slope", lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)),
            ("elu-alpha", lambda: nn.ELU(1.0), lambda: nn.ELU(2.0)),
            ("gelu-approximate", lambda: nn.GELU(), lambda: nn.GELU("tanh")),
            ("softmax-dim", lambda: nn.Softmax(1), lambda: nn.Softmax(2)),
            ("hardtanh-limits", lambda: nn.Hardtanh(-1, 1), lambda: nn.Hardtanh(-2, 2)),
            ("limits-of-values", lambda: nn.ReLU6(), lambda: nn.Hardtanh(0, 1)),
            ("pixel-shuffle", lambda: nn.PixelShuffle(2), lambda: nn.Sequential(nn.PixelShuffle(2), nn.Tanh())),
            ("pad-value", lambda: nn.ConstantPad2d(1, 0.0), lambda: nn.ConstantPad2d(1, 1.0)),
            ("flatten-dims", lambda: nn.Flatten(1), lambda: nn.Flatten(2)),
        )
    ),
]

# ---------------------------------------------------------------- code of the user

CODE = [
    texts("body", net("y.mean((2, 3))"), net("y.amax((2, 3))")),
    texts("number-in-body", net("y * 2.0"), net("y * 3.0")),
    texts("order-of-operands", net("y - x.mean()"), net("x.mean() - y")),
    texts("order-of-outputs", net("y, y * 2"), net("y * 2, y")),
    texts("names-of-outputs", net("{'a': y, 'b': y * 2}"), net("{'b': y, 'a': y * 2}")),
    texts("order-of-calls", net("y.relu().cumsum(2)"), net("y.cumsum(2).relu()")),
    texts("global-number", net("y * SCALE", before="SCALE = 2.0\n"), net("y * SCALE", before="SCALE = 3.0\n")),
    texts("global-dict", net("y * S['a']", before="S = {'a': 2.0}\n"), net("y * S['a']", before="S = {'a': 3.0}\n")),
    texts(
        "global-tensor",
        net("y * TABLE", before="TABLE = torch.tensor(2.0)\n"),
        net("y * TABLE", before="TABLE = torch.tensor(3.0)\n"),
    ),
    texts("attribute", net("y * self.scale", "self.scale = 2.0"), net("y * self.scale", "self.scale = 3.0")),
    texts("attribute-in-list", net("y * self.s[1]", "self.s = [1, 2]"), net("y * self.s[1]", "self.s = [1, 3]")),
    texts(
        "tensor-attribute", net("y * self.t", "self.t = torch.ones(1)"), net("y * self.t", "self.t = torch.zeros(1)")
    ),
    texts(
        "class-attribute",
        net("y * self.scale") + "\nNet.scale = 2.0\n",
        net("y * self.scale") + "\nNet.scale = 3.0\n",
    ),
    texts("default-argument", net("y * by", arguments=", by=2.0"), net("y * by", arguments=", by=3.0")),
    texts("default-keyword", net("y * by", arguments=", *, by=2.0"), net("y * by", arguments=", *, by=3.0")),
    texts("activation-as-attribute", net("self.act(y)", "self.act = F.relu"), net("self.act(y)", "self.act = F.gelu")),
    texts(
        "lambda-as-attribute",
        net("self.act(y)", "self.act = lambda y: y * 2"),
        net("self.act(y)", "self.act = lambda y: y * 3"),
    ),
    texts(
        "helper",
        net("helper(y)", before="def helper(y):\n    return y * 2\n"),
        net("helper(y)", before="def helper(y):\n    return y * 3\n"),
    ),
    texts(
        "helper-of-helper",
        net("outer(y)", before="def inner(y):\n    return y * 2\ndef outer(y):\n    return inner(y)\n"),
        net("outer(y)", before="def inner(y):\n    return y * 3\ndef outer(y):\n    return inner(y)\n"),
    ),
    texts(
        "wrapped-helper",
        net("helper(y)", before="import torch.fx\n@torch.fx.wrap\ndef helper(y):\n    return y * 2\n"),
        net("helper(y)", before="import torch.fx\n@torch.fx.wrap\ndef helper(y):\n    return y * 3\n"),
    ),
    texts(
        "numpy-constant", net("y * N.pi", before="import numpy as N\n"), net("y * N.e", before="import numpy as N\n")
    ),
    texts("type-of-constant", net("y * torch.ones(1)"), net("y * torch.ones(1, dtype=torch.float64)")),
    texts("type-of-answer", net("y.half()"), net("y.bfloat16()")),
    texts("constant-output", net("(y, 3)"), net("(y, 4)")),
    texts("condition-on-size", net("y * 2 if y.shape[2] > 3 else y"), net("y * 2 if y.shape[2] > 300 else y")),
    texts(
        "branch-of-cond",
        net("torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t * 3, (y,))"),
        net("torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t * 4, (y,))"),
    ),
]

# ---------------------------------------------------------------- hooks, replaced methods, closures, weights


def hooked(by: float) -> Callable[[Any], object]:
    """Return a function that adds a forward hook."""
    return lambda net: net.stem.register_forward_hook(lambda module, given, made: made * by)


def patched(by: float) -> Callable[[Any], object]:
    """Return a function that replaces the forward of a part."""
    return lambda net: setattr(net.head, "forward", lambda y: y * by)


def partly(by: float) -> Build:
    """Return a function that builds a network with a partial function as attribute."""
    return lambda: With(functools.partial(torch.mul, other=by))


CHANGED = [
    Pair("hook-or-none", Base, changed(Base, hooked(2.0))),
    Pair("hook-closure", changed(Base, hooked(2.0)), changed(Base, hooked(3.0))),
    Pair(
        "hook-before",
        Base,
        changed(Base, lambda net: net.stem.register_forward_pre_hook(lambda module, given: (given[0] * 2,))),
    ),
    Pair("patched-or-not", Base, changed(Base, patched(2.0))),
    Pair("patched-closure", changed(Base, patched(2.0)), changed(Base, patched(3.0))),
    Pair("partial-argument", partly(2.0), partly(3.0)),
    Pair("closure", lambda: With(lambda y: y * 2), lambda: With(lambda y: y * 3)),
    Pair("weights", Base, changed(Base, lambda net: net.head.weight.data.mul_(2.0))),
    Pair("running-mean", Normed, changed(Normed, lambda net: net.norm.running_mean.add_(1.0))),
    Pair(
        "type-of-features",
        lambda: With(lambda y: y.half().cumsum(2).float()),
        lambda: With(lambda y: y.cumsum(2)),
    ),
    Pair("norm-or-identity", Normed, changed(Normed, lambda net: setattr(net, "norm", nn.Identity()))),
]
# ---------------------------------------------------------------- equal ones

PLAIN = net("y.mean((2, 3))")
TWICE = net("helper(y)", before="def helper(y):\n    return y * 2\n")
EQUAL = [
    Pair("built-twice", Base, Base, equal=True),
    Pair("built-twice-with-norm", Normed, Normed, equal=True),
    Pair("built-twice-with-hook", changed(Base, hooked(2.0)), changed(Base, hooked(2.0)), equal=True),
    Pair("built-twice-with-patch", changed(Base, patched(2.0)), changed(Base, patched(2.0)), equal=True),
    Pair("built-twice-with-partial", partly(2.0), partly(2.0), equal=True),
    Pair("attention-built-twice", lambda: Attention(2), lambda: Attention(2), SEQUENCE, equal=True),
    Pair("other-folder", of_text(TWICE), of_text(TWICE), equal=True),
    Pair("other-file", of_text(PLAIN), of_text(PLAIN, "other.py"), equal=True),
    texts("comment", PLAIN, PLAIN.replace("return", "# the mean\n        return"), equal=True),
    texts("comment-in-helper", TWICE, TWICE.replace("return y * 2", "return y * 2  # twice"), equal=True),
    texts("blank-lines-before", PLAIN, "\n\n\n" + PLAIN, equal=True),
    texts("unused-function", PLAIN, "def unused():\n    return 3\n" + PLAIN, equal=True),
]

PAIRS: tuple[Pair, ...] = (*MODULES, *CODE, *CHANGED, *EQUAL)
