"""The scripts as users type them: the contract's lines, the output, the JSON interface, and every bad input."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cloud_api
import edge_api
import tasks_cloud_api
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.edge.inputs import load_image
from neurosurgeon.edge.outcome import top_guesses
from neurosurgeon.models.names import ZOO
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.messages import AskLatencies, Hello, Latencies, Ping, Pong, Prepare, Ready, Request
from neurosurgeon.net.monitor_client import LinkMeasurement, last_link, remember_link
from neurosurgeon.net.sockets import connect, listen
from neurosurgeon.utils.link import LinkEstimate
from tests.equality import allowed_difference
from tests.faults import write_slow_edge
from tests.networks import load_network, model_graph, run_whole

GOLDEN = Path(__file__).parent / "golden"
JSON_KEYS = {
    "model",
    "layers",
    "partition_point",
    "partition_layer",
    "strategy",
    "edge_nodes",
    "crossing",
    "edge_parameter_bytes",
    "edge_activation_bytes",
    "cloud_parameter_bytes",
    "device",
    "where",
    "bandwidth_mb_per_s",
    "rtt_ms",
    "predicted",
    "interval_ms",
    "too_close_to_call",
    "predictor",
    "predicted_from",
    "measured",
    "sent_bytes",
    "weights_digest",
    "output",
}
STAGES = ["edge_ms", "transfer_ms", "cloud_ms", "total_ms"]


def masked(text: str) -> str:
    """Replace numbers and addresses, which differ between runs, by #."""
    text = re.sub(r"\d+\.\d+\.\d+\.\d+", "#", text)
    text = re.sub(r"(best partition point : \d+ - ).*", r"\1LAYER", text)
    text = re.sub(r"(family|type)=\S+,", r"\1=#,", text)
    return re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "#", text)


def run_json(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """Run an edge in this process and return the one object on its stdout."""
    assert edge_api.main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# ---------------------------------------------------------------- the contract's lines


@pytest.mark.parametrize("script", ["cloud_api.py", "tasks_cloud_api.py"])
def test_both_sides_print_the_contract_lines_in_order(script: str, tmp_path: Path, photo: Path) -> None:
    log = tmp_path / "cloud.txt"
    with (
        log.open("w") as file,
        ServiceProcess([script, "-p", "0", "--monitor-port", "0"], services=2, stdout=file) as cloud,
    ):
        command = [sys.executable, "edge_api.py", "-t", "alex_net", "--point", "1", "-p", str(cloud.ports[0])]
        command += ["--monitor-port", str(cloud.ports[1]), "--input", str(photo)]
        edge = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert masked(edge.stdout).startswith((GOLDEN / "edge.txt").read_text())
    assert masked(log.read_text()) == (GOLDEN / "cloud.txt").read_text()


def test_a_task_on_the_edge_prints_no_transfer(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert edge_api.main(["-t", "le_net", "--point", "12", *address]) == 0
    out = capsys.readouterr().out
    assert "在边缘端设备上推理完成" in out
    assert "传输完成" not in out
    assert "has been sent" not in out


def test_the_readme_spelling_of_mobile_net_works(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, ["-t", "mobilenet", *address])["model"] == "mobile_net"


# ---------------------------------------------------------------- the output


@pytest.mark.parametrize("model", list(ZOO))
def test_a_split_task_equals_the_unsplit_network(
    model: str, address: list[str], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = len(load_network(model).graph.layers) // 2
    result = run_json(capsys, ["-t", model, "--input", str(photo), "--point", str(middle), "--verify", *address])
    whole = run_whole(load_network(model), load_image(photo))
    assert [guess["index"] for guess in result["output"]["top5"]] == [guess.index for guess in top_guesses(whole, None)]
    assert result["max_abs_diff"] <= allowed_difference(whole, same_setup=False)
    assert result["sent_bytes"] > load_network(model).graph.boundary_bytes[middle]


def test_edge_json_has_all_keys(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, ["-t", "alex_net", *address])
    assert set(result) == JSON_KEYS
    assert list(result["predicted"]) == list(result["measured"]) == STAGES
    assert set(result["output"]) == {"shape", "dtype", "digest", "top5"}
    assert set(result["output"]["top5"][0]) == {"index", "label", "probability"}
    assert result["measured"]["total_ms"] == pytest.approx(sum(result["measured"][name] for name in STAGES[:3]))
    assert result["bandwidth_mb_per_s"] > 0


def test_a_slow_link_keeps_the_network_on_the_edge(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, ["-t", "alex_net", "--bandwidth", "0.01", *address])
    assert result["partition_point"] == result["layers"]
    assert result["sent_bytes"] == 0
    assert result["bandwidth_mb_per_s"] == pytest.approx(0.01)


def no_measurement(measurement: LinkMeasurement) -> None:
    raise AssertionError("the link is measured")


def test_measure_auto_skips_a_needless_measurement(
    address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkMeasurement, "start", no_measurement)
    arguments = ["-t", "le_net", "--measure", "auto", "--rtt", "1000000", *address]
    assert edge_api.main([*arguments, "--deadline-ms", "1e6"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("link not measured : edge-only takes ")
    assert "get bandwidth value" not in out
    result = run_json(capsys, [*arguments, "--repeat", "2"])
    assert (result["bandwidth_mb_per_s"], result["rtt_ms"], result["where"]) == (None, 1e6, "edge")
    assert "however fast the link" in result["link_not_measured"]
    assert set(result) == JSON_KEYS | {"link_not_measured", "repeat"}


def test_measure_auto_measures_if_the_plan_depends_on_it(
    tmp_path: Path, cloud: ServiceProcess, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slow_edge = ["--predictor", "linear", "--edge-config", str(write_slow_edge(tmp_path / "edge.json"))]
    result = run_json(capsys, ["-t", "le_net", "--measure", "auto", *slow_edge, *address])
    assert result["bandwidth_mb_per_s"] > 0
    assert set(result) == JSON_KEYS
    assert last_link("127.0.0.1", cloud.ports[1]) is not None


def test_measure_auto_uses_a_young_estimate(
    cloud: ServiceProcess, address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkMeasurement, "start", no_measurement)
    remember_link("127.0.0.1", cloud.ports[1], LinkEstimate(5e6, 2.5))
    arguments = ["-t", "le_net", "--measure", "auto", "--point", "3", *address]
    assert edge_api.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("get bandwidth value : 5.0 MB/s\n")
    assert re.search(r"^link not measured : the estimate of \d+ s ago is used$", captured.err, re.MULTILINE)
    result = run_json(capsys, arguments)
    assert (result["bandwidth_mb_per_s"], result["rtt_ms"]) == (5.0, 2.5)
    assert result["link_age_s"] >= 0
    assert run_json(capsys, [*arguments, "--rtt", "7"])["rtt_ms"] == 7.0
    assert "link_age_s" not in run_json(capsys, [*arguments, "--bandwidth", "1"])


def test_repeat_measures_median_and_spread(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, ["-t", "le_net", "--point", "3", "--repeat", "5", *address])
    assert result["repeat"]["total_ms"]["samples"] == 5
    assert result["repeat"]["edge_ms"]["min_ms"] <= result["measured"]["edge_ms"]


def test_the_same_input_gives_the_same_output_bits(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-t", "le_net", "--point", "4", *address]
    first, second = run_json(capsys, arguments), run_json(capsys, arguments)
    assert first["output"]["digest"] == second["output"]["digest"]


def test_local_cloud_needs_no_second_terminal(photo: Path) -> None:
    command = [sys.executable, "edge_api.py", "--local-cloud", "-t", "le_net", "--input", str(photo), "--json"]
    edge = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(edge.stdout)["model"] == "le_net"


def test_200_runs_in_a_row_with_mixed_models_and_points(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    models = ["le_net", "mobile_net", "shufflenet_v2_x0_5@64"]  # each run draws their weights: small ones
    for run in range(200):
        model = models[run % 3]
        point = (7 * run) % len(load_network(model).graph.layers)
        assert edge_api.main(["-t", model, "--point", str(point), "--bandwidth", "100", *address]) == 0
        capsys.readouterr()


# ---------------------------------------------------------------- weights on both sides


def test_a_weights_file_given_to_both_sides_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _le_net_weights(tmp_path)
    arguments = ["--local-cloud", "-t", "le_net", "--point", "3", "--weights", str(file)]
    result = run_json(capsys, arguments)
    assert result["weights_digest"] != load_network("le_net").ref.weights_digest
    assert result["output"]["top5"][0]["label"] is None


def test_different_weights_are_named_before_a_tensor_is_sent(
    tmp_path: Path, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = _le_net_weights(tmp_path)
    assert edge_api.main(["-t", "le_net", "--point", "3", "--weights", str(file), *address]) == 2
    captured = capsys.readouterr()
    assert "different weights" in captured.err
    assert load_network("le_net").ref.weights_digest in captured.err
    assert "has been sent" not in captured.out


def _le_net_weights(tmp_path: Path) -> Path:
    from neurosurgeon.models.LeNet import LeNet

    torch.manual_seed(3)
    file = tmp_path / "le_net.pth"
    torch.save(LeNet().state_dict(), file)
    return file


# ---------------------------------------------------------------- bad input


BAD_EDGE_INPUTS: dict[str, tuple[list[str], str]] = {
    "unknown model": (["-t", "resnet51"], "alex_net, vgg_net, le_net, mobile_net"),
    "no model": ([], "-t"),
    "missing image": (["-t", "le_net", "--input", "no_such.jpg"], "no_such.jpg does not exist"),
    "no image": (["-t", "le_net", "--input", "README.md"], "cannot be read as an image"),
    "missing weights": (["-t", "le_net", "--weights", "no_such.pth"], "no_such.pth does not exist"),
    "unreadable weights": (["-t", "le_net", "--weights", "README.md"], "cannot be read"),
    "port too large": (["-t", "le_net", "-p", "70000"], "'70000' is not a port"),
    "port no number": (["-t", "le_net", "-p", "http"], "'http' is not a port"),
    "bad address": (["-t", "le_net", "-i", "999.0.0.1"], "cannot be resolved"),
    "point too large": (["-t", "le_net", "--point", "13"], "choose 0 (all in the cloud) to 12"),
    "negative point": (["-t", "le_net", "--point", "-1"], "-1"),
    "zero bandwidth": (["-t", "le_net", "--bandwidth", "0"], "not a number above 0"),
    "bandwidth nan": (["-t", "le_net", "--bandwidth", "nan"], "not a number above 0"),
    "missing key": (["-t", "le_net", "--key-file", "no_such.key"], "cannot read the key file no_such.key"),
    "missing CA": (["-t", "le_net", "--tls-ca", "no_such.pem"], "cannot read no_such.pem"),
    "certificate without CA": (["-t", "le_net", "--tls-cert", "a.pem", "--tls-key", "a.key"], "--tls-ca"),
    "unknown measuring": (["-t", "le_net", "--measure", "never"], "always"),
    "zero repeats": (["-t", "le_net", "--repeat", "0"], "at least 1"),
    "missing predictors": (["-t", "le_net", "--edge-config", "no_such.json"], "no_such.json"),
}


@pytest.mark.parametrize("case", BAD_EDGE_INPUTS)
def test_bad_edge_input_gets_one_line_and_exit_code_2(
    case: str, address: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments, expected = BAD_EDGE_INPUTS[case]
    code = exit_code_of(lambda: edge_api.main([*address, *arguments]))
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


BAD_CLOUD_INPUTS = {
    "--workers": ["0", "-1", "65", "two"],
    "--max-batch": ["0", "-1", "1.5", "many"],
    "--batch-wait-ms": ["-1", "nan", "inf", "long"],
    "--max-models": ["0", "-1", "all"],
    "--max-queue": ["0", "-1", "endless"],
    "--threads": ["0", "some"],
    "-p": ["70000", "http"],
    "-d": ["tpu"],
    "--weights": ["no_such.pth"],
    "-i": ["0.0.0.0"],  # noqa: S104  # without key, TLS or --insecure
    "--key-file": ["no_such.key"],
    "--max-frame-mb": ["0", "-1", "all"],
    "--max-strangers": ["0", "few"],
}


@pytest.mark.parametrize("script", [cloud_api, tasks_cloud_api])
@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, bad in BAD_CLOUD_INPUTS.items() for value in bad])
def test_bad_cloud_input_gets_one_line_and_exit_code_2(
    script: Any, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address = [] if flag == "-p" else ["-p", "0", "--monitor-port", "0"]
    assert exit_code_of(lambda: script.main([*address, flag, value])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert f"{script.__name__}.py: error: " in captured.err
    assert value in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", [edge_api, cloud_api, tasks_cloud_api])
def test_cuda_without_a_gpu_is_refused(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-p", "0", "-d", "cuda"] + (["-t", "le_net"] if script is edge_api else [])
    assert script.main(arguments) == 2
    assert "no CUDA device" in capsys.readouterr().err


def exit_code_of(call: Callable[[], int]) -> int:
    """Return the exit code of a script that returns one or exits with it."""
    try:
        return call()
    except SystemExit as exc:
        return int(exc.code or 0)


def test_weights_of_another_model_name_the_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _le_net_weights(tmp_path)
    assert edge_api.main(["-t", "alex_net", "--weights", str(file)]) == 2
    assert "features.0.weight has shape (6, 3, 5, 5), expected (64, 3, 11, 11)" in capsys.readouterr().err


def test_no_cloud_is_a_network_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert edge_api.main(["-t", "le_net", "-p", str(port)]) == 3
    error = capsys.readouterr().err
    assert f"no service at 127.0.0.1:{port}" in error
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def vanishing_cloud() -> Iterator[int]:
    """The port of a cloud that disconnects as soon as it has read a task."""

    def serve() -> None:
        with Connection(listener.accept()[0]) as connection:
            digest = load_network("le_net").ref.weights_digest
            while True:
                match connection.receive(30).message:
                    case Hello():
                        connection.send(Hello.of(device="cpu", threads=2))
                    case AskLatencies(model, _):
                        layers = [1.0] * len(model_graph(model).layers)
                        connection.send(Latencies(model, "forest", layers, layers, layers, [], "data of A"))
                    case Prepare(model, _, _):
                        connection.send(Ready(model, digest))
                    case Request():
                        return

    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    thread.join()
    listener.close()


def test_a_cloud_lost_during_a_task_is_a_network_error(
    vanishing_cloud: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-t", "le_net", "--point", "3", "--bandwidth", "100", "-p", str(vanishing_cloud)]
    assert edge_api.main([*arguments, "--on-cloud-loss", "fail"]) == 3
    assert "closed the connection" in capsys.readouterr().err


def test_a_task_that_lost_its_cloud_is_computed_here(vanishing_cloud: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-t", "le_net", "--point", "3", "--bandwidth", "100", "-p", str(vanishing_cloud), "--verify", "--json"]
    assert edge_api.main(arguments) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["where"], result["max_abs_diff"], result["sent_bytes"]) == ("edge", 0.0, 0)
    assert result["partition_point"] == result["layers"]
    assert result["predicted"]["edge_ms"] > 0
    assert "传输完成" not in captured.err


def test_a_missing_bandwidth_service_is_named_with_its_cure(
    cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["-t", "le_net", "-p", str(cloud.ports[0]), "--monitor-port", str(port)]
    assert edge_api.main(arguments) == 3
    assert "--bandwidth" in capsys.readouterr().err


# ---------------------------------------------------------------- the cloud process


def test_a_busy_port_is_an_error(cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert cloud_api.main(["-p", str(cloud.ports[0]), "--monitor-port", "0"]) == 3
    assert "is busy" in capsys.readouterr().err


def test_a_busy_bandwidth_port_is_an_error(cloud: ServiceProcess) -> None:
    command = [sys.executable, "cloud_api.py", "-p", "0", "--monitor-port", str(cloud.ports[1])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 3
    assert "is busy" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_cloud_stops_cleanly(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "cloud_api.py", "-p", "0", "--monitor-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    while "bandwidth service listening" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors


def test_the_bandwidth_service_reports_the_cloud_load(
    cloud: ServiceProcess, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_json(capsys, ["-t", "le_net", "--point", "3", "--repeat", "3", *address])
    with connect("127.0.0.1", cloud.ports[1]) as connection:
        connection.send(Hello.of())
        connection.receive(30)
        for sequence in range(100_000):  # the cloud reports it twice a second
            connection.send(Ping(sequence))
            pong = connection.receive(30).message
            assert isinstance(pong, Pong)
            if pong.load_service_ms > 0:
                break
        assert pong.load_service_ms > 0


def test_a_cloud_with_all_engine_flags_serves(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workers", "2", "--max-batch", "4", "--batch-wait-ms", "1.5", "--max-models", "1", "--max-queue", "8"]
    command = ["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0", *flags]
    with ServiceProcess(command, services=2) as cloud:
        address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1]), "--bandwidth", "100"]
        for model in ("le_net", "mobile_net", "le_net"):
            assert run_json(capsys, ["-t", model, "--point", "3", *address])["model"] == model


FOREIGN_BYTES = {
    "http": b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n",
    "random": bytes(range(256)) * 8,
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0becho hacked\x85R." + bytes(600),
}


@pytest.mark.parametrize("port", [0, 1])
@pytest.mark.parametrize("protocol", FOREIGN_BYTES)
def test_a_foreign_protocol_gets_one_log_line(
    protocol: str, port: int, cloud: ServiceProcess, address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(cloud.log)
    with socket.create_connection(("127.0.0.1", cloud.ports[port]), timeout=10) as sock:
        sock.sendall(FOREIGN_BYTES[protocol])
        try:
            assert sock.recv(64) == b""
        except ConnectionResetError:
            pass
    assert edge_api.main(["-t", "le_net", *address]) == 0
    lines = [line for line in cloud.log[before:] if "not our protocol" in line]
    assert len(lines) == 1
    assert len(cloud.log) - before == 1
    capsys.readouterr()


def test_an_impossible_deadline_is_flagged(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, ["-t", "le_net", "--bandwidth", "100", "--rtt", "1", "--deadline-ms", "0.001", *address])
    assert (result["deadline_ms"], result["deadline_in_reach"], result["deadline_met"]) == (0.001, False, False)
    result = run_json(capsys, ["-t", "le_net", "--bandwidth", "100", "--rtt", "1", "--deadline-ms", "1e6", *address])
    assert (result["deadline_in_reach"], result["deadline_met"]) == (True, True)
