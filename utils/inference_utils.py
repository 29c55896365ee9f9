"""The reference's name of `neurosurgeon.engine.torch_engine`."""

from neurosurgeon.engine.torch_engine import load_image, run_half, run_whole
from neurosurgeon.predictor.profile import show_features

__all__ = ["load_image", "run_half", "run_whole", "show_features"]
