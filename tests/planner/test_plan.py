"""Planning: the best point against brute force, links at their extremes, and the command that shows it all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import load_workbook
from PIL import Image

from neurosurgeon.cli import deployment, process
from neurosurgeon.models.names import ZOO
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.compare import compare
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.planner.transfer import TENSOR_MS, transfer_time_ms
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.machine_speed import scaled_to_machine
from neurosurgeon.predictor.places import config_path
from neurosurgeon.predictor.predictor_utils import SIDES, LatencyPredictor
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.utils.errors import DataSetError, MissingPredictorError, PlanningError
from tests.networks import model_graph

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
    plans = [plan_for("alex_net", rate, 1, edge_slowdown=10) for rate in (0.2, 0.3, 0.5, 0.7, 1.0)]
    assert any(0 < plan.best.point < len(plan.graph.layers) for plan in plans)


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


AS_IT_IS = ["--edge-config", str(config_path("edge")), "--cloud-config", str(config_path("cloud"))]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert deployment.main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_command_prints_every_candidate_and_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "alex_net", "-b", "10", "--rtt", "5", *AS_IT_IS]) == 0
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
        "predicted_from",
        "decision_ms",
    ]
    assert document["predictor"] == {"edge": "forest", "cloud": "forest"}
    assert all(list(layer) == LAYER_KEYS for layer in document["layers"])
    assert all(list(candidate) == CANDIDATE_KEYS for candidate in document["candidates"])
    assert document["best"] in document["candidates"]


def test_the_json_object_says_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "-t", "mobilenet", "-b", "2", "--rtt", "3", *AS_IT_IS)
    plan = plan_for("mobile_net", 2, 3)
    assert document["model"] == "mobile_net"
    assert len(document["layers"]) == len(plan.graph.layers)
    assert [candidate["total_ms"] for candidate in document["candidates"]] == [
        pytest.approx(candidate.stages.total_ms) for candidate in plan.candidates
    ]
    assert document["best"]["point"] == plan.best.point


def test_shipped_data_is_scaled_to_this_machine_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-t", "le_net", "-b", "2", "--predictor", "linear", "--threads", "1", "--cloud-threads", "1"]
    document = run_json(capsys, *flags)
    for side in SIDES:
        predictor = find_predictor(side, name="linear")
        predicted = scaled_to_machine(predictor, "cpu", 1).predict(model_graph("le_net"))
        assert [layer[f"{side}_ms"] for layer in document["layers"]] == predicted.latency_ms
        assert document["predicted_from"][side] == predicted.origin
    assert deployment.main(flags) == 0
    assert f"edge predicted from {document['predicted_from']['edge']}" in capsys.readouterr().out


def test_the_speed_of_this_machine_is_measured_again_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []
    monkeypatch.setattr(process, "forget_speeds", lambda: forgotten.append(True))
    run_json(capsys, "-t", "le_net", "-b", "2")
    assert not forgotten
    run_json(capsys, "-t", "le_net", "-b", "2", "--remeasure-machine")
    assert forgotten


def test_the_round_trip_is_nothing_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    without = run_json(capsys, "-t", "le_net", "-b", "2", *AS_IT_IS)
    zero = run_json(capsys, "-t", "le_net", "-b", "2", "--rtt", "0", *AS_IT_IS)
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


# ---------------------------------------------------------------- networks that are no chains


def dag_plan(strategy: Strategy = Strategy.DADS, rate_mb_per_s: float = 10, **settings: Any) -> SplitPlan:
    """Return a plan of GoogLeNet, cut behind its first inception block or so: an edge ten times as slow as here."""
    graph = model_graph("googlenet")
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in ("edge", "cloud"))
    return plan_split(graph, edge.scaled(10), cloud, rate_mb_per_s * MB, 5.0, strategy=strategy, **settings)


def total_of(plan: SplitPlan, edge_nodes: frozenset[int], rate_mb_per_s: float, rtt_ms: float = 5.0) -> float:
    """Return what a cut takes, by definition."""
    graph = plan.graph
    whole = len(edge_nodes) == len(graph.nodes)
    crossing = () if whole else graph.crossing(edge_nodes)
    size_bytes = sum(node.sent_bytes for node in crossing)
    reply_bytes = graph.output.size_bytes
    transfer_ms = transfer_time_ms(size_bytes, reply_bytes, rate_mb_per_s * MB, rtt_ms)
    layers = range(len(graph.layers))
    return (
        sum(plan.edge.latency_ms[layer] for layer in layers if layer + 1 in edge_nodes)
        + sum(plan.cloud.latency_ms[layer] for layer in layers if layer + 1 not in edge_nodes)
        + (transfer_ms + TENSOR_MS * (len(crossing) - 1) if crossing else 0.0)
    )


@pytest.mark.parametrize("rate", [0.1, 1, 5, 20, 50, 100, 1000])
def test_dads_is_at_least_as_good_as_every_other_strategy(rate: float) -> None:
    best_ms = dag_plan(rate_mb_per_s=rate).best.stages.total_ms
    others = [dag_plan(strategy, rate).best.stages.total_ms for strategy in Strategy]
    assert best_ms == pytest.approx(min(others), rel=1e-5)


@pytest.mark.parametrize("strategy", Strategy)
def test_every_candidate_takes_what_its_nodes_and_tensors_take(strategy: Strategy) -> None:
    plan = dag_plan(strategy, 20)
    for candidate in plan.candidates:
        edge_nodes = plan.edge_nodes(candidate)
        assert candidate.point == len(edge_nodes) - 1
        assert candidate.stages.total_ms == pytest.approx(total_of(plan, edge_nodes, 20))
    points = [candidate.point for candidate in plan.candidates]
    assert points == sorted(points)


def test_a_better_cut_inside_a_block_is_found() -> None:
    graph = model_graph("googlenet")
    size = len(graph.layers)
    inside = {node.index for node in graph.nodes if node.name.startswith("inception4b.branch2")}
    before = next(node.index for node in graph.nodes if node.name == "inception4a.cat")
    edge_nodes = {*range(before + 1), *inside}
    here = LayerLatencies(*[[0.0 if layer + 1 in edge_nodes else 9.0 for layer in range(size)]] * 3, "x")
    there = LayerLatencies(*[[9.0 if layer + 1 in edge_nodes else 0.0 for layer in range(size)]] * 3, "x")
    plan = plan_split(graph, here, there, 1e9, 1.0)
    assert plan.edge_nodes(plan.best) == edge_nodes
    assert len(plan.crossing(plan.best)) == 2
    assert plan.best.layer == " + ".join(node.name for node in plan.crossing(plan.best))


def test_cuts_that_do_not_fit_are_no_candidates() -> None:
    limit = 2 * MB
    plan = dag_plan(rate_mb_per_s=0.1, max_edge_bytes=limit)
    assert plan.best.point < len(plan.graph.layers)
    assert all(plan.memory(candidate).total_bytes <= limit for candidate in plan.candidates)
    with pytest.raises(PlanningError, match=r"no cut of googlenet .* fits into 1.0 KB"):
        dag_plan(max_edge_bytes=1000)


def test_of_a_chain_the_best_point_that_fits_is_found() -> None:
    graph = model_graph("alex_net")
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in ("edge", "cloud"))
    free, limited = (plan_split(graph, edge, cloud, 1e4, 5.0, max_edge_bytes=size) for size in (math.inf, 50 * MB))
    fitting = [candidate for candidate in free.candidates if free.memory(candidate).total_bytes <= 50 * MB]
    assert limited.best == min(fitting, key=lambda candidate: candidate.stages.total_ms)


def test_for_throughput_the_bottleneck_is_no_longer_than_that_of_any_partition_point() -> None:
    plan = dag_plan(rate_mb_per_s=20, objective=Objective.THROUGHPUT)
    points = dag_plan(Strategy.NEUROSURGEON, 20, objective=Objective.THROUGHPUT)
    assert plan.best.busy.longest_ms <= points.best.busy.longest_ms * (1 + 1e-9)


def test_a_cut_of_a_graph_is_printed_with_its_nodes_and_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "googlenet", "-b", "1000", "--predictor", "linear", "--strategy", "cloud-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"best latency : \d+\.\d\d ms , edge nodes : 1 of \d+", line) for line in lines)
    assert "transferred tensor : x , 1x3x224x224 uint8 , 150.5 KB" in lines


def test_json_says_where_a_graph_is_cut_and_what_each_half_holds(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-t", "resnet18", "-b", "9999", "--predictor", "linear", "--strategy", "chain-of-blocks"]
    document = run_json(capsys, *command)
    graph = model_graph("resnet18")
    nodes = document["edge_nodes"]
    assert document["strategy"] == "chain-of-blocks"
    assert nodes == list(range(document["best"]["point"] + 1))
    assert sum(tensor["bytes"] for tensor in document["crossing"]) == document["best"]["crossing_bytes"]
    assert all(list(tensor) == ["name", "shape", "dtype", "bytes"] for tensor in document["crossing"])
    held = document["edge_parameter_bytes"] + document["cloud_parameter_bytes"]
    assert held == graph.parameter_bytes(range(len(graph.nodes)))


# ---------------------------------------------------------------- strategies beside each other


def test_strategies_are_compared_in_a_table_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["-t", "resnet18", *AS_IT_IS, "--compare", "-b", "0.1,10,1000", "--excel", "table.xlsx"]
    assert deployment.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["MB/s", *Strategy]
    assert [line.split()[0] for line in lines[2:5]] == ["0.1", "10", "1000"]
    assert any(line.startswith("best cut changes at ") for line in lines)
    assert load_workbook("table.xlsx").sheetnames == ["strategies", "crossovers"]
    with Image.open("resnet18-strategies.png") as image:
        assert image.format == "PNG"


def test_at_a_crossover_the_cuts_below_and_above_take_the_same() -> None:
    def plan_at(rate_bytes_per_s: float, strategy: Strategy) -> SplitPlan:
        return dag_plan(strategy, rate_bytes_per_s / MB)

    comparison = compare(model_graph("googlenet"), plan_at, [1e5, 1e9])
    assert comparison.crossovers
    for change in comparison.crossovers:
        below, above = (
            total_of(plan, plan.edge_nodes(plan.best), change.rate / MB) for plan in (change.below, change.above)
        )
        assert below == pytest.approx(above, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "-b", "1"], "--compare needs two bandwidths or more"),
        (["-b", "1,2"], "--compare needs two bandwidths or more"),
        (["--compare", "-b", "1,2", "--graph", "cut.svg"], "leave --compare out"),
        (["-b", "1", "--graph", "cut.jpeg"], "cannot draw cut.jpeg"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deployment.main(["-t", "le_net", "--predictor", "linear", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_limit_of_memory_that_nothing_fits_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "le_net", "-b", "1", "--predictor", "linear", "--max-edge-memory", "0.1"]) == 1
    assert "fits into 100.0 KB on the edge" in capsys.readouterr().err
