"""The reference's name of `neurosurgeon.predictor.predictor_utils`."""

if __name__ == "__main__":  # before the import below, which needs packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

from neurosurgeon.predictor.predictor_utils import (
    LatencyPredictor,
    find_predictor,
    fit_and_save,
    load_predictor,
    main,
    save_predictor,
)

__all__ = ["LatencyPredictor", "find_predictor", "fit_and_save", "load_predictor", "main", "save_predictor"]

if __name__ == "__main__":
    raise SystemExit(main())
