"""The reference's name of `neurosurgeon.predictor.evaluate`."""

from neurosurgeon.cli.process import script

main = script("evaluate", "evaluate.py")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())

from neurosurgeon.predictor.evaluate import evaluate_side  # noqa: E402

__all__ = ["main", "evaluate_side"]
