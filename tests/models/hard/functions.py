"""Functions of forward: own autograd functions and operators, sampling, sizes that depend on data, sorting, padding."""

import torch
import torch.fx
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.models.hard.table import RIGHT_OR_REFUSED, Base, Table, With, features

FUNCTIONS = Table("functions")
UNSIZED = r"depend|data|size"
ROWS = torch.linspace(-1, 1, 16)


@torch.fx.wrap
def wrapped(y):
    """A function that torch.fx does not look into."""
    return y * 2 if y.sum() > -1e9 else y


class Doubled(torch.autograd.Function):
    """A function with a derivative of its own."""

    @staticmethod
    def forward(context, y):
        context.save_for_backward(y)
        return y * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * 2


class Cubed(torch.autograd.Function):
    """The same in the newer way, with its context apart."""

    @staticmethod
    def forward(y, power):
        return y**power

    @staticmethod
    def setup_context(context, inputs, output):
        context.power = inputs[1]

    @staticmethod
    def backward(context, gradient):
        return gradient, None


@torch.library.custom_op("hard::shifted", mutates_args=())
def shifted(y: torch.Tensor, by: float) -> torch.Tensor:
    """An operator of the user."""
    return y + by


@shifted.register_fake
def _(y, by):
    return torch.empty_like(y)


@torch.library.custom_op("hard::shift_", mutates_args=("y",))
def shift_(y: torch.Tensor, by: float) -> None:
    """An operator of the user that works in place."""
    y.add_(by)


def change_by_operator(y):
    """Change a tensor by the user's operator."""
    shift_(y, 2.0)
    return y


def sampled(y, **settings):
    """Return features at the places of a turned grid."""
    angle = torch.tensor([[[0.8, -0.6, 0.1], [0.6, 0.8, 0.0]]])
    return F.grid_sample(y, F.affine_grid(angle, [1, 8, 16, 16], align_corners=False), **settings)


def shifted_windows(y):
    """Return features in windows that were rolled, as Swin does."""
    y = y.roll((-2, -2), (2, 3)).unflatten(2, (4, 4)).unflatten(4, (4, 4))
    return y.permute(0, 1, 2, 4, 3, 5).softmax(-1).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)


def top_rows(y):
    """Return the features with their largest values alone."""
    values, places = y.flatten(2).topk(20, dim=2)
    return torch.zeros_like(y).flatten(2).scatter(2, places, values).view_as(y)


def warped(y):
    """Return features at places that the features themselves give, as deformable convolutions do."""
    offsets = y[:, :2].permute(0, 2, 3, 1).tanh() * 0.3
    grid = torch.stack(torch.meshgrid(ROWS, ROWS, indexing="xy"), -1)[None]
    return F.grid_sample(y, grid + offsets, align_corners=True)


SIZED = {
    "fx-wrap": lambda y: wrapped(y),  # by its name, which torch.fx replaces
    "autograd-function": Doubled.apply,
    "autograd-function-with-context": lambda y: Cubed.apply(y, 3),
    "own-operator": lambda y: shifted(y, 1.5),
    "own-operator-in-place": change_by_operator,
    "attention": lambda y: F.scaled_dot_product_attention(y, y * 2, y, is_causal=True),
    "attention-with-mask": lambda y: F.scaled_dot_product_attention(y, y, y, torch.eye(16), scale=0.3),
    "einsum": lambda y: torch.einsum("nchw,ndhw->ncd", y, y)[..., None] / 100,
    "einsum-with-ellipsis": lambda y: torch.einsum("...hw,wv->...hv", y, torch.ones(16, 4).tril()),
    "grid-sample": lambda y: sampled(y, align_corners=False),
    "grid-sample-nearest": lambda y: sampled(y, mode="nearest", padding_mode="reflection", align_corners=True),
    "warped-by-itself": warped,
    "interpolate-bilinear": lambda y: F.interpolate(y, (10, 21), mode="bilinear", align_corners=False, antialias=True),
    "interpolate-nearest-exact": lambda y: F.interpolate(y, scale_factor=1.7, mode="nearest-exact"),
    "interpolate-bicubic": lambda y: F.interpolate(y, scale_factor=(0.5, 2), mode="bicubic", align_corners=True),
    "fold-and-unfold": lambda y: F.fold(F.unfold(y, 3, padding=1) * 0.5, (16, 16), 3, padding=1),
    "shifted-windows": shifted_windows,
    "top-rows": top_rows,
    "sorted": lambda y: y.flatten(2).sort(dim=2, descending=True, stable=True).values.view_as(y) * ROWS,
    "argsort-and-gather": lambda y: y.gather(3, y.argsort(3)) * ROWS,
    "median-and-mode": lambda y: y - y.median(3, keepdim=True).values + y.round().mode(2, keepdim=True).values,
    "kth-value": lambda y: y * y.flatten(2).kthvalue(7).values[..., None, None],
    "cumulative": lambda y: y.cumsum(2) + y.cumprod(3) + y.logcumsumexp(1) + y.cummax(2).values,
    "scatter-add": lambda y: torch.zeros_like(y).scatter_add(1, torch.arange(8).view(1, 8, 1, 1) // 2, y * 2),
    "scatter-reduce": lambda y: y.scatter_reduce(3, y.argsort(3), y, "amax", include_self=False) * ROWS,
    "index-select": lambda y: y.index_select(1, torch.tensor([7, 7, 0, 1, 2, 3, 4, 5])) * 2,
    "take-along": lambda y: y.take_along_dim(y.argmax(3, keepdim=True), 3),
    "bucketize": lambda y: torch.bucketize(y, ROWS).float(),
    "one-hot": lambda y: F.one_hot(y.argmax(1), 8).permute(0, 3, 1, 2).float(),
    "pad-constant": lambda y: F.pad(y, (1, 2, 0, 3), value=2.5),
    "pad-reflect": lambda y: F.pad(y, (3, 1, 2, 2), mode="reflect"),
    "pad-replicate": lambda y: F.pad(y, (3, 1, 2, 2), mode="replicate"),
    "pad-circular": lambda y: F.pad(y, (3, 1, 2, 2), mode="circular"),
    "pad-negative": lambda y: F.pad(y, (-3, 1, -2, 2)),
    "checkpoint": lambda y: checkpoint(torch.sin, y, use_reentrant=False) * 2,
    "checkpoint-of-old-kind": lambda y: checkpoint(torch.sin, y, use_reentrant=True) * 2,
    "checkpoint-sequential": lambda y: checkpoint_sequential([torch.sin, torch.tanh], 2, y, use_reentrant=False),
    "inverse": lambda y: torch.linalg.inv(y + 20 * torch.eye(16)),
    "singular-values": lambda y: torch.linalg.svdvals(y)[..., None],
    "distances": lambda y: torch.cdist(y.flatten(2), y.flatten(2))[..., None] / 10,
    "norms": lambda y: F.normalize(y, dim=1) + torch.linalg.vector_norm(y, 3, 1, keepdim=True) + y.norm(dim=2).mean(),
    "dot-products": lambda y: torch.baddbmm(y[0], y[0], y[0].mT, beta=0.5)[None] / 10,
    "roll-and-flip": lambda y: torch.roll(y, 3) * y.flip((2, 3)).rot90(1, (2, 3)),
    "adaptive-pools": lambda y: F.adaptive_avg_pool2d(y, (3, 5)) + F.adaptive_max_pool2d(y, (3, 5)),
    "pool-with-ceil": lambda y: F.max_pool2d(y, 3, 2, ceil_mode=True) + F.avg_pool2d(y, 3, 2, 1, False, False)[..., :8],
    "fixed-function-of-torch": lambda y: torch.special.expit(y) + torch.nn.functional.mish(y) + y.erf().logit(1e-3),
    "repeat-interleave": lambda y: y.repeat_interleave(2, 1)[:, ::2].tile(1, 1, 2, 1),
    "histogram": lambda y: y * torch.histc(y, 8, -2, 2).view(1, 8, 1, 1) / 100,
    "quantile": lambda y: y.clamp(y.quantile(0.1), y.quantile(0.9)),
}
for name, function in SIZED.items():
    FUNCTIONS.add(name, lambda function=function: With(function))


def through_places(y):
    """Return the mean of the values at the places of the positive ones."""
    places = (y > 0).nonzero()
    return y + y[tuple(places.T)].mean()


DATA_SIZED = {
    "nonzero": through_places,
    "masked": lambda y: y + y[y > 0].mean(),
    "masked-select": lambda y: y * y.masked_select(y.abs() > 0.1).std(),
    "unique": lambda y: y + y.round().unique().sum(),
    "where-of-one": lambda y: y + torch.where(y[0, 0] > 0)[0].float().mean(),
    "repeat-by-values": lambda y: y + torch.arange(8.0).repeat_interleave(y.mean((2, 3))[0].abs().long() + 1).mean(),
    "bincount": lambda y: y + y.abs().long().flatten().bincount().float().mean(),
}
for name, function in DATA_SIZED.items():
    FUNCTIONS.add(f"size-of-data-{name}", lambda function=function: With(function), RIGHT_OR_REFUSED, UNSIZED)


@FUNCTIONS.row(RIGHT_OR_REFUSED, UNSIZED)
class BoxesAboveThreshold(Base):
    def forward(self, x):
        scores = self.stem(x).flatten(1)[0]
        return torch.nonzero(scores > 0.5)[:, 0]


@FUNCTIONS.row(inputs=(features(1, 16, 8), torch.tensor([[0, 2, 1, 1]])))
class GatherRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x, places):
        return self.head(x.gather(1, places[..., None].expand(-1, -1, 8)))
