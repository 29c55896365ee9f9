"""The reference's name of `neurosurgeon.predictor.collect`."""

from neurosurgeon.cli.process import script

main = script("collect", "collect.py")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())

from neurosurgeon.predictor.collect import collect  # noqa: E402

__all__ = ["main", "collect"]
