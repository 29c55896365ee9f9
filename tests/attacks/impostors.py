"""Impostors: no key, a wrong key, a recorded handshake, and certificates that are not the cloud's, on both ports.

    python -m tests.attacks.impostors

The naive server loads any pickle. Ours must refuse before it reads anything else, and an edge must refuse a cloud
without key or certificate: exit code 4, and the reason.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from neurosurgeon.cli.certs import make_ca, make_certificate
from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cli.process import ROOT
from neurosurgeon.net.access import Access
from neurosurgeon.net.keys import find_key
from neurosurgeon.net.sockets import connect
from tests.attacks.naive import message
from tests.attacks.pickles import code
from tests.attacks.victims import HELLO, Victim, cloud, naive, wait_until_closed

ELSEWHERE = "cloud.example"


def make_files(directory: Path) -> None:
    """Make keys, and certificates that are good, of another CA, expired, and made out to another name."""
    for name, key in (("good.key", "a" * 32), ("wrong.key", "b" * 32)):
        (directory / name).write_text(key)
        (directory / name).chmod(0o600)
    (directory / "other").mkdir()
    make_ca(directory)
    make_ca(directory / "other")
    make_certificate(directory, "cloud", [DEFAULT_IP])
    expire(directory, "cloud")
    make_certificate(directory, "elsewhere", [ELSEWHERE])
    make_certificate(directory, "edge", ["edge"])
    make_certificate(directory / "other", "edge", ["edge"])


def expire(directory: Path, who: str) -> None:
    """Make ``expired.pem`` and ``expired.key``: as ``who``'s, but valid until yesterday."""
    shutil.copy(directory / f"{who}.key", directory / "expired.key")
    asked = ["req", "-new", "-key", "expired.key", "-subj", "/CN=expired", "-addext", f"subjectAltName=IP:{DEFAULT_IP}"]
    signed = ["x509", "-req", "-in", "expired.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-copy_extensions", "copy"]
    for command in ([*asked, "-out", "expired.csr"], [*signed, "-days", "-1", "-out", "expired.pem"]):
        subprocess.run(["openssl", *command], cwd=directory, check=True, capture_output=True)  # noqa: S607


def tls(directory: Path, who: str) -> list[str]:
    """Return the flags with which a side shows a certificate."""
    return ["--tls-cert", str(directory / f"{who}.pem"), "--tls-key", str(directory / f"{who}.key")]


def edges(victim: Victim, *flags: str) -> Iterator[tuple[int, str]]:
    """Run an edge against each port of a cloud; yield its exit code and its last line."""
    port, monitor_port = map(str, victim.process.ports)
    for command in (["edge_api.py", "-t", "le_net", "-p", port], ["-m", "neurosurgeon", "monitor-client"]):
        done = subprocess.run(
            [sys.executable, *command, "--monitor-port", monitor_port, *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        yield done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def replay(victim: Victim, key_file: Path) -> bytes:
    """Record the handshake of an edge, send it again, and return the kinds of the frames in reply."""
    sent: list[bytes] = []
    with connect(*victim.address) as connection:
        send = connection.sock.sendmsg

        class Tap:
            """Stands before the socket."""

            def __getattr__(self, name: str) -> object:
                return getattr(connection.sock, name)

            def sendmsg(self, pieces: list[memoryview]) -> int:
                sent.append(b"".join(pieces))
                return send(pieces)

        connection._link.sock = Tap()  # type: ignore[assignment]
        connection.ask_in(Access(find_key(key_file)), DEFAULT_IP)
    with victim.connect() as sock:
        for frame in [*sent, HELLO]:
            sock.sendall(frame)
        data = wait_until_closed(sock)
    return bytes(data[start + 5] for start in range(0, len(data), 512))


def against_naive(directory: Path) -> None:
    """Show that the naive server runs the code of an unauthenticated peer."""
    with naive() as victim, victim.connect() as sock:
        path = directory / "made by the peer"
        sock.sendall(message(code(path)))
        sock.recv(1)
        print(f"naive server: an unauthenticated peer's code {'ran' if path.exists() else 'did not run'}")


def show(case: str, outcomes: Iterator[tuple[int, str]]) -> None:
    """Print the exit code and the last line of an edge on both ports."""
    for port, (exit_code, line) in zip(("tasks", "bandwidth"), outcomes, strict=True):
        print(f"{case:<34}{port:<11}exit {exit_code}  {line}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_files(directory)
        ca, key = ["--tls-ca", str(directory / "ca.pem")], ["--key-file", str(directory / "good.key")]
        against_naive(directory)
        with cloud(key) as ours:
            show("the right key", edges(ours, *key))
            show("no key", edges(ours))
            show("a wrong key", edges(ours, "--key-file", str(directory / "wrong.key")))
            print(f"a replayed handshake is answered with frames of the kinds {list(replay(ours, Path(key[1])))}")
        with cloud() as ours:
            show("a cloud that has no key", edges(ours, *key))
            show("a cloud without TLS", edges(ours, *ca))
        with cloud([*tls(directory, "cloud"), *ca]) as ours:
            show("the right certificates", edges(ours, *ca, *tls(directory, "edge")))
            show("no certificate", edges(ours, *ca))
            show("an edge's from another CA", edges(ours, *ca, *tls(directory / "other", "edge")))
            show("an edge without TLS", edges(ours))
        with cloud(tls(directory, "elsewhere")) as ours:
            show("a cloud's for another name", edges(ours, *ca))
        with cloud(tls(directory, "expired")) as ours:
            show("an expired cloud's", edges(ours, *ca))
        with cloud(tls(directory / "other", "ca")) as ours:
            show("a self-signed cloud's", edges(ours, *ca))


if __name__ == "__main__":
    main()
