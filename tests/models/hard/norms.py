"""Batch norms after convolutions, which an engine may fold, and computed parameters."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize, prune

from tests.models.hard.table import RIGHT_OR_REFUSED, Base, Normed, Table, features, seasoned

NORMS = Table("norms")
PARAMETERS = Table("parameters")
PERMANENT = r"prune|permanent|parametri"


@NORMS.right
class WeightReader(Normed):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.norm(self.conv(y)) + F.conv2d(y, self.conv.weight))


@NORMS.right
class BiasReader(Normed):
    def forward(self, x):
        return self.classify(self.norm(self.conv(self.stem(x))) * self.conv.bias.view(1, 8, 1, 1))


@NORMS.right
class FactorReader(Normed):
    def forward(self, x):
        return self.head(self.norm(self.conv(self.stem(x))).mean((2, 3)) * self.norm.weight)


@NORMS.right
class MeanReader(Normed):
    def forward(self, x):
        return self.head(self.norm(self.conv(self.stem(x))).mean((2, 3)) + self.norm.running_mean)


@NORMS.right
class SumOfAllParameters(Normed):
    def forward(self, x):
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        return super().forward(x) + penalty / 100


@NORMS.right
class ConvOnTwoPaths(Normed):
    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.norm(self.conv(y)) + self.conv(y * 2))


@NORMS.right
class ConvOutputReadTwice(Normed):
    def forward(self, x):
        y = self.conv(self.stem(x))
        return self.classify(self.norm(y) + y)


@NORMS.right
class NormOnTwoPaths(Normed):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(8, 8, 3, bias=False)

    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.norm(self.conv(y)) * self.norm(self.other(y)))


@NORMS.right
class SharedConvTwoNorms(Normed):
    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.norm(self.conv(y)) - self.second(self.conv(y)))


@NORMS.right
class TiedWeights(Normed):
    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(8, 8, 3)
        self.twin.weight = self.conv.weight

    def forward(self, x):
        y = self.stem(x)
        return self.classify(self.norm(self.conv(y)) + self.twin(y))


@NORMS.right
class ChangedBetween(Normed):
    def forward(self, x):
        y = self.conv(self.stem(x))
        kept = y[:, :1]
        y += 1.0
        return self.classify(self.norm(y) + kept)


@NORMS.right
class NormBeforeConv(Normed):
    def forward(self, x):
        return self.classify(self.conv(F.relu(self.norm(self.stem(x)))))


@NORMS.row(RIGHT_OR_REFUSED, r"train")
class NormThatTrains(Normed):
    def forward(self, x):
        return self.classify(self.norm(self.conv(self.stem(x))) ** 2)

    def train(self, mode=True):
        super().train(mode)
        self.norm.train(True)
        return self


@NORMS.right
class FunctionalNormOfBatch(Base):
    def forward(self, x):
        return self.classify(F.batch_norm(self.stem(x), None, None, training=True) ** 2)


@NORMS.right
def without_affine():
    net = Normed()
    net.norm = seasoned(nn.BatchNorm2d(8, affine=False))
    return net


@NORMS.right
def without_statistics():
    net = Normed()
    net.norm = nn.BatchNorm2d(8, track_running_stats=False)
    nn.init.uniform_(net.norm.weight)
    return net


@NORMS.right
def with_epsilon():
    net = Normed()
    net.norm.eps = 0.5
    return net


@NORMS.right
def conv_without_bias():
    net = Normed()
    net.conv = nn.Conv2d(8, 8, 3, bias=False)
    return net


@NORMS.right
def conv_with_groups():
    net = Normed()
    net.conv = nn.Conv2d(8, 8, 3, groups=4, stride=2, dilation=2)
    return net


@NORMS.right
def depthwise_with_mirrored_edges():
    net = Normed()
    net.conv = nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
    return net


@NORMS.right
def transposed_conv():
    net = Normed()
    net.conv = nn.ConvTranspose2d(8, 8, 3, stride=2, output_padding=1)
    return net


@NORMS.right
def transposed_conv_with_groups():
    net = Normed()
    net.conv = nn.ConvTranspose2d(8, 8, 2, groups=2)
    return net


@NORMS.right
def norm_of_one_instance():
    net = Normed()
    net.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    return net


@NORMS.right
def norm_in_double():
    net = Normed()
    net.norm.double()
    net.norm.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    net.norm.register_forward_hook(lambda module, given, made: made.float())
    return net


@NORMS.row(inputs=features(4, 3, 20))
def norm_of_lines():
    return nn.Sequential(nn.Conv1d(3, 6, 3), seasoned(nn.BatchNorm1d(6)), nn.Flatten(), nn.Linear(108, 4))


@NORMS.row(inputs=features(2, 12))
def norm_after_linear():
    return nn.Sequential(nn.Linear(12, 8), seasoned(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 4))


@NORMS.row(inputs=features(1, 3, 4, 8, 8))
def norm_of_volumes():
    return nn.Sequential(nn.Conv3d(3, 6, 3), seasoned(nn.BatchNorm3d(6)), nn.AdaptiveAvgPool3d(1), nn.Flatten())


# ---------------------------------------------------------------- computed parameters


@PARAMETERS.right
def weight_norm():
    net = Normed()
    net.conv = parametrizations.weight_norm(net.conv)
    net.conv.parametrizations.weight.original0.data.mul_(2.0)
    return net


@PARAMETERS.right
def weight_norm_of_old_kind():
    net = Normed()
    net.conv = torch.nn.utils.weight_norm(net.conv)
    net.conv.weight_g.data.mul_(2.0)
    return net


@PARAMETERS.right
def spectral_norm():
    net = Normed()
    net.conv = parametrizations.spectral_norm(net.conv)
    return net


@PARAMETERS.right
def spectral_norm_of_old_kind():
    net = Normed()
    net.conv = torch.nn.utils.spectral_norm(net.conv)
    return net


@PARAMETERS.right
def orthogonal():
    net = Base()
    net.head = parametrizations.orthogonal(nn.Linear(8, 6))
    return net


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


@PARAMETERS.right
def own_parametrisation():
    net = Base()
    net.head = nn.Linear(8, 8)
    parametrize.register_parametrization(net.head, "weight", Symmetric())
    return net


@PARAMETERS.right
def parametrised_bias():
    net = Normed()
    parametrize.register_parametrization(net.conv, "bias", nn.Softplus())
    return net


@PARAMETERS.row(RIGHT_OR_REFUSED, PERMANENT)
def pruned_linear():
    net = Base()
    prune.l1_unstructured(net.head, "weight", 0.5)
    return net


@PARAMETERS.row(RIGHT_OR_REFUSED, PERMANENT)
def pruned_conv_before_norm():
    net = Normed()
    prune.ln_structured(net.conv, "weight", 0.5, n=2, dim=0)
    return net


@PARAMETERS.right
def pruned_for_good():
    net = Normed()
    prune.random_unstructured(net.conv, "weight", 0.5)
    prune.remove(net.conv, "weight")
    return net


@PARAMETERS.right
class StandardisedConv(Base):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x):
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self.classify(F.conv2d(x, (self.weight - mean) / deviation))


@PARAMETERS.right
class WeightsOfHyperNetwork(Base):
    def __init__(self):
        super().__init__()
        self.maker = nn.Linear(8, 8 * 8)

    def forward(self, x):
        y = self.stem(x)
        weights = self.maker(y.mean((2, 3))).view(8, 8, 1, 1)
        return self.classify(F.conv2d(y, weights))


@PARAMETERS.right
class ParametersFromList(Base):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(8))})

    def forward(self, x):
        y = self.stem(x).mean((2, 3))
        for scale in self.scales:
            y = y * scale
        return self.head(y + self.named["shift"])


@PARAMETERS.right
class TiedHead(Base):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.project.weight = nn.Parameter(self.head.weight.t())

    def forward(self, x):
        return F.linear(self.project(super().forward(x)), self.head.weight)
