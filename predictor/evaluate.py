"""The reference's name of `neurosurgeon.predictor.evaluate`."""

if __name__ == "__main__":  # before the import below, which needs packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

from neurosurgeon.predictor.evaluate import evaluate_side, main

__all__ = ["evaluate_side", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
