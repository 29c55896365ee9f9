"""The reference's name of `neurosurgeon.net.monitor_client`."""

from neurosurgeon.net.monitor_client import main, measure_link, ping_link

__all__ = ["main", "measure_link", "ping_link"]

if __name__ == "__main__":
    raise SystemExit(main())
