"""Planning: the best point against brute force, links at their extremes, and the command that shows it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import load_workbook
from PIL import Image

import deployment
from deployment import SplitPlan, plan_split
from models.zoo import ZOO, model_graph
from predictor.latencies import LayerLatencies
from predictor.predictor_utils import LatencyPredictor, config_path, find_predictor
from predictor.transfer import transfer_time_ms
from utils.errors import DataSetError, MissingPredictorError

MB = 1e6
STAGES = ["edge_ms", "transfer_ms", "cloud_ms", "total_ms"]
CANDIDATE_KEYS = ["point", "layer", *STAGES, "crossing_bytes"]
LAYER_KEYS = ["index", "name", "kind", "output_shape", "output_bytes", "flops", "edge_ms", "cloud_ms"]


def plan_for(model: str, rate_mb_per_s: float, rtt_ms: float, *, edge_slowdown: float = 1.0) -> SplitPlan:
    """Return the plan of a model on a link; the edge is slower than the shipped one by a factor."""
    graph = model_graph(model)
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in ("edge", "cloud"))
    return plan_split(graph, edge.scaled(edge_slowdown), cloud, rate_mb_per_s * MB, rtt_ms)


# ---------------------------------------------------------------- the plan


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(ZOO)), st.floats(0.01, 1e5), st.floats(0, 500), st.floats(0.1, 100))
def test_the_best_candidate_is_that_of_brute_force(model: str, rate: float, rtt_ms: float, slowdown: float) -> None:
    plan = plan_for(model, rate, rtt_ms, edge_slowdown=slowdown)
    graph = plan.graph
    totals = []
    for point in range(len(graph.layers) + 1):
        crossing = graph.crossing_bytes[point]
        transfer_ms = transfer_time_ms(crossing, 4000, rate * MB, rtt_ms)
        totals.append(plan.edge.total(slice(point)) + transfer_ms + plan.cloud.total(slice(point, None)))
        assert plan.candidates[point].stages.total_ms == pytest.approx(totals[-1])
    assert totals[plan.best.point] == pytest.approx(min(totals))


@pytest.mark.parametrize("model", ZOO)
def test_candidates_are_in_order_and_named_after_their_layers(model: str) -> None:
    plan = plan_for(model, 10, 5)
    assert [candidate.point for candidate in plan.candidates] == list(range(len(plan.graph.layers) + 1))
    assert plan.candidates[0].layer == "None"
    assert plan.candidates[1].layer == str(plan.graph.layers[0])
    assert plan.best is plan.candidates[plan.best.point]


@pytest.mark.parametrize("model", ZOO)
def test_a_network_that_stays_on_the_edge_pays_no_transfer(model: str) -> None:
    last = plan_for(model, 0.01, 1000).candidates[-1]
    assert (last.crossing_bytes, last.stages.transfer_ms, last.stages.cloud_ms) == (0, 0, 0)


@pytest.mark.parametrize("model", ZOO)
def test_a_perfect_link_and_a_slow_edge_send_everything(model: str) -> None:
    best = plan_for(model, 1e5, 0, edge_slowdown=100).best
    assert (best.point, best.layer, best.stages.edge_ms) == (0, "None", 0)


@pytest.mark.parametrize("model", ZOO)
def test_a_dead_slow_link_sends_nothing(model: str) -> None:
    plan = plan_for(model, 1e-6, 10_000, edge_slowdown=100)
    assert plan.best.point == len(plan.graph.layers)


def test_a_link_in_between_splits_the_network() -> None:
    plan = plan_for("alex_net", 1, 1, edge_slowdown=20)
    assert 0 < plan.best.point < len(plan.graph.layers)


def test_a_faster_link_never_makes_the_best_slower() -> None:
    totals = [plan_for("alex_net", rate, 5).best.stages.total_ms for rate in (0.1, 1, 10, 100, 1000)]
    assert totals == sorted(totals, reverse=True)


def test_a_kind_without_predictor_is_an_error() -> None:
    with pytest.raises(MissingPredictorError, match=r"features\.0"):
        LatencyPredictor("linear", {}, {}).predict(model_graph("le_net"))


def test_predictors_of_the_user_take_the_place_of_the_shipped_ones(tmp_path: Path) -> None:
    document = json.loads(config_path("edge").read_text())
    document["provenance"]["threads"] = 17
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert find_predictor("edge", path=tmp_path / "mine.json").threads == 17
    assert find_predictor("cloud", name="linear").provenance["side"] == "cloud"
    with pytest.raises(DataSetError, match=r"none\.json"):
        find_predictor("cloud", path=tmp_path / "none.json")


# ---------------------------------------------------------------- how sure it is


def flat(graph_layers: int, latency_ms: float, spread: float) -> LayerLatencies:
    """Return the same latency for every layer, give or take ``spread`` of it."""
    latencies = [latency_ms] * graph_layers
    return LayerLatencies(latencies, [v * (1 - spread) for v in latencies], [v * (1 + spread) for v in latencies], "x")


@pytest.mark.parametrize(("spread", "is_close"), [(0.001, False), (0.9, True)])
def test_the_runner_up_inside_the_interval_of_the_best_is_too_close_to_call(spread: float, is_close: bool) -> None:
    graph = model_graph("le_net")
    size = len(graph.layers)
    plan = plan_split(graph, flat(size, 1.0, spread), flat(size, 1.1, spread), 1.0, 1000.0)
    assert plan.best.point == size
    assert plan.runner_up is not None
    assert plan.runner_up.stages.total_ms == min(c.stages.total_ms for c in plan.candidates if c is not plan.best)
    assert plan.is_too_close_to_call is False  # 600 KB at 1 byte/s
    fast = plan_split(graph, flat(size, 1.0, spread), flat(size, 1.1, spread), 1e12, 0.05)
    assert fast.is_too_close_to_call is is_close


def test_the_interval_of_a_candidate_holds_its_total_and_both_halves() -> None:
    graph = model_graph("le_net")
    size = len(graph.layers)
    plan = plan_split(graph, flat(size, 1.0, 0.5), flat(size, 1.0, 0.0), 1e9, 0.0)
    all_cloud, all_edge = plan.interval(plan.candidates[0]), plan.interval(plan.candidates[-1])
    assert all_cloud.low_ms == pytest.approx(all_cloud.high_ms) == pytest.approx(plan.candidates[0].stages.total_ms)
    assert all_edge.low_ms < plan.candidates[-1].stages.total_ms < all_edge.high_ms


def test_a_slow_link_of_late_makes_transfers_longer() -> None:
    graph = model_graph("le_net")
    size = len(graph.layers)
    usual, slower = (plan_split(graph, flat(size, 1, 0), flat(size, 1, 0), 1e6, 5.0, factor) for factor in (1.0, 1.5))
    for before, after in zip(usual.candidates, slower.candidates, strict=True):
        assert after.stages.transfer_ms == pytest.approx(1.5 * before.stages.transfer_ms)


# ---------------------------------------------------------------- the command


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert deployment.main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_command_prints_every_candidate_and_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "alex_net", "-b", "10", "--rtt", "5", "--predictor", "linear"]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = plan_for("alex_net", 10, 5)
    rows = lines[2 : 3 + len(plan.graph.layers)]
    assert [row.split()[0] for row in rows] == [str(candidate.point) for candidate in plan.candidates]
    assert all(candidate.layer in row for row, candidate in zip(rows, plan.candidates, strict=True))
    assert lines[3 + len(plan.graph.layers)] == (
        f"best latency : {plan.best.stages.total_ms:.2f} ms , "
        f"best partition point : {plan.best.point} - {plan.best.layer}"
    )
    low_ms, high_ms = plan.interval(plan.best)
    assert f"90 % interval of its latency : {low_ms:.2f} to {high_ms:.2f} ms" in lines
    assert any(line.startswith("runner-up : ") for line in lines)


def test_the_json_object_has_exactly_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "-t", "le_net", "-b", "10", "--rtt", "5")
    assert list(document) == [
        "model",
        "layers",
        "candidates",
        "best",
        "strategy",
        "edge_nodes",
        "crossing",
        "edge_parameter_bytes",
        "edge_activation_bytes",
        "cloud_parameter_bytes",
        "best_interval_ms",
        "runner_up",
        "too_close_to_call",
        "extrapolated",
        "predictor",
        "decision_ms",
    ]
    assert document["predictor"] == {"edge": "forest", "cloud": "forest"}
    assert all(list(layer) == LAYER_KEYS for layer in document["layers"])
    assert all(list(candidate) == CANDIDATE_KEYS for candidate in document["candidates"])
    assert document["best"] in document["candidates"]


def test_the_json_object_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "-t", "mobilenet", "-b", "2", "--rtt", "3", "--predictor", "linear")
    plan = plan_for("mobile_net", 2, 3)
    assert document["model"] == "mobile_net"
    assert len(document["layers"]) == len(plan.graph.layers)
    assert [candidate["total_ms"] for candidate in document["candidates"]] == [
        pytest.approx(candidate.stages.total_ms) for candidate in plan.candidates
    ]
    assert document["best"]["point"] == plan.best.point


def test_the_round_trip_is_nothing_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    without = run_json(capsys, "-t", "le_net", "-b", "2")
    zero = run_json(capsys, "-t", "le_net", "-b", "2", "--rtt", "0")
    assert without["candidates"] == zero["candidates"]


def test_tables_and_a_picture_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "plan.xlsx", tmp_path / "plan.png"
    document = run_json(capsys, "-t", "le_net", "-b", "1", "--excel", str(table), "--plot", str(picture))
    book = load_workbook(table)
    assert book.sheetnames == ["layers", "candidates"]
    assert [cell.value for cell in book["layers"][1]] == LAYER_KEYS
    assert [cell.value for cell in book["candidates"][1]] == CANDIDATE_KEYS
    assert book["candidates"].max_row == len(document["candidates"]) + 1
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["-t", "resnet", "-b", "1"], "unknown model 'resnet': choose from alex_net"),
        (["-t", "le_net", "-b", "0"], "'0' is not a number above 0"),
        (["-t", "le_net", "-b", "1", "--rtt", "-1"], "'-1' is not a number of at least 0"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = deployment.main(arguments)
    except SystemExit as exc:  # of the parser
        code = exc.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--edge-config", "none.json"],
        ["--cloud-config", "none.json"],
        ["--excel", "none/plan.xlsx"],
        ["--plot", "none/plan.png"],
        ["--plot", "plan.sheet"],
    ],
)
def test_a_wrong_file_is_one_line_and_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deployment.main(["-t", "le_net", "-b", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("deployment.py: error: ")
    assert arguments[1] in error
    assert error.count("\n") == 1
