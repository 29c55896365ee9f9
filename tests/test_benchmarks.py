"""The table of benchmarks is complete, with the subject and the command of each; parts of the benchmarks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cli.process import ROOT
from neurosurgeon.net.connection import Connection, Received
from neurosurgeon.net.messages import Reply, Request
from neurosurgeon.planner.transfer import frame_bytes
from neurosurgeon.predictor.get_datasets_func import read_provenance
from neurosurgeon.predictor.places import default_directory
from neurosurgeon.predictor.predictor_utils import SIDES
from tests.benchmark import __main__ as benchmarks
from tests.benchmark import busy, common, machine_speed, prediction, queue, transport


def test_every_benchmark_is_in_the_table() -> None:
    files = (ROOT / "tests" / "benchmark").glob("[!_]*.py")
    runnable = {path.stem for path in files if '__name__ == "__main__"' in path.read_text()}
    names = [benchmark.name for benchmark in benchmarks.BENCHMARKS]
    assert set(names) == runnable
    assert len(set(names)) == len(names)


def test_the_list_has_a_command_and_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tests.benchmark", "--list"])
    assert benchmarks.main() == 0
    runs, _, alone = capsys.readouterr().out.partition("to be run by themselves:")
    for benchmark in benchmarks.BENCHMARKS:
        part = alone if benchmark.left_out else runs
        assert re.search(
            rf"python -m tests\.benchmark\.{benchmark.name}\b.*\n +{re.escape(benchmark.description)}", part
        )
        assert len(benchmark.description) > 20


def test_a_failed_benchmark_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def note(benchmark: benchmarks.Benchmark) -> bool:
        run.append(benchmark.name)
        return benchmark.name != "decision"

    monkeypatch.setattr("sys.argv", ["tests.benchmark"])
    monkeypatch.setattr(benchmarks.Benchmark, "run", note)
    assert benchmarks.main() == 1
    assert run == [benchmark.name for benchmark in benchmarks.BENCHMARKS if not benchmark.left_out]
    assert capsys.readouterr().out.endswith("failed: decision\n")


@pytest.mark.parametrize(("stolen_ms", "tries"), [(0.0, 1), (3.0, 3), (100.0, common.MAX_TRIES)])
def test_a_disturbed_measurement_is_repeated(stolen_ms: float, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_ms, stolen, calls = 0.0, 0.0, 0

    def measure() -> int:
        nonlocal clock_ms, stolen, calls
        clock_ms += 100.0
        stolen += max(stolen_ms - 0.7 * calls, 0.0)  # less from time to time
        calls += 1
        return calls

    monkeypatch.setattr(common, "now_ms", lambda: clock_ms)
    monkeypatch.setattr(common, "_stolen_ms", lambda: stolen)
    assert common.undisturbed(measure) == tries


@pytest.mark.parametrize("percent", [1, 25, 50, 90])
def test_percentile_of_one_value_is_the_value(percent: int) -> None:
    assert common.percentile([3.0], percent) == 3.0


def test_percentile_interpolates() -> None:
    assert common.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 25) == 2.0
    assert common.percentile([1.0, 2.0], 90) == pytest.approx(1.9)


def test_busy_loops_end_with_the_block() -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, command: list[str]) -> None:
            super().__init__(command)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.subprocess, "Popen", Noted)
        with common.busy_loops(2):
            assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode is not None for process in started)


def test_busy_shows_a_line_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    cells = {("le_net", setting, load): busy.Cell([1.0, 2.0, 3.0]) for setting in busy.SETTINGS for load in (0, 2)}
    busy.show(cells, ["le_net"], [0, 2])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(busy.SETTINGS)
    assert lines[-1].split() == ["le_net", "2", "passive", "2.00", "2.80", "2.00", "2.80"]


def test_prediction_errors_with_and_without_the_common_factor() -> None:
    found = prediction.summary([1.5, 1.5, 1.8])
    assert found["common_factor"] == 1.5
    assert (found["mean_error"], found["worst_error"]) == (pytest.approx(0.6), pytest.approx(0.8))
    assert (found["mean_own_error"], found["worst_own_error"]) == (pytest.approx(0.2 / 3), pytest.approx(0.2))


def test_prediction_scores_the_scaled_predictor(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"le_net": {"ms": 2.0, "low": 1.5, "high": 2.5, "unscaled_ms": 8.0}}
    measured = {"le_net": prediction.measured([2.4, 2.6], [3.6, 4.0], threads=2)}
    predicted = {"predictor": "forest", "data": "data of another", "networks": said}
    found = prediction.compared(predicted, measured)
    assert found["together"]["mean_error"] == pytest.approx(1 - 2.0 / 2.4)
    assert found["together"]["unscaled_mean_error"] == pytest.approx(8.0 / 2.4 - 1)
    assert found["together"]["inside"] == 1.0
    prediction.show("edge", found, measured)
    output = capsys.readouterr().out
    assert "edge, forest, data of another" in output
    assert "yes *" in output  # two threads had 77 % of their cores


def test_prediction_measures_one_thread_by_its_cpu_time() -> None:
    assert prediction.measured([40.0, 90.0], [20.0, 20.0], threads=1)["ms"] == 20.0
    assert prediction.measured([40.0, 90.0], [80.0, 80.0], threads=2)["ms"] == 40.0


@pytest.mark.parametrize("side", SIDES)
def test_foreign_data_is_not_of_this_machine(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = read_provenance(default_directory(side, "cpu"))["device_name"]
    monkeypatch.setattr(prediction, "device_name", lambda device: here)
    sources = prediction.foreign_sources(side)
    assert sources
    assert here not in {read_provenance(Path(source))["device_name"] for source in sources}


def test_machine_speed_shows_factors_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"side": side, "loops": load, "took_s": 1.0, "factors": {"all": factor}}
        for side in SIDES
        for load, factor in ((0, 1.0), (4, 3.0))
    ]
    machine_speed.show(rows, [0, 4])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [[side, "all", "1", "3", "3.00"] for side in SIDES]


@pytest.mark.parametrize("name", ["raw socket", "ours", "multiprocessing"])
def test_transport_contenders_exchange_tensor_and_output(name: str) -> None:
    serve, client = transport.CONTENDERS[name]
    array = np.zeros(1000, np.float32)
    with socket.create_server((DEFAULT_IP, 0)) as listener, ThreadPoolExecutor(1) as cloud, ExitStack() as edge:
        served = cloud.submit(serve, listener, array.nbytes)
        exchange = transport.Exchange(client(listener.getsockname()[1], array, edge), os.getpid())
        exchange.take_turn(counts=False)
        exchange.take_turn(counts=True)
        edge.close()
        served.result()
    assert len(exchange.wall_ms) == transport.CALLS_A_TURN
    assert exchange.figures()["cloud_cpu"] > 0


def test_transport_exchanges_a_request_and_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    receive = Connection.receive

    def noted(connection: Connection, wait_s: float) -> Received:
        received = receive(connection, wait_s)
        read.append(type(received.message))
        return received

    monkeypatch.setattr(Connection, "receive", noted)
    test_transport_contenders_exchange_tensor_and_output("ours")
    calls = 2 * transport.CALLS_A_TURN
    assert (read.count(Request), read.count(Reply)) == (calls, calls)


def test_queue_counts_the_uplink_by_payload_and_whole_messages() -> None:
    sent = {"measured": {"edge_ms": 5.0}, "spans_ms": {"cloud": [10.0, 13.0]}, "crossing": [{"bytes": 150_528}]}
    kept = {"measured": {"edge_ms": 7.0}, "spans_ms": {}, "crossing": []}
    busy_ms = queue.bound_ms({"tasks": [sent, kept]}, rate_mbit=20.0)
    assert (busy_ms["edge"], busy_ms["cloud"]) == (12.0, 3.0)
    assert busy_ms["uplink"] == pytest.approx(frame_bytes(150_528) / (2.5e6 * 1448 / 1500) * 1e3)
