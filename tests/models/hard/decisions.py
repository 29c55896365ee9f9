"""Decisions that forward takes: by types, sizes, settings, values of buffers, and values of the input."""

import time
import warnings

import numpy as np
import torch
from torch import nn

from tests.models.hard.table import DATA, REFUSED, RIGHT_OR_REFUSED, Base, Table, image

DECISIONS = Table("decisions")


@DECISIONS.right
class IsinstanceTensor(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if isinstance(x, torch.Tensor) else y)


@DECISIONS.row(RIGHT_OR_REFUSED, r"type|something else")
class TypeOfInput(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if type(x) is torch.Tensor else y)


@DECISIONS.right
class NameOfDtype(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if str(x.dtype) == "torch.float32" else y)


@DECISIONS.right
class IsFloatingPoint(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if torch.is_tensor(x) and x.is_floating_point() and not x.is_complex() else y)


@DECISIONS.right
class DeviceType(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if x.device.type == "cpu" and not x.is_cuda else y)


@DECISIONS.right
class NumberOfDimensions(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2 if x.ndim == 4 and len(x.shape) == x.dim() else y)


@DECISIONS.right
class SizesAsNumbers(Base):
    def forward(self, x):
        y = self.stem(x)
        batch, channels, height, width = y.shape
        return self.classify(y / (height * width) * y.size(1) * len(y) * y.numel() / batch / channels)


@DECISIONS.right
class SizesInTensor(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * torch.tensor(y.shape[-2:]).prod().sqrt())


@DECISIONS.right
class LoopOverSize(Base):
    def forward(self, x):
        y = self.stem(x)
        while y.shape[-1] > 4:
            y = nn.functional.avg_pool2d(y, 2) + y.shape[-1]
        return self.classify(y)


@DECISIONS.right
class IteratesOverTensor(Base):
    def forward(self, x):
        rows = [row.mean(0) * number for number, row in enumerate(self.stem(x).flatten(2)[0])]
        return self.head(torch.stack([row.mean() for row in rows])[None])


@DECISIONS.right
class ItemOfParameter(Base):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.gate.item()


@DECISIONS.right
class FloatOfBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.5]))

    def forward(self, x):
        return super().forward(x) * float(self.scale)


@DECISIONS.right
class ListOfBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("sizes", torch.tensor([3, 5]))

    def forward(self, x):
        first, second = self.stem(x).split(self.sizes.tolist(), 1)
        return self.head(torch.cat((second * 2, first), 1).mean((2, 3)))


@DECISIONS.right
class BoolOfBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 3 if self.flag else y)


@DECISIONS.right
class ComparesBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 3 if self.steps > 5 and self.steps == 7 else y)


@DECISIONS.right
class LoopsAsBufferSays(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        y = self.stem(x)
        for _ in range(int(self.count)):
            y = y * 1.5
        return self.classify(y)


@DECISIONS.right
class Cond(Base):
    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        return self.head(torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t * 3, (y,)))


@DECISIONS.right
class CondOfModules(Base):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 6)

    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        return torch.cond(y.max() < 0, self.head, self.other, (y,))


@DECISIONS.right
class Where(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(torch.where(y.mean() > 0, y * 2, y * 3))


@DECISIONS.row(REFUSED, DATA)
class ValueOfInput(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * 2) if y.mean() > 0 else self.classify(y * 3)


@DECISIONS.row(REFUSED, DATA)
class ItemOfInput(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y) * (2 if y.max().item() > 1 else 3)


@DECISIONS.row(RIGHT_OR_REFUSED, DATA)
class ItemMultiplied(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y) * y.mean().item()


@DECISIONS.row(REFUSED, DATA)
class LoopUntilSmall(Base):
    def forward(self, x):
        y = self.stem(x)
        while y.abs().max() > 0.1:
            y = y * 0.5
        return self.classify(y)


@DECISIONS.row(REFUSED, DATA)
class EarlyExit(Base):
    def forward(self, x):
        logits = super().forward(x)
        if logits.softmax(1).max() > 0.9:
            return logits
        return logits + self.classify(self.stem(x.flip(3)))


@DECISIONS.row(RIGHT_OR_REFUSED, DATA)
class ListOfInput(Base):
    def forward(self, x):
        largest = self.stem(x).mean((2, 3)).argmax(1).tolist()
        return super().forward(x) * (largest[0] + 1)


@DECISIONS.row(RIGHT_OR_REFUSED, rf"{DATA}|numpy")
class NumpyInForward(Base):
    def forward(self, x):
        y = self.stem(x).detach().numpy()
        return self.classify(torch.from_numpy(np.sqrt(np.abs(y))))


@DECISIONS.row(RIGHT_OR_REFUSED, rf"{DATA}|numpy")
class NumpyOnTheSide(Base):
    def forward(self, x):
        factor = float(np.median(self.stem(x).detach().numpy()))
        return super().forward(x) * factor


@DECISIONS.right
class NumpyOfShape(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y * float(np.prod(y.shape)) / 1000)


@DECISIONS.right
class TryExcept(Base):
    def forward(self, x):
        y = self.stem(x)
        try:
            return self.head(y)
        except RuntimeError:
            return self.classify(y)


@DECISIONS.right
class CatchesMissingAttribute(Base):
    def forward(self, x):
        y = self.stem(x)
        try:
            y = y * self.absent
        except AttributeError:
            y = y * 5
        return self.classify(y)


@DECISIONS.right
class AssertsShape(Base):
    def forward(self, x):
        assert x.shape[1] == 3, "three channels"
        torch._assert(x.dim() == 4, "four dimensions")
        return super().forward(x)


@DECISIONS.row(RIGHT_OR_REFUSED, DATA)
class AssertsValues(Base):
    def forward(self, x):
        assert torch.isfinite(x).all()
        return super().forward(x)


@DECISIONS.right
class Prints(Base):
    def forward(self, x):
        print("shape", x.shape)
        return super().forward(x)


@DECISIONS.right
class Warns(Base):
    def forward(self, x):
        warnings.warn("deprecated", stacklevel=2)
        return super().forward(x)


@DECISIONS.right
class MeasuresTime(Base):
    def forward(self, x):
        start = time.perf_counter()
        answer = super().forward(x)
        self.seconds = time.perf_counter() - start
        return answer


@DECISIONS.row(REFUSED, r"state|another answer|trace|differ")
class AnswersTheTime(Base):
    def forward(self, x):
        return super().forward(x) * (time.perf_counter() % 10)


@DECISIONS.row(RIGHT_OR_REFUSED, r"tracing|compiling|something else")
class TracingFlag(Base):
    def forward(self, x):
        y = self.stem(x)
        is_traced = torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling()
        return self.classify(y * 3 if is_traced else y)


@DECISIONS.row(inputs=torch.cat((image(), image(seed=1))))
class SizeOfBatch(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(y - y.mean(0, keepdim=True) if x.shape[0] > 1 else y)


@DECISIONS.right
class Recursive(Base):
    def forward(self, x, depth=3):
        return super().forward(x) if depth == 0 else self.forward(x * 1.1, depth - 1)
