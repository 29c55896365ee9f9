"""A cloud behind an emulated link, for measurements: needs root, and the tool that LINK_TOOL names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.cli import ROOT, ServiceProcess

CLOUD_IP = "10.77.0.2"
ATTEMPTS = 3
TOOL = Path(os.environ.get("LINK_TOOL", ROOT.parent / "shared" / "tools" / "link"))


def why_not() -> str | None:
    """Return why no link can be emulated here; None where one can."""
    if not TOOL.is_file():
        return f"no link emulator at {TOOL} (LINK_TOOL names it)"
    return None if os.geteuid() == 0 else "emulated links need root"


@contextmanager
def emulated_link(rate_mbit: float, rtt_ms: float, loss_ppm: int = 0) -> Iterator[None]:
    """Join the two namespaces for as long as the block runs."""
    for attempt in range(ATTEMPTS):  # on a busy machine the tool may look for its devices before they are there
        subprocess.run([TOOL, "down"], check=False, capture_output=True)
        up = [TOOL, "up", str(rate_mbit), str(rtt_ms), str(loss_ppm)]
        if subprocess.run(up, check=attempt == ATTEMPTS - 1).returncode == 0:
            break
    try:
        yield
    finally:
        subprocess.run([TOOL, "down"], check=True)


def change_link(rate_mbit: float, rtt_ms: float, loss_ppm: int = 0) -> None:
    """Change the link in place; what is on it is lost."""
    subprocess.run([TOOL, "set", str(rate_mbit), str(rtt_ms), str(loss_ppm)], check=True)


def on_cloud_side(arguments: Sequence[str]) -> ServiceProcess:
    """Return a cloud script as a process on the far side of the link."""
    return ServiceProcess([*arguments, "-i", CLOUD_IP, "--insecure"], services=2, prefix=[str(TOOL), "cloud"])


def on_edge_side(arguments: Sequence[str], *, stderr: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a script on the near side of the link to its end.

    Args: stderr: None lets it write where this process does.
    """
    command = [str(TOOL), "edge", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
