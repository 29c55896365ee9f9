"""The reference's name of `neurosurgeon.predictor.predictor_utils`."""

from neurosurgeon.cli.process import script

main = script("predictors", "predictor_utils.py")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())

from neurosurgeon.predictor.predictor_utils import (  # noqa: E402
    LatencyPredictor,
    find_predictor,
    fit_and_save,
    load_predictor,
    save_predictor,
)

__all__ = ["main", "LatencyPredictor", "find_predictor", "fit_and_save", "load_predictor", "save_predictor"]
