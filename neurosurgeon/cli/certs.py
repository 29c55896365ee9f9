"""Make a temporary set of certificates for TLS between edges and a cloud: a CA, one for the cloud, one for edges.

python -m neurosurgeon certs --name cloud.example --name 10.0.0.2
python cloud_api.py -i 0.0.0.0 --tls-cert certs/cloud.pem --tls-key certs/cloud.key --tls-ca certs/ca.pem
python edge_api.py  -i 10.0.0.2 --tls-ca certs/ca.pem --tls-cert certs/edge.pem --tls-key certs/edge.key -t le_net

The command line tool openssl makes them. With certs/ca.key anybody can make more: delete it when the set is complete.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from neurosurgeon.cli.parser import base_parser, positive_int
from neurosurgeon.cli.process import run_main
from neurosurgeon.utils.errors import UsageError, writing

DEFAULT_NAMES = ("localhost", "127.0.0.1", "::1")
DAYS = 30


def make_ca(directory: Path, days: int = DAYS) -> None:
    """Make ``ca.pem`` and ``ca.key``, which sign the other certificates.

    Raises: UsageError: openssl is not there, or failed.
    """
    extensions = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    _make(directory / "ca", "Neurosurgeon throw-away CA", days, extensions)


def make_certificate(directory: Path, who: str, names: Sequence[str], days: int = DAYS) -> None:
    """Make ``who.pem`` and ``who.key``, signed by the CA, for some DNS names and IP addresses.

    Raises: UsageError: openssl is not there, or failed.
    """
    alternatives = ",".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
    signed = ["-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key")]
    extensions = ["-addext", f"subjectAltName={alternatives}", "-addext", "basicConstraints=critical,CA:FALSE"]
    _make(directory / who, f"Neurosurgeon {who}", days, [*signed, *extensions])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _make(path: Path, subject: str, days: int, more: Sequence[str]) -> None:
    openssl = shutil.which("openssl")
    if not openssl:
        raise UsageError("certificates are made by the openssl command: install it (apt install openssl)")
    key = path.with_suffix(".key")
    with writing(key):
        key.touch(0o600)  # before openssl writes, so that other users can never read it
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    command += ["-keyout", str(key), "-out", str(path.with_suffix(".pem")), "-days", str(days)]
    command += ["-subj", f"/CN={subject}", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # no shell, our own words
    if done.returncode:
        raise UsageError(f"openssl made no certificate {path}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def main(argv: Sequence[str] | None = None, prog: str = "certs.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument("--directory", type=Path, default=Path("certs"), help="directory to write (default: certs)")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="host name or IP address that edges use for the cloud; may be repeated "
        f"(default: {', '.join(DEFAULT_NAMES)}, which are always included)",
    )
    parser.add_number("--days", type=positive_int, default=DAYS, meaning="validity of the certificates, days")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    with writing(args.directory):
        args.directory.mkdir(parents=True, exist_ok=True)
    make_ca(args.directory, args.days)
    make_certificate(args.directory, "cloud", [*DEFAULT_NAMES, *args.name], args.days)
    make_certificate(args.directory, "edge", ["edge"], args.days)
    print(f"{args.directory}{os.sep}: ca.pem, cloud.pem, cloud.key, edge.pem, edge.key, for {args.days} days")
    return 0
