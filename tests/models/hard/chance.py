"""Random numbers in forward, and contexts in which it computes."""

import contextlib
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.models.hard.table import CHANCE, REFUSED, RIGHT_OR_REFUSED, Base, Table, With

RANDOM = Table("random")
CONTEXTS = Table("contexts")

for name, function in {
    "randn": lambda y: y + torch.randn(1, 8, 16, 16),
    "randn-like": lambda y: y + torch.randn_like(y),
    "rand-like": lambda y: y * torch.rand_like(y),
    "randint": lambda y: y + torch.randint(0, 9, (1, 8, 1, 1)),
    "randperm": lambda y: y[:, torch.randperm(8)] * torch.arange(8.0).view(1, 8, 1, 1),
    "normal-in-place": lambda y: y + torch.empty(1, 8, 1, 1).normal_(),
    "bernoulli": lambda y: y * torch.bernoulli(torch.full_like(y, 0.5)),
    "multinomial": lambda y: y * torch.multinomial(torch.ones(20), 8).view(1, 8, 1, 1),
    "dropout-that-trains": lambda y: F.dropout(y, 0.5, training=True),
    "dropout-by-default": lambda y: F.dropout(y),
    "dropout2d-that-trains": lambda y: F.dropout2d(y, 0.5),
    "alpha-dropout": lambda y: F.alpha_dropout(y, 0.5, training=True),
    "gumbel": lambda y: F.gumbel_softmax(y, dim=1),
    "rrelu-that-trains": lambda y: F.rrelu(y, training=True),
    "distribution": lambda y: y + torch.distributions.Normal(0.0, 1.0).sample((1, 8, 1, 1)),
    "attention-with-dropout": lambda y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5),
    "random-of-python": lambda y: y * (random.random() + 0.5),
    "random-of-numpy": lambda y: y * torch.from_numpy(np.random.rand(8, 1, 1).astype(np.float32)),
}.items():
    RANDOM.add(name, lambda function=function: With(function), REFUSED, CHANCE)


@RANDOM.right
class DropoutModule(Base):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.classify(self.drop(self.stem(x)))


@RANDOM.right
class NoneOfIt(Base):
    def forward(self, x):
        return self.classify(F.dropout(self.stem(x), 0.0, training=True))


@RANDOM.right
class NoiseThatNobodyReads(Base):
    def forward(self, x):
        torch.randn(3)
        return super().forward(x)


@RANDOM.right
class NoiseOnlyInTraining(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y + torch.randn_like(y) if self.training else y)


@RANDOM.row(RIGHT_OR_REFUSED, CHANCE)
class OwnGenerator(Base):
    def forward(self, x):
        return self.classify(self.stem(x) + torch.randn(1, 8, 1, 1, generator=torch.Generator().manual_seed(3)))


@RANDOM.row(RIGHT_OR_REFUSED, CHANCE)
class SeededInForward(Base):
    def forward(self, x):
        torch.manual_seed(3)
        return self.classify(self.stem(x) + torch.randn(1, 8, 1, 1))


@RANDOM.row(REFUSED, CHANCE)
def dropout_that_stays_in_training():
    class Uncertain(Base):
        def train(self, mode=True):
            return super().train(True)

        def forward(self, x):
            return self.classify(F.dropout(self.stem(x), training=self.training))

    return Uncertain()


# ---------------------------------------------------------------- contexts


class Scaled(Base):
    """Has a convolution with large weights, which show the precision of the computation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.conv.weight.data.mul_(30)


@CONTEXTS.right
class AutocastOfPart(Scaled):
    def forward(self, x):
        y = self.stem(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.conv(y)
        return self.classify(z.float())


@CONTEXTS.right
class AutocastDecorator(Scaled):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.classify(self.conv(self.stem(x))).float()


@CONTEXTS.right
class AutocastSwitchedOff(Scaled):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.stem(x)
            with torch.autocast("cpu", enabled=False):
                return self.classify(self.conv(y.float()))


@CONTEXTS.right
class AutocastOfMatrices(Scaled):
    def forward(self, x):
        y = self.conv(self.stem(x)).flatten(2)
        with torch.amp.autocast("cpu", torch.bfloat16):
            z = y @ y.mT
        return self.head(z.float().mean(1) / 100)


@CONTEXTS.right
class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            y = self.stem(x)
        return self.classify(y)


@CONTEXTS.right
class InferenceMode(Base):
    def forward(self, x):
        with torch.inference_mode():
            return super().forward(x)


@CONTEXTS.right
class GradInside(Base):
    def forward(self, x):
        with torch.enable_grad():
            y = self.stem(x)
        return self.classify(y * (2.0 if torch.is_grad_enabled() else 3.0))


@CONTEXTS.row(RIGHT_OR_REFUSED, r"grad|trace")
class GradientAsFeature(Base):
    def forward(self, x):
        with torch.inference_mode(False), torch.enable_grad():
            z = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.stem(z).square().sum(), z)
        return self.classify(self.stem(gradient))


@CONTEXTS.right
class GradientOfFunction(Base):
    def forward(self, x):
        return self.classify(self.stem(torch.func.grad(lambda z: (z**3).sum())(x)))


@CONTEXTS.right
class Vectorised(Base):
    def forward(self, x):
        return self.head(torch.vmap(lambda row: row * row.sum())(self.stem(x).mean(3).mT[0]).mean(0, keepdim=True))


@CONTEXTS.right
class DefaultTypeDouble(Base):
    def forward(self, x):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            factors = torch.linspace(0, 1, 8)
        finally:
            torch.set_default_dtype(before)
        return self.head((self.stem(x).mean((2, 3)) * factors).float())


@CONTEXTS.right
class DeviceContext(Base):
    def forward(self, x):
        with torch.device("cpu"):
            return self.head(self.stem(x).mean((2, 3)) + torch.arange(8.0))


@CONTEXTS.right
class AttentionBackend(Base):
    def forward(self, x):
        y = self.stem(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.classify(F.scaled_dot_product_attention(y, y * 3, y))


@CONTEXTS.right
class OwnContext(Base):
    @contextlib.contextmanager
    def doubled(self):
        self.factor = 2.0
        yield
        self.factor = 1.0

    def forward(self, x):
        with self.doubled():
            y = self.stem(x) * self.factor
        return self.classify(y * self.factor)


@CONTEXTS.right
class ProfilerRange(Base):
    def forward(self, x):
        with torch.profiler.record_function("stem"):
            return super().forward(x)


@CONTEXTS.right
class PrecisionFlag(Base):
    def forward(self, x):
        torch.set_float32_matmul_precision("highest")
        return super().forward(x)


@CONTEXTS.right
class CudnnFlags(Base):
    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            return super().forward(x)
