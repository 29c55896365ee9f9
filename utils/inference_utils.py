"""The reference's name of `neurosurgeon.utils.inference_utils`."""

from neurosurgeon.utils.inference_utils import load_image, run_half, run_whole, show_features

__all__ = ["load_image", "run_half", "run_whole", "show_features"]
