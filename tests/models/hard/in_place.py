"""Changes in place of tensors that have two names, or are views of others."""

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.models.hard.table import RIGHT_OR_REFUSED, Base, Table, features

IN_PLACE = Table("in-place")


class Changed(Base):
    """Changes the features by a function whose result is not used."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x):
        y = self.stem(x)
        self.change(y)
        return self.classify(y)


class OnAlias(Base):
    """Applies an in-place operator to a second name of the features."""

    def __init__(self, change: Callable[[Tensor, float], Tensor], other: float) -> None:
        super().__init__()
        self.change, self.other = change, other

    def forward(self, x):
        y = self.stem(x)
        second = y
        second = self.change(second, self.other)
        return self.classify(y + second)


for sign, number in (("iadd", 1.0), ("isub", 2.0), ("imul", 3.0), ("itruediv", 4.0), ("ifloordiv", 0.5), ("imod", 0.7)):
    IN_PLACE.add(f"{sign}-on-alias", partial(OnAlias, getattr(operator, sign), number))


class OnIntegers(Base):
    """Applies an in-place operator to a second name of integers."""

    def __init__(self, change: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x):
        y = (self.stem(x) * 100).int()
        second = y
        self.change(second, 3)
        return self.classify(y / 100)


for sign in ("iand", "ior", "ixor", "ilshift", "irshift"):
    IN_PLACE.add(f"{sign}-on-alias", partial(OnIntegers, getattr(operator, sign)))

METHODS: dict[str, Callable[[Tensor], object]] = {
    "add-of-itself": lambda y: y.add_(y),
    "pow": lambda y: y.pow_(2),
    "clamp": lambda y: y.clamp_(-0.1, 0.2),
    "relu": lambda y: torch.relu_(y),
    "fill": lambda y: y.fill_(2.0),
    "copy": lambda y: y.copy_(y.flip(3)),
    "masked-fill": lambda y: y.masked_fill_(y > 0, 7.0),
    "masked-scatter": lambda y: y.masked_scatter_(y > 100, y.flip(2)),
    "index-fill": lambda y: y.index_fill_(1, torch.tensor([0, 3]), 5.0),
    "index-add": lambda y: y.index_add_(1, torch.tensor([0, 0]), y[:, 4:6].clone()),
    "index-copy": lambda y: y.index_copy_(1, torch.tensor([1, 0]), y[:, 6:].clone()),
    "scatter": lambda y: y.scatter_(1, torch.zeros(1, 1, 16, 16, dtype=torch.int64), 3.0),
    "addcmul": lambda y: y.addcmul_(y, y, value=2.0),
    "lerp": lambda y: y.lerp_(torch.ones_like(y), 0.3),
    "transpose": lambda y: y.transpose_(2, 3).mul_(torch.arange(16.0)),
    "functional-relu": lambda y: F.relu(y, inplace=True),
    "functional-silu": lambda y: F.silu(y, True),
    "leaky-relu": lambda y: F.leaky_relu_(y, 0.3),
    "module-hardswish": lambda y: nn.Hardswish(inplace=True)(y),
}
VIEWS: dict[str, Callable[[Tensor], object]] = {
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3).fill_(9.0),
    "fill-diagonal": lambda y: y[0, 0].fill_diagonal_(9.0),
    "unfold": lambda y: y.unfold(2, 4, 4)[..., 0].add_(2.0),
    "moveaxis": lambda y: torch.moveaxis(y, 1, -1).mul_(torch.arange(8.0)),
    "swapaxes": lambda y: y.swapaxes(1, 2)[:, 3].zero_(),
    "transposed-attribute": lambda y: y.mT[..., 0].add_(5.0),
    "turned-attribute": lambda y: y[0, 0].T[1].add_(5.0),
    "to-same-type": lambda y: y.to(torch.float32).add_(1.0),
    "to-same-device": lambda y: y.to("cpu").add_(1.0),
    "float": lambda y: y.float().mul_(2.0),
    "type-as": lambda y: y.type_as(torch.zeros(1)).mul_(2.0),
    "contiguous": lambda y: y.contiguous().mul_(2.0),
    "view-as": lambda y: y.view_as(torch.empty(1, 8, 256))[:, :, 7].add_(4.0),
    "ravel": lambda y: y.ravel()[::3].add_(1.0),
    "reshape": lambda y: y.reshape(8, -1)[2].mul_(6.0),
    "flatten": lambda y: y.flatten(1)[:, :100].mul_(6.0),
    "unflatten": lambda y: y.unflatten(1, (2, 4))[:, 1].mul_(6.0),
    "slice": lambda y: y[:, :4].zero_(),
    "slice-with-step": lambda y: y[:, ::2, 1::3].mul_(-3.0),
    "assign-slice": lambda y: operator.setitem(y, (slice(None), slice(4)), 0.0),
    "assign-ellipsis": lambda y: operator.setitem(y, (..., 0), y[..., 1] * 2),
    "assign-mask": lambda y: operator.setitem(y, y > 0, 1.0),
    "assign-list": lambda y: operator.setitem(y, (0, [1, 5]), -1.0),
    "assign-tensor": lambda y: operator.setitem(y, (slice(None), torch.tensor([2, 3])), y[:, :2] * 3),
    "index-put": lambda y: y.index_put_((torch.tensor([0]), torch.tensor([7])), torch.tensor(4.0), accumulate=True),
    "chunk": lambda y: y.chunk(2, 1)[1].add_(3.0),
    "split": lambda y: y.split([3, 5], 1)[0].add_(3.0),
    "tensor-split": lambda y: y.tensor_split((2, 5), 1)[1].add_(3.0),
    "unbind": lambda y: y.unbind(1)[2].add_(3.0),
    "narrow": lambda y: y.narrow(1, 2, 3).add_(3.0),
    "select": lambda y: torch.select(y, 1, 6).add_(3.0),
    "squeeze": lambda y: y.squeeze(0)[0].add_(3.0),
    "permute": lambda y: y.permute(0, 2, 3, 1)[..., 1].add_(3.0),
    "detach": lambda y: y.detach().add_(3.0),
    "two-views": lambda y: y[:, :4].add_(y[:, 4:]).mul_(y[:, :4]),
    "real-of-complex": lambda y: torch.view_as_complex(y.unflatten(3, (8, 2))).real.add_(2.0),
    "view-of-type": lambda y: y.view(torch.int32).bitwise_and_(-65536),
}
for name, change in (METHODS | VIEWS).items():
    IN_PLACE.add(name, partial(Changed, change))
IN_PLACE.add("data", partial(Changed, lambda y: y.data.add_(1.0)), RIGHT_OR_REFUSED, r"data|in place")
IN_PLACE.add("set-data", partial(Changed, lambda y: setattr(y, "data", y * 2)), RIGHT_OR_REFUSED, r"data|in place")


@IN_PLACE.right
class OutOfMul(Base):
    def forward(self, x):
        y = self.stem(x)
        gate = y.sigmoid()
        torch.mul(y, gate, out=gate)
        return self.classify(gate)


@IN_PLACE.right
class OutOfNormalize(Base):
    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        F.normalize(y, dim=1, out=y)
        return self.head(y)


@IN_PLACE.right
class OutIntoHalfOfTensor(Base):
    def forward(self, x):
        y = self.stem(x)
        torch.add(y[:, :4], y[:, 4:], alpha=2, out=y[:, :4])
        return self.classify(y)


@IN_PLACE.right
class OutOfCat(Base):
    def forward(self, x):
        y = self.stem(x)
        both = torch.empty(1, 8, 16, 16)
        torch.cat((y[:, :3], y[:, :5] * 2), 1, out=both)
        return self.classify(both)


@IN_PLACE.right
class OutInTuple(Base):
    def forward(self, x):
        y = self.stem(x).flatten(2)
        values, places = torch.empty(1, 8), torch.empty(1, 8, dtype=torch.int64)
        torch.max(y, 2, out=(values, places))
        return self.head(values) + places.float().mean()


@IN_PLACE.right
class ModuleOnAlias(Base):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.relu(y) - y * 0.5)


@IN_PLACE.right
class ChangesItsInput(Base):
    def forward(self, x):
        before = x * 1.0
        x.mul_(2.0)
        return self.classify(self.stem(x) + self.stem(before))


@IN_PLACE.right
class ChangesItsInputAndReturnsIt(Base):
    def forward(self, x):
        logits = self.classify(self.stem(x))
        x += 1.0
        return logits, x


@IN_PLACE.right
class ReadBeforeAndAfter(Base):
    def forward(self, x):
        y = self.stem(x)
        before = y.mean()
        y.abs_()
        return self.classify(y) + before


@IN_PLACE.right
class ChangedInLoop(Base):
    def forward(self, x):
        y = self.stem(x)
        for channel in range(1, 8):
            y[:, channel] += y[:, channel - 1] * 0.5
        return self.classify(y)


@IN_PLACE.right
class ChangedInHelper(Base):
    def forward(self, x):
        y = self.stem(x)
        self.shift(y, by=2.0)
        return self.classify(y)

    @staticmethod
    def shift(values, by):
        values.sub_(by)


@IN_PLACE.right
class ChangedInList(Base):
    def forward(self, x):
        levels = [self.stem(x), self.stem(x) * 2]
        for level in levels:
            level += 1.0
        return self.classify(sum(levels))


@IN_PLACE.right
class SwappedHalves(Base):
    def forward(self, x):
        y = self.stem(x)
        y[:, :4], y[:, 4:] = y[:, 4:].clone(), y[:, :4].clone()
        return self.classify(y)


@IN_PLACE.row(inputs=features(1, 8))
def relu_of_sequence():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(True), nn.Linear(8, 4))
