"""The reference's name of `neurosurgeon.net.monitor_server`."""

from neurosurgeon.net.monitor_server import MonitorServer, main

__all__ = ["MonitorServer", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
