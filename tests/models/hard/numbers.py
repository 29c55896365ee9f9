"""Types of numbers: half, bfloat16, double, complex, integers, and mixtures."""

import torch
from torch import nn

from tests.models.hard.table import REFUSED, RIGHT_OR_REFUSED, Base, Normed, Table, features, image

NUMBERS = Table("numbers")


@NUMBERS.right
class BfloatWeights(Normed):
    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16()).float()


@NUMBERS.right
class HalfWeights(Normed):
    def __init__(self):
        super().__init__()
        self.half()

    def forward(self, x):
        return super().forward(x.half()).float()


@NUMBERS.row(inputs=image().half())
def half_throughout():
    return Base().half()


@NUMBERS.row(inputs=image().bfloat16())
def bfloat16_throughout():
    return Base().bfloat16()


@NUMBERS.row(inputs=image().double())
def double_throughout():
    return Normed().double()


@NUMBERS.right
class DoubleHead(Base):
    def __init__(self):
        super().__init__()
        self.head.double()

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)).double())


@NUMBERS.row(REFUSED, r"Half|float16|type")
def half_weights_float_input():
    return Base().half()


@NUMBERS.row(REFUSED, r"Double|float64|type")
def double_weights_float_input():
    return Base().double()


@NUMBERS.right
class DoubleBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("epoch", torch.full((8,), 2.0**30 + 1.5, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)) + (self.epoch - 2.0**30).float())


@NUMBERS.right
class ComplexWeights(Base):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x):
        return self.head((self.stem(x).mean((2, 3)).to(torch.complex64) @ self.turn).abs())


@NUMBERS.right
class RotaryAngles(Base):
    def __init__(self):
        super().__init__()
        self.angles = torch.polar(torch.ones(16, 4), torch.arange(64.0).view(16, 4))

    def forward(self, x):
        y = torch.view_as_complex(self.stem(x).mean(3).mT.reshape(1, 16, 4, 2).contiguous())
        return self.head(torch.view_as_real(y * self.angles).flatten(2).mean(1))


@NUMBERS.row(inputs=features(1, 8).to(torch.complex64))
class ComplexInput(Base):
    def forward(self, x):
        return self.head((x * x.conj() + x).real)


@NUMBERS.row(inputs=torch.arange(8)[None])
class IntegerInput(Base):
    def forward(self, x):
        return self.head(x.float()) + x.sum() // 3


@NUMBERS.row(inputs=(torch.arange(8, dtype=torch.uint8)[None], torch.arange(8, dtype=torch.int16)[None]))
class SmallIntegers(Base):
    def forward(self, x, z):
        return self.head((x * 40 + z * 3).float() / 100)


@NUMBERS.row(inputs=features(1, 8) > 0)
class TruthValuesAsInput(Base):
    def forward(self, x):
        return self.head((x ^ ~x.roll(1)).float())


@NUMBERS.right
class IntegersCross(Base):
    def forward(self, x):
        y = (self.stem(x) * 10).long()
        return self.classify((y // 3 % 5 << 2).float())


@NUMBERS.right
class MixedPromotion(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify((y.half() + y.double() * y.gt(0)).to(y))


@NUMBERS.right
class RoundToInteger(Base):
    def forward(self, x):
        y = self.stem(x)
        scale = y.abs().amax() / 127
        return self.classify((y / scale).round().clamp(-128, 127).to(torch.int8).float() * scale)


@NUMBERS.row(RIGHT_OR_REFUSED, r"float8|type")
class EightBitFloats(Base):
    def forward(self, x):
        return self.classify(self.stem(x).to(torch.float8_e4m3fn).float())


@NUMBERS.right
class LargeAndSmall(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify((y * 1e30) * 1e-30 + y.double().mul(1e200).div(1e200).float())


@NUMBERS.right
class NotANumberReplaced(Base):
    def forward(self, x):
        return self.classify(torch.nan_to_num(self.stem(x).log(), nan=-3.0, posinf=1.0, neginf=-9.0))


@NUMBERS.right
class BitsOfFloats(Base):
    def forward(self, x):
        bits = self.stem(x).view(torch.int32) & 0x7F800000
        return self.classify((bits >> 23).float() / 100)
