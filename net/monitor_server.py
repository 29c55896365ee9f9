"""The reference's name of `neurosurgeon.net.monitor_server`."""

from neurosurgeon.cli.process import script

main = script("monitor", "monitor_server.py", "server")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())

from neurosurgeon.net.monitor_server import MonitorServer  # noqa: E402

__all__ = ["main", "MonitorServer"]
