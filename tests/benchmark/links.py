"""A cloud over an emulated link, for measurements: needs root, and the tool that LINK_TOOL names."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.planner.transfer import SEGMENT_BYTES
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s

CLOUD_IP = "10.77.0.2"
ATTEMPTS = 3
SO_TIMESTAMPNS, IP_HEADER_BYTES = 35, 20
ECHO_NAME = struct.Struct("!HH")  # whose echo, and which
ECHO_BYTES = 28  # of a packet
ECHO_TIMEOUT_S = 2.0
PAYLOAD_SHARE = SEGMENT_BYTES / 1500  # share of TCP's payload in whole IP packets, which the emulator counts
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


def payload_bytes_per_s(rate_mbit: float) -> float:
    """Return the rate at which a link carries TCP's payload, without the headers, bytes/s."""
    return PAYLOAD_SHARE * mbit_per_s_to_bytes_per_s(rate_mbit)


def change_link(rate_mbit: float, rtt_ms: float, loss_ppm: int = 0) -> None:
    """Change the link in place; packets on it are lost."""
    subprocess.run([TOOL, "set", str(rate_mbit), str(rtt_ms), str(loss_ppm)], check=True)


def echo_ms(count: int = 20) -> float:
    """Return the median round trip of an ICMP echo over the link, ms, as the two kernels see it.

    It is the real time of the link: the emulator adds a tenth of a millisecond to its setting.

    Raises: TimeoutError: none came back.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.settimeout(ECHO_TIMEOUT_S)
        echoes = []
        for sequence in range(count):
            with contextlib.suppress(TimeoutError):  # a lossy link
                echoes.append(_one_echo_ms(sock, sequence))
    if not echoes:
        raise TimeoutError("no echo came back")
    return statistics.median(echoes)


def _one_echo_ms(sock: socket.socket, sequence: int) -> float:
    name = ECHO_NAME.pack(os.getpid() & 0xFFFF, sequence)
    checksum = ~_folded(sum(struct.unpack("!3H", b"\x08\0" + name))) & 0xFFFF
    start_ns = time.time_ns()
    sock.sendto(struct.pack("!BBH", 8, 0, checksum) + name, (CLOUD_IP, 0))
    while True:
        data, stamps, *_ = sock.recvmsg(2048, 256)
        if data[IP_HEADER_BYTES] == 0 and data[IP_HEADER_BYTES + 4 :][:4] == name:  # an echo reply, to this request
            seconds, nanoseconds = struct.unpack_from("@ll", stamps[0][2])
            return (seconds * 1_000_000_000 + nanoseconds - start_ns) / 1e6


def _folded(total: int) -> int:
    return (total & 0xFFFF) + (total >> 16)


def on_cloud_side(arguments: Sequence[str]) -> ServiceProcess:
    """Return a cloud script as a process on the far side of the link."""
    return ServiceProcess([*arguments, "-i", CLOUD_IP, "--insecure"], services=2, prefix=[str(TOOL), "cloud"])


def on_edge_side(arguments: Sequence[str], *, stderr: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a script on the near side of the link to its end.

    Args: stderr: None lets it write where this process does.
    """
    command = [str(TOOL), "edge", sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
