"""The reference's name of `neurosurgeon.predictor.collect`."""

if __name__ == "__main__":  # before the import below, which needs packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

from neurosurgeon.predictor.collect import collect, main

__all__ = ["collect", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
