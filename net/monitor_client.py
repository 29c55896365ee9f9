"""The reference's name of `neurosurgeon.net.monitor_client`."""

from neurosurgeon.cli.process import script

main = script("monitor", "monitor_client.py", "client")

if __name__ == "__main__":  # before the import below, which needs packages
    raise SystemExit(main())

from neurosurgeon.net.monitor_client import measure_link, ping_link  # noqa: E402

__all__ = ["main", "measure_link", "ping_link"]
