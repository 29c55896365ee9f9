"""The reference's name of `neurosurgeon.engine.torch_engine`."""

from neurosurgeon.edge.inputs import load_image
from neurosurgeon.engine.torch_engine import TorchEngine, TorchNetwork, TorchPartition, use_threads
from neurosurgeon.models.preprocess import random_input
from neurosurgeon.predictor.profile import show_features

__all__ = [
    "TorchEngine",
    "TorchNetwork",
    "TorchPartition",
    "load_image",
    "random_input",
    "show_features",
    "use_threads",
]
