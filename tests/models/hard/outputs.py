"""What forward returns, and the inputs that it takes."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.models.hard.table import REFUSED, RIGHT_OR_REFUSED, Base, Table, features, image

OUTPUTS = Table("outputs")
INPUTS = Table("inputs")
NO_TENSOR = r"tensor|output|return"

Pair = namedtuple("Pair", "logits features")


class TypedPair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Result:
    logits: Tensor
    features: Tensor | None = None
    name: str = "result"


class Answers(Base):
    """Returns what a function makes of itself, the input and the features."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        y = self.stem(x)
        return self.function(self, x, y)


for name, function in {
    "tuple": lambda net, x, y: (net.classify(y), y),
    "tuple-of-one": lambda net, x, y: (net.classify(y),),
    "list": lambda net, x, y: [net.classify(y), y.mean((2, 3)), y],
    "dict": lambda net, x, y: {"logits": net.classify(y), "features": y},
    "dict-with-numbers-as-keys": lambda net, x, y: {1: net.classify(y), 2: y},
    "ordered-dict": lambda net, x, y: OrderedDict(out=net.classify(y), aux=y * 2),
    "nested": lambda net, x, y: {"boxes": [(y[:, :4], y[:, 4:]), []], "logits": {"all": net.classify(y)}},
    "named-tuple": lambda net, x, y: Pair(net.classify(y), y),
    "typed-named-tuple": lambda net, x, y: TypedPair(net.classify(y), y),
    "dataclass": lambda net, x, y: Result(net.classify(y), y),
    "dataclass-with-none": lambda net, x, y: Result(net.classify(y)),
    "tuple-with-none": lambda net, x, y: (net.classify(y), None),
    "tuple-with-number": lambda net, x, y: (net.classify(y), 3, "text", True, 2.5),
    "tuple-with-size": lambda net, x, y: (net.classify(y), y.shape, y.dtype),
    "scalar": lambda net, x, y: net.classify(y).sum(),
    "scalar-integer": lambda net, x, y: net.classify(y).argmax(),
    "classes": lambda net, x, y: net.classify(y).argmax(1),
    "truth-values": lambda net, x, y: y > 0,
    "bytes": lambda net, x, y: (y.sigmoid() * 255).to(torch.uint8),
    "empty": lambda net, x, y: (net.classify(y), y[:, :0]),
    "empty-alone": lambda net, x, y: y.new_zeros(0, 4),
    "complex": lambda net, x, y: torch.fft.fft(net.classify(y)),
    "bfloat16": lambda net, x, y: net.classify(y).bfloat16(),
    "half": lambda net, x, y: net.classify(y).half(),
    "double": lambda net, x, y: net.classify(y).double() / 3,
    "same-tensor-twice": lambda net, x, y: (y, net.classify(y), y),
    "same-tensor-in-dict": lambda net, x, y: {"out": y, "last": y},
    "equal-tensors": lambda net, x, y: (y * 2, y * 2),
    "views-of-one-tensor": lambda net, x, y: (y[:, :4], y[:, 4:], y),
    "transposed": lambda net, x, y: y.permute(0, 2, 3, 1),
    "expanded": lambda net, x, y: y.mean((2, 3), keepdim=True).expand(1, 8, 5, 5),
    "input-too": lambda net, x, y: (x, net.classify(y)),
    "view-of-input": lambda net, x, y: (x[:, :1], net.classify(y)),
    "parameter-too": lambda net, x, y: (net.classify(y), net.head.weight),
    "view-of-parameter": lambda net, x, y: (net.classify(y), net.head.weight.t()[:2]),
    "constant-too": lambda net, x, y: (net.classify(y), torch.arange(5)),
    "intermediate-and-change": lambda net, x, y: (y.clone(), y.add_(1.0)),
    "many": lambda net, x, y: tuple(y.unbind(1)),
    "infinite": lambda net, x, y: (net.classify(y) / 0.0, torch.log(-net.classify(y).abs())),
}.items():
    OUTPUTS.add(name, lambda function=function: Answers(function))
for name, function in {
    "input": lambda net, x, y: x,
    "input-in-dict": lambda net, x, y: {"x": x},
    "constant": lambda net, x, y: torch.ones(1, 3),
    "parameter": lambda net, x, y: net.head.weight,
}.items():
    OUTPUTS.add(name, lambda function=function: Answers(function), RIGHT_OR_REFUSED, r"input|constant|parameter")
for name, function in {
    "size": lambda net, x, y: y.shape,
    "number": lambda net, x, y: 3,
    "none": lambda net, x, y: None,
    "empty-tuple": lambda net, x, y: (),
    "text": lambda net, x, y: "cat",
}.items():
    OUTPUTS.add(name, lambda function=function: Answers(function), RIGHT_OR_REFUSED, NO_TENSOR)
OUTPUTS.add(
    "item-of-answer",
    lambda: Answers(lambda net, x, y: net.classify(y).max().item()),
    REFUSED,
    r"tensor|item|depend|data|return",
)
OUTPUTS.add(
    "set", lambda: Answers(lambda net, x, y: {net.classify(y)}), RIGHT_OR_REFUSED, r"set|tensor|output|return|structure"
)
OUTPUTS.add(
    "generator",
    lambda: Answers(lambda net, x, y: (channel for channel in y.unbind(1))),
    RIGHT_OR_REFUSED,
    r"generator|tensor|output|return|structure",
)


# ---------------------------------------------------------------- inputs


@INPUTS.row(inputs=(image(), image(seed=1)))
class TwoByPosition(Base):
    def forward(self, x, z):
        return self.classify(self.stem(x) - self.stem(z) * 2)


@INPUTS.row(inputs={"z": image(), "x": image(seed=1)})
class TwoByName(Base):
    def forward(self, x, z):
        return self.classify(self.stem(x) - self.stem(z) * 2)


@INPUTS.row(inputs={"x": image(), "z": image(seed=1)})
class NamesAlone(Base):
    def forward(self, *, x, z):
        return self.classify(self.stem(x) - self.stem(z) * 2)


@INPUTS.right
class OptionalLeftOut(Base):
    def forward(self, x, mask=None):
        y = self.stem(x)
        return self.classify(y if mask is None else y * mask)


@INPUTS.row(inputs={"x": image(), "mask": image(16, 16, 1).gt(0)})
class OptionalGiven(Base):
    def forward(self, x, mask=None):
        y = self.stem(x)
        return self.classify(y if mask is None else y * mask)


@INPUTS.row(inputs=(image(), 3.0, None, "scale"))
class NumberNoneAndText(Base):
    def forward(self, x, factor, mask=None, mode="add"):
        y = self.stem(x)
        return self.classify(y * factor if mode == "scale" and mask is None else y)


@INPUTS.row(inputs=({"image": image(), "extra": features(1, 8)},))
class DictInside(Base):
    def forward(self, batch):
        return self.head(self.stem(batch["image"]).mean((2, 3)) + batch["extra"])


@INPUTS.row(inputs=([image(), image(24, 20, seed=1)],))
class ListOfImages(Base):
    def forward(self, images):
        return torch.cat([self.classify(self.stem(each)) for each in images])


@INPUTS.row(inputs=((features(1, 8), (features(1, 8, seed=1), features(1, 8, seed=2))),))
class NestedTuples(Base):
    def forward(self, parts):
        first, (second, third) = parts
        return self.head(first + second * third)


@INPUTS.row(inputs=(features(2, 8), features(2, 8, seed=1)))
class AnyNumber(Base):
    def forward(self, *parts):
        return self.head(sum(part * number for number, part in enumerate(parts, 1)))


@INPUTS.row(inputs={"first": features(2, 8), "second": features(2, 8, seed=1)})
class AnyNames(Base):
    def forward(self, **parts):
        return self.head(torch.stack([value * len(name) for name, value in parts.items()]).mean(0))


@INPUTS.row(inputs=torch.tensor([[1, 5, 2, 9, 0, 3]]))
class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head((self.embed(tokens) * (tokens != 0)[..., None]).sum(1))


@INPUTS.row(inputs=(torch.tensor([[1, 5, 2, 9]]), torch.tensor([[True, True, False, True]])))
class TokensAndMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, tokens, mask):
        return self.layer(self.embed(tokens), src_key_padding_mask=~mask)[:, 0]


@INPUTS.row(inputs=image(channels=1))
def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 4))


@INPUTS.row(inputs=image(20, 44, 4))
def four_channels():
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@INPUTS.row(inputs=image(batch=3))
class BatchOfThree(Base):
    pass


@INPUTS.row(inputs=features(1, 16000))
def waves():
    return nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 4, 80, 16), nn.ReLU(), nn.AdaptiveMaxPool1d(1))


@INPUTS.row(inputs=image()[0])
class WithoutBatch(Base):
    def forward(self, x):
        return self.head(self.stem(x).mean((1, 2)))


@INPUTS.row(inputs=(image(), torch.tensor(2.0)))
class ScalarTensor(Base):
    def forward(self, x, temperature):
        return super().forward(x) / temperature


@INPUTS.row(inputs=(torch.randint(0, 255, (1, 32, 32, 3), dtype=torch.uint8),))
class Pixels(Base):
    def forward(self, pixels):
        return super().forward(pixels.permute(0, 3, 1, 2).float() / 255)


@INPUTS.row(inputs=(image(), image()))
class SecondUnused(Base):
    def forward(self, x, z):
        return super().forward(x)


@INPUTS.row(inputs=(SAME := image(), SAME))
class SameTensorTwice(Base):
    def forward(self, x, z):
        return self.classify(self.stem(x) * self.stem(z))


@INPUTS.row(inputs=features(0, 8))
class EmptyBatch(Base):
    def forward(self, x):
        return self.head(x)


@INPUTS.row(REFUSED, r"argument|input|missing", inputs=(image(),))
class MissingArgument(Base):
    def forward(self, x, z):
        return self.classify(self.stem(x) + self.stem(z))


@INPUTS.row(REFUSED, r"channel|input|size|shape", inputs=(image(channels=5),))
class WrongChannels(Base):
    pass
