"""Hooks, replaced forward methods, and modules that are called in other ways."""

import functools
import types

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.models.hard.table import RIGHT_OR_REFUSED, Base, Normed, Table

HOOKS = Table("hooks")
PATCHED = Table("patched")


@HOOKS.right
def on_conv_before_norm():
    net = Normed()
    net.conv.register_forward_hook(lambda module, given, made: made * 2)
    return net


@HOOKS.right
def on_norm():
    net = Normed()
    net.norm.register_forward_hook(lambda module, given, made: made.relu())
    return net


@HOOKS.right
def before_conv():
    net = Normed()
    net.conv.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    return net


@HOOKS.right
def on_root():
    net = Base()
    net.register_forward_hook(lambda module, given, made: made * 3)
    return net


@HOOKS.right
def before_root():
    net = Base()
    net.register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))
    return net


@HOOKS.right
def with_keywords():
    class Scaled(nn.Module):
        def forward(self, y, by=1.0):
            return y * by

    net = Base()
    net.scaled = Scaled()
    net.scaled.register_forward_pre_hook(lambda module, args, named: (args, {"by": 4.0}), with_kwargs=True)
    net.forward = lambda x: net.classify(net.scaled(net.stem(x), by=2.0))
    return net


@HOOKS.right
def of_three_on_one():
    net = Base()
    for number in (1.0, 2.0, 3.0):
        net.stem.register_forward_hook(lambda module, given, made, number=number: made * number + number)
    return net


@HOOKS.right
def that_reads_only():
    net = Base()
    seen = []
    net.stem.register_forward_hook(lambda module, given, made: seen.append(made.shape))
    return net


@HOOKS.right
def that_changes_in_place():
    net = Base()
    net.stem.register_forward_hook(lambda module, given, made: setattr(module, "seen", made.mul_(2.0)))
    return net


@HOOKS.right
def that_changes_its_operand():
    net = Base()

    def double(module, given, made):
        made *= 2.0

    net.stem.register_forward_hook(double)
    return net


@HOOKS.right
def that_was_removed():
    net = Base()
    net.stem.register_forward_hook(lambda module, given, made: made * 9).remove()
    return net


@HOOKS.right
def backward_only():
    net = Base()
    net.stem.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return net


@HOOKS.right
def on_tensor_for_backward():
    net = Base()
    net.head.weight.register_hook(lambda gradient: gradient * 2)
    return net


@HOOKS.right
def that_feeds_another_part():
    net = Base()
    kept = {}
    net.stem.register_forward_hook(lambda module, given, made: kept.update(y=made))
    net.head.register_forward_hook(lambda module, given, made: made + kept["y"].mean())
    return net


@HOOKS.right
class GlobalForOneCall(Base):
    def forward(self, x):
        add = nn.modules.module.register_module_forward_hook
        handle = add(lambda module, given, made: made * 2 if isinstance(module, nn.Conv2d) else None)
        try:
            return super().forward(x)
        finally:
            handle.remove()


# ---------------------------------------------------------------- replaced methods


@PATCHED.right
def conv():
    net = Normed()
    before = net.conv.forward
    net.conv.forward = lambda y: before(y) * 3
    return net


@PATCHED.right
def norm():
    net = Normed()
    net.norm.forward = lambda y: y * 2 - 1
    return net


@PATCHED.right
def root():
    net = Base()
    before = net.forward
    net.forward = lambda x: before(x) * 3
    return net


@PATCHED.right
def bound_method():
    def forward(self, y):
        return F.conv2d(y, self.weight * 2, self.bias)

    net = Normed()
    net.conv.forward = types.MethodType(forward, net.conv)
    return net


@PATCHED.right
def bound_method_of_root():
    def forward(self, x):
        return self.classify(self.stem(x).square())

    net = Base()
    net.forward = types.MethodType(forward, net)
    return net


@PATCHED.right
def partial_function():
    net = Base()
    net.head.forward = functools.partial(F.linear, weight=net.head.weight, bias=None)
    return net


@PATCHED.right
def decorated():
    def doubled(function):
        @functools.wraps(function)
        def run(*args, **named):
            return function(*args, **named) * 2

        return run

    net = Normed()
    net.conv.forward = doubled(net.conv.forward)
    return net


@PATCHED.right
def of_class():
    class Twice(nn.Conv2d):
        pass

    net = Normed()
    net.conv = Twice(8, 8, 3)
    Twice.forward = lambda self, y: self._conv_forward(y, self.weight, self.bias) * 2
    return net


@PATCHED.right
def class_of_instance():
    class Negative(nn.Conv2d):
        def forward(self, y):
            return -super().forward(y)

    net = Normed()
    net.conv.__class__ = Negative
    return net


@PATCHED.right
def activation_in_linear():
    class Activated(nn.Linear):
        def forward(self, y):
            return F.gelu(super().forward(y))

    net = Base()
    net.head = Activated(8, 6)
    return net


@PATCHED.right
def conv_forward_inside():
    net = Normed()
    before = net.conv._conv_forward
    net.conv._conv_forward = lambda y, weight, bias: before(y, weight, None)
    return net


@PATCHED.right
class DecoratedForward(Base):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@PATCHED.right
class OwnCall(Base):
    def __call__(self, x):
        return super().__call__(x * 2)


@PATCHED.right
def part_with_own_call():
    class Halved(nn.Conv2d):
        def __call__(self, y):
            return super().__call__(y) * 0.5

    net = Normed()
    net.conv = Halved(8, 8, 3)
    return net


@PATCHED.right
class CallsForwardDirectly(Normed):
    def forward(self, x):
        return self.classify(self.norm.forward(self.conv.forward(self.stem.forward(x))))


@PATCHED.right
class AttributesOnDemand(Base):
    def __getattr__(self, name):
        return self.head if name == "classifier" else super().__getattr__(name)

    def forward(self, x):
        return self.classifier(self.stem(x).mean((2, 3)))


@PATCHED.right
def functional_call():
    class Called(Base):
        def forward(self, x):
            weights = {"weight": self.head.weight * 2, "bias": self.head.bias}
            return torch.func.functional_call(self.head, weights, (self.stem(x).mean((2, 3)),))

    return Called()


@PATCHED.row(RIGHT_OR_REFUSED, r"compile|trace")
def compiled_part():
    net = Base()
    net.stem = torch.compile(net.stem, backend="eager")
    return net
