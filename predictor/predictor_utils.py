"""The reference's name of `neurosurgeon.predictor.predictor_utils` and `neurosurgeon.predictor.store`."""

from neurosurgeon.cli.process import script

main = script("predictors", "predictor_utils.py")

if __name__ == "__main__":  # before the imports below, which need packages
    raise SystemExit(main())

from neurosurgeon.predictor.predictor_utils import LatencyPredictor  # noqa: E402
from neurosurgeon.predictor.store import find_predictor, fit_and_save, load_predictor, save_predictor  # noqa: E402

__all__ = ["main", "LatencyPredictor", "find_predictor", "fit_and_save", "load_predictor", "save_predictor"]
