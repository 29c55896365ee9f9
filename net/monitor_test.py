"""The reference's name of `neurosurgeon.net.monitor_test`."""

from neurosurgeon.net.monitor_test import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
