"""Folding of batch norms into the convolutions before them.

A folded norm stays in the program, as an operation that returns its operand: every partition point keeps its number,
its tensor shape and, bit for bit, the result of the whole folded network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from neurosurgeon.models.program import Program, function_name, record_result, spec_of

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def folded_norm(x: Tensor) -> Tensor:
    """Return the result of a convolution with a folded norm."""
    return x


# ---------------------------------------------------------------- of programs of functions


def folded_weight(weight: Tensor, *norm: Any) -> Tensor:
    """Return the weight of a convolution with a norm folded into it, see `folded_bias`."""
    return fuse_conv_bn_weights(weight, None, *norm)[0].detach()


def folded_bias(weight: Tensor, bias: Tensor | None, *norm: Any) -> Tensor:
    """Return the bias of a convolution with a norm (mean, variance, epsilon, weight, bias) folded into it."""
    return fuse_conv_bn_weights(weight, bias, *norm)[1].detach()


def fold_functions(program: Program) -> dict[fx.Node, fx.Node]:
    """Fold the norms of a program without modules, and return {norm: convolution}.

    The folded weights are operations that depend on no input: they are computed once. Nothing that others read changes.
    """
    graph = program.graph
    fixed: set[fx.Node] = set()
    folded = {}
    for node in list(graph.nodes):
        if node.op not in ("placeholder", "output") and fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
        conv = node.args[0] if node.target is functional.batch_norm else None
        if not isinstance(conv, fx.Node) or function_name(conv) not in CONVOLUTIONS or len(conv.users) > 1:
            continue
        if node.args[5] or not fixed.issuperset({*node.all_input_nodes, *conv.all_input_nodes} - {conv, conv.args[0]}):
            continue
        folded[_fold(graph, conv, node, fixed)] = conv
    return folded


def _fold(graph: fx.Graph, conv: fx.Node, norm: fx.Node, fixed: set[fx.Node]) -> fx.Node:
    _, mean, variance, weight, shift, _, _, epsilon = norm.args
    kernel: Any = conv.args[1]
    bias: Any = conv.args[2] if len(conv.args) > 2 else None
    statistics = (mean, variance, epsilon, weight, shift)
    with graph.inserting_before(conv):
        new_kernel = graph.call_function(folded_weight, (kernel, *statistics))
        new_bias = graph.call_function(folded_bias, (kernel, bias, *statistics))
    new_kernel.meta.update(kernel.meta)
    channels = spec_of(kernel).shape[0]
    record_result(new_bias, torch.empty(channels, dtype=getattr(torch, spec_of(kernel).dtype), device="meta"))
    fixed.update((new_kernel, new_bias))
    conv.args = (conv.args[0], new_kernel, new_bias, *conv.args[3:])
    with graph.inserting_before(norm):
        made = graph.call_function(folded_norm, (conv,))
    made.meta.update(norm.meta)
    norm.replace_all_uses_with(made)
    graph.erase_node(norm)
    return made


# ---------------------------------------------------------------- of programs of modules


def foldable_norms(program: Program) -> dict[fx.Node, fx.Node]:
    """Return {batch norm: convolution} for every batch norm that alone reads a convolution, each of them called once.

    Left out are modules with two names, which the other would still call unfolded, and modules with hooks, with a
    replaced forward, with computed parameters, or with tensors that the program reads by itself.
    """
    graph, root = program.graph, program.root
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    names = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    pairs = {}
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        targets = [str(node.target), str(source.target)]
        norm, conv = (root.get_submodule(target) for target in targets)
        is_single = all(calls[target] == 1 and names[id(root.get_submodule(target))] == 1 for target in targets)
        is_plain = _is_plain(norm, nn.BatchNorm2d) and _is_plain(conv, nn.Conv2d) and not read.intersection(targets)
        if is_single and is_plain and norm.running_mean is not None and not norm.training:
            pairs[node] = source
    return pairs


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of a kind and as its class made it: without hooks, and with plain parameters."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return isinstance(module, kind) and not any(hooks) and "forward" not in vars(module) and _has_own_weight(module)


def _has_own_weight(module: nn.Module) -> bool:
    return "weight" in module._parameters and not hasattr(module, "parametrizations")


def fold_modules(model: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Fold each batch norm, by name, into its convolution, in place; a norm becomes an identity. Return the model."""
    for norm_name, conv_name in pairs.items():
        norm: Any = model.get_submodule(norm_name)
        conv: Any = model.get_submodule(conv_name)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_name, nn.Identity())
    return model
