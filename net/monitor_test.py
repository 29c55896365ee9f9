"""The reference's name of `neurosurgeon.cli.monitor`."""

from neurosurgeon.cli.process import script

main = script("monitor", "monitor_test.py", "test")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())
