"""The reference's name of `neurosurgeon.engine.torch_engine`."""

from neurosurgeon.edge.inputs import load_image
from neurosurgeon.engine.torch_engine import TorchEngine, TorchNetwork, TorchPartition, use_threads
from neurosurgeon.predictor.profile import show_features

__all__ = ["TorchEngine", "TorchNetwork", "TorchPartition", "load_image", "show_features", "use_threads"]
