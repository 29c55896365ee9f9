"""The servers under attack, as processes: a naive one and a real cloud; and their state as seen from outside."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.net.messages import Hello
from tests.attacks.decoding import frame_of

CLOUD = ("cloud_api.py", "-p", "0", "--monitor-port", "0")
HELLO = frame_of(Hello.of(), [])
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Victim:
    """A server process."""

    process: ServiceProcess

    @property
    def address(self) -> tuple[str, int]:
        """Where it takes tasks."""
        return DEFAULT_IP, self.process.ports[0]

    @property
    def peak_bytes(self) -> int:
        """The most memory that it had so far (resident)."""
        return self._status("VmHWM")

    @property
    def virtual_bytes(self) -> int:
        """The most address space that it had so far."""
        return self._status("VmPeak")

    @property
    def threads(self) -> int:
        """How many threads it has."""
        return self._status("Threads", 1)

    def forget_peak(self) -> None:
        """Reset the peak to the resident memory."""
        Path(f"/proc/{self.process.process.pid}/clear_refs").write_text("5")

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self.process.is_running()

    def errors(self) -> int:
        """Return the number of internal errors that it logged so far."""
        return sum(line.startswith("ERROR") for line in self.lines())

    def lines(self) -> list[str]:
        """Return the lines that it logged so far."""
        return list(self.process.log)

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(self.address, timeout_s)

    def _status(self, field: str, unit: int = 1024) -> int:
        text = Path(f"/proc/{self.process.process.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) * unit if found else 0


@contextmanager
def naive() -> Iterator[Victim]:
    """Run the naive server."""
    with ServiceProcess(["-m", "tests.attacks.naive"]) as process:
        yield Victim(process)


@contextmanager
def cloud(flags: Sequence[str] = ()) -> Iterator[Victim]:
    """Run a real cloud on loopback."""
    with ServiceProcess([*CLOUD, *flags], services=2) as process:
        yield Victim(process)


def wait_until_closed(sock: socket.socket) -> bytes:
    """Return the bytes that the peer sends until it closes or resets the connection."""
    data = b""
    try:
        while part := sock.recv(65_536):
            data += part
    except ConnectionError:
        pass
    return data
