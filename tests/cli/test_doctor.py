"""The doctor: one line for each check, with a cure if it fails."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch

from neurosurgeon.cli import doctor
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.models.LeNet import LeNet
from neurosurgeon.net.frames import HEAD_UNIT
from neurosurgeon.predictor.latencies import LayerLatencies
from tests.net.conftest import LOOPBACK


def diagnose(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, str]]:
    """Return the exit code, and {check: its line}."""
    code = doctor.main(["-t", "le_net", *flags])
    lines = capsys.readouterr().out.splitlines()
    return code, {line[5:27].strip(): line for line in lines}


def failures(lines: dict[str, str]) -> set[str]:
    return {check for check, line in lines.items() if line.startswith("FAIL")}


@pytest.fixture
def free_port() -> int:
    """A port on which no program listens."""
    with socket.create_server((LOOPBACK, 0)) as free:
        return int(free.getsockname()[1])


def test_doctor_passes_every_check_of_a_good_cloud(
    cloud_process: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = cloud_process.ports
    code, lines = diagnose(capsys, "-p", str(ports[0]), "--monitor-port", str(ports[1]))
    assert code == 0
    assert list(lines) == [
        "CPU of this side",
        "name resolves",
        "task port",
        "TLS and key",
        "protocol, version",
        "weights of le_net",
        "prediction, edge",
        "prediction, cloud",
        "bandwidth port",
        "rate and RTT",
    ]
    assert not failures(lines)
    assert "MB/s" in lines["rate and RTT"]
    for side in ("edge", "cloud"):
        assert re.search(
            r"le_net: predicted \S+ ms, measured \S+ ms; predicted from data of ", lines[f"prediction, {side}"]
        )


@pytest.mark.parametrize(("predicted_ms", "verdict"), [(4416.0, "warn"), (130.0, "ok"), (10.0, "warn")])
def test_doctor_warns_of_a_wrong_prediction(predicted_ms: float, verdict: str) -> None:
    column = [predicted_ms]
    finding = doctor._compared("cloud", "alex_net", LayerLatencies(column, column, column, "forest"), 121.0)
    assert finding.verdict == verdict
    assert ("--remeasure-machine" in finding.line()) == (verdict == "warn")


def test_doctor_prints_findings_as_json(cloud_process: ServiceProcess, capsys: pytest.CaptureFixture[str]) -> None:
    ports = cloud_process.ports
    flags = ["-p", str(ports[0]), "--monitor-port", str(ports[1]), "-t", "le_net", "--json"]
    assert doctor.main(flags) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(set(finding) == {"check", "verdict", "detail", "cure", "exit_code"} for finding in findings)


def test_doctor_without_a_cloud(free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = diagnose(capsys, "-p", str(free_port), "--monitor-port", str(free_port))
    assert code == 3
    assert failures(lines) == {"task port", "bandwidth port"}
    assert f"no service at 127.0.0.1:{free_port}" in lines["task port"]
    assert "-> start cloud_api.py there" in lines["task port"]


def test_doctor_without_a_bandwidth_service(
    cloud_process: ServiceProcess, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = diagnose(capsys, "-p", str(cloud_process.ports[0]), "--monitor-port", str(free_port))
    assert code == 3
    assert failures(lines) == {"bandwidth port"}
    assert "or pass --bandwidth" in lines["bandwidth port"]


def test_doctor_with_an_unknown_host_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = diagnose(capsys, "-i", "999.0.0.1")
    assert code == 2
    assert "-> check the spelling" in lines["name resolves"]
    assert "task port" not in lines


def test_doctor_with_other_weights(
    cloud_process: ServiceProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    file = tmp_path / "le_net.pth"
    torch.save(LeNet().state_dict(), file)
    ports = cloud_process.ports
    flags = ["-p", str(ports[0]), "--monitor-port", str(ports[1]), "--weights", f"le_net={file}"]
    code, lines = diagnose(capsys, *flags)
    assert code == 2
    assert failures(lines) == {"weights of le_net"}
    assert "different weights" in lines["weights of le_net"]
    assert "-> start both sides with the same --weights" in lines["weights of le_net"]


def test_doctor_with_a_key_that_the_cloud_lacks(
    cloud_process: ServiceProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_text("a secret of this test alone")
    file.chmod(0o600)
    ports = cloud_process.ports
    code, lines = diagnose(capsys, "-p", str(ports[0]), "--monitor-port", str(ports[1]), "--key-file", str(file))
    assert code == 4
    assert failures(lines) == {"TLS and key", "bandwidth port"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (struct.pack("!4sBBHII", b"NSGN", 99, 1, 0, 0, 0).ljust(HEAD_UNIT, b"\0"), "wire version 99"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(HEAD_UNIT), "not our protocol"),
    ],
)
def test_doctor_with_another_version_or_protocol(
    answer: bytes, said: str, listener: socket.socket, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def play() -> None:
        listener.accept()[0].close()  # the bare connection
        with listener.accept()[0] as sock:
            sock.recv(HEAD_UNIT)
            sock.sendall(answer)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    code, lines = diagnose(capsys, "-p", str(port), "--monitor-port", str(free_port))
    thread.join()
    assert code == 3
    assert said in lines["protocol, version"]
    assert "-> see that port and -p are those of cloud_api.py" in lines["protocol, version"]


def test_doctor_warns_of_a_slow_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    _, lines = diagnose(capsys, "-i", "999.0.0.1")
    assert lines["CPU of this side"].startswith("warn")
    assert "AVX2" in lines["CPU of this side"]
