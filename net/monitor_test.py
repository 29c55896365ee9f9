"""Self-test of the bandwidth monitor: server and client, a process each, on loopback.

python -m net.monitor_test
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

from net.net_utils import format_rate
from utils.cli import ServiceProcess, base_parser, run_main
from utils.errors import NetworkError
from utils.units import mb_per_s_to_bytes_per_s

CLIENT_TIMEOUT_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(base_parser("monitor_test.py", __doc__), argv, _run)


def _run(args: argparse.Namespace) -> int:
    with ServiceProcess(["-m", "net.monitor_server", "--monitor-port", "0"]) as server:
        command = [sys.executable, "-m", "net.monitor_client", "--monitor-port", str(server.ports[0]), "--json"]
        client = subprocess.run(  # noqa: S603  # our own module
            command, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
        )
    if client.returncode:
        raise NetworkError(f"the client failed: {client.stderr.strip()}")
    link = json.loads(client.stdout)
    rate = format_rate(mb_per_s_to_bytes_per_s(link["bandwidth_mb_per_s"]))
    print(f"bandwidth monitor works: uplink {rate}, RTT {link['rtt_ms']:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
