"""Constants that forward creates, and state that a module keeps."""

from collections import deque
from itertools import count

import numpy as np
import torch
from torch import nn

from tests.models.hard.table import RIGHT_OR_REFUSED, STATE, Base, Table

CONSTANTS = Table("constants")
STATES = Table("state")
SCALE = 3.0  # read by a forward below
TALLY = [0]  # changed by a forward below


@CONSTANTS.right
class CanvasAdd(Base):
    def forward(self, x):
        canvas = torch.zeros(1, 8)
        canvas[:, :4] += self.stem(x).mean((2, 3))[:, :4]
        return self.head(canvas)


@CONSTANTS.right
class CanvasAssigned(Base):
    def forward(self, x):
        y = self.stem(x)
        canvas = y.new_zeros(1, 8, 20, 20)
        canvas[:, :, 2:18, 2:18] = y
        return self.classify(canvas)


@CONSTANTS.right
class CanvasOfRows(Base):
    def forward(self, x):
        y = self.stem(x)
        rows = torch.empty(16, 8)
        for row in range(16):
            rows[row] = y[0, :, row].mean(1) * row
        return self.head(rows)


@CONSTANTS.right
class CanvasLikeInput(Base):
    def forward(self, x):
        frame = torch.zeros_like(x)
        frame[..., 4:-4, 4:-4] = x[..., 4:-4, 4:-4]
        return self.classify(self.stem(frame))


@CONSTANTS.right
class ConstantChangedTwice(Base):
    def forward(self, x):
        bias = torch.arange(8.0)
        bias.mul_(2.0)
        y = self.stem(x).mean((2, 3)) + bias
        bias -= 1.0
        return self.head(y * bias)


@CONSTANTS.right
class OffDeviceOfInput(Base):
    def forward(self, x):
        y = self.stem(x)
        return self.head(y.mean((2, 3)) + torch.arange(8.0, device=x.device, dtype=x.dtype))


@CONSTANTS.right
class OfNumpy(Base):
    def forward(self, x):
        window = torch.from_numpy(np.hanning(16).astype(np.float32))
        return self.classify(self.stem(x) * window)


@CONSTANTS.right
class OfNumpyChanged(Base):
    def forward(self, x):
        factors = torch.as_tensor(np.arange(8, dtype=np.float32))
        factors[3] = 10.0
        return self.head(self.stem(x).mean((2, 3)) * factors)


@CONSTANTS.right
class NumpyNumber(Base):
    def forward(self, x):
        return self.classify(self.stem(x) * np.float32(0.3) + np.pi)


@CONSTANTS.right
class TensorOfList(Base):
    def __init__(self):
        super().__init__()
        self.mean = [0.1, 0.2, 0.3]

    def forward(self, x):
        return self.classify(self.stem(x - torch.tensor(self.mean).view(1, 3, 1, 1)))


@CONSTANTS.right
class PlainTensorAttribute(Base):
    def __init__(self):
        super().__init__()
        self.table = torch.randn(1, 8, 1, 1)

    def forward(self, x):
        y = self.stem(x)
        return self.classify(y + self.table if y.shape[2] > 3 else y)


@CONSTANTS.right
class GridOfSizes(Base):
    def forward(self, x):
        y = self.stem(x)
        rows, columns = torch.meshgrid(torch.arange(y.shape[2]), torch.arange(y.shape[3]), indexing="ij")
        return self.classify(y * (rows + columns).float())


@CONSTANTS.right
class MaskOfTriangle(Base):
    def forward(self, x):
        y = self.stem(x)
        mask = torch.ones(16, 16, dtype=torch.bool).tril()
        return self.classify(y.masked_fill(~mask, 0.0))


@CONSTANTS.right
class AliasOfWeights(Base):
    def __init__(self):
        super().__init__()
        self.turned = self.head.weight.detach().t()

    def forward(self, x):
        return self.stem(x).mean((2, 3)) @ self.turned


@CONSTANTS.right
class GlobalNumber(Base):
    def forward(self, x):
        return self.classify(self.stem(x) * SCALE)


@CONSTANTS.right
class CopyOfBufferChanged(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.arange(8.0))

    def forward(self, x):
        grid = self.grid.clone()
        grid[0] = 5.0
        return self.head(self.stem(x).mean((2, 3)) + grid)


@CONSTANTS.right
class BufferOfIndices(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(7, -1, -1), persistent=False)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3))[:, self.order])


# ---------------------------------------------------------------- state


@STATES.row(RIGHT_OR_REFUSED, STATE)
class AttributeGrows(Base):
    def __init__(self):
        super().__init__()
        self.total = torch.zeros(1, 8)

    def forward(self, x):
        self.total += self.stem(x).mean((2, 3))
        return self.head(self.total)


@STATES.row(RIGHT_OR_REFUSED, STATE)
class AttributeReplaced(Base):
    def __init__(self):
        super().__init__()
        self.last = torch.zeros(1, 8)

    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        answer = self.head(y + self.last)
        self.last = y
        return answer


@STATES.row(RIGHT_OR_REFUSED, STATE)
class PythonCounter(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.classify(self.stem(x) * self.calls)


@STATES.right
class PythonCounterUnused(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.classify(self.stem(x))


@STATES.row(RIGHT_OR_REFUSED, STATE)
class BufferCounter(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.classify(self.stem(x) * self.calls)


@STATES.right
class BufferCounterUnused(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        return self.classify(self.stem(x))


@STATES.row(RIGHT_OR_REFUSED, STATE)
class ListGrows(Base):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.stem(x).mean((2, 3)))
        return self.head(sum(self.seen))


@STATES.row(RIGHT_OR_REFUSED, STATE)
class QueueOfPast(Base):
    def __init__(self):
        super().__init__()
        self.past = deque([0.0], maxlen=4)

    def forward(self, x):
        self.past.append(self.past[-1] + 1.0)
        return self.classify(self.stem(x) + sum(self.past))


@STATES.right
class CacheByShape(Base):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        y = self.stem(x)
        if y.shape not in self.cache:
            self.cache[y.shape] = torch.linspace(0, 1, y.shape[3])
        return self.classify(y * self.cache[y.shape])


@STATES.right
class MadeAtFirstCall(Base):
    def __init__(self):
        super().__init__()
        self.grid = None

    def forward(self, x):
        y = self.stem(x)
        if self.grid is None:
            self.grid = torch.arange(16.0)
        return self.classify(y * self.grid)


@STATES.right
class KeepsFeatures(Base):
    def forward(self, x):
        self.features = self.stem(x)
        return self.classify(self.features)


@STATES.row(RIGHT_OR_REFUSED, STATE)
class GlobalTally(Base):
    def forward(self, x):
        TALLY[0] += 1
        return self.classify(self.stem(x) * TALLY[0])


@STATES.row(RIGHT_OR_REFUSED, STATE)
class NumbersOfIterator(Base):
    def __init__(self):
        super().__init__()
        self.numbers = count(1)

    def forward(self, x):
        return self.classify(self.stem(x) * next(self.numbers))


@STATES.row(RIGHT_OR_REFUSED, STATE)
class WeightsDecay(Base):
    def forward(self, x):
        answer = self.classify(self.stem(x))
        with torch.no_grad():
            self.head.weight.mul_(0.5)
        return answer


@STATES.row(RIGHT_OR_REFUSED, rf"{STATE}|alternat")
class OnAndOff(Base):
    def __init__(self):
        super().__init__()
        self.is_on = False

    def forward(self, x):
        self.is_on = not self.is_on
        return self.classify(self.stem(x) if self.is_on else self.stem(x) * 2)


@STATES.right
class BufferOverwrittenFirst(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("scratch", torch.zeros(1, 8))

    def forward(self, x):
        self.scratch.copy_(self.stem(x).mean((2, 3)))
        return self.head(self.scratch)


@STATES.right
class MergedWhenEvaluated(Base):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 8))
        self.is_merged = False

    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        return self.head(y) if self.is_merged else self.head(y) + y @ self.right.T @ self.left.T

    def train(self, mode=True):
        super().train(mode)
        if not mode and not self.is_merged:
            self.head.weight.data += self.left.data @ self.right.data
            self.is_merged = True
        return self
