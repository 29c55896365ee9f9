"""Plans: the best point against brute force, extreme links, errors of predictions, and the planning command."""

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
def test_plan_has_the_best_candidate_of_brute_force(model: str, rate: float, rtt_ms: float, slowdown: float) -> None:
    plan = plan_for(model, rate, rtt_ms, edge_slowdown=slowdown)
    graph = plan.graph
    totals = []
    for point in range(len(graph.layers) + 1):
        transfer_ms = transfer_time_ms(graph.boundary_bytes[point], 4000, rate * MB, rtt_ms)
        totals.append(plan.edge.total(slice(point)) + transfer_ms + plan.cloud.total(slice(point, None)))
        assert plan.candidates[point].stages.total_ms == pytest.approx(totals[-1])
    assert totals[plan.best.point] == pytest.approx(min(totals))


@pytest.mark.parametrize("model", ZOO)
def test_candidates_are_in_order_with_names_of_layers(model: str) -> None:
    plan = plan_for(model, 10, 5)
    assert [candidate.point for candidate in plan.candidates] == list(range(len(plan.graph.layers) + 1))
    assert plan.candidates[0].layer == "None"
    assert plan.candidates[1].layer == str(plan.graph.layers[0])
    assert plan.best is plan.candidates[plan.best.point]


@pytest.mark.parametrize("model", ZOO)
def test_candidate_with_all_on_the_edge_sends_nothing(model: str) -> None:
    last = plan_for(model, 0.01, 1000).candidates[-1]
    assert (last.boundary_bytes, last.stages.transfer_ms, last.stages.cloud_ms) == (0, 0, 0)


@pytest.mark.parametrize("model", ZOO)
def test_plan_sends_the_input_on_a_perfect_link(model: str) -> None:
    best = plan_for(model, 1e5, 0, edge_slowdown=100).best
    assert (best.point, best.layer, best.stages.edge_ms) == (0, "None", 0)


@pytest.mark.parametrize("model", ZOO)
def test_plan_sends_nothing_on_a_very_slow_link(model: str) -> None:
    plan = plan_for(model, 1e-6, 10_000, edge_slowdown=100)
    assert plan.best.point == len(plan.graph.layers)


def test_plan_splits_the_network_on_a_link_in_between() -> None:
    plans = [plan_for("alex_net", rate, 1, edge_slowdown=10) for rate in (0.2, 0.3, 0.5, 0.7, 1.0)]
    assert any(0 < plan.best.point < len(plan.graph.layers) for plan in plans)


def test_plan_is_never_slower_on_a_faster_link() -> None:
    totals = [plan_for("alex_net", rate, 5).best.stages.total_ms for rate in (0.1, 1, 10, 100, 1000)]
    assert totals == sorted(totals, reverse=True)


def test_predict_refuses_a_kind_without_predictor() -> None:
    with pytest.raises(MissingPredictorError, match=r"features\.0"):
        LatencyPredictor("linear", {}, {}).predict(model_graph("le_net"))


def test_find_predictor_prefers_that_of_the_user(tmp_path: Path) -> None:
    document = json.loads(config_path("edge").read_text())
    document["provenance"]["threads"] = 17
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert find_predictor("edge", path=tmp_path / "mine.json").threads == 17
    assert find_predictor("cloud", name="linear").provenance["side"] == "cloud"
    with pytest.raises(DataSetError, match=r"none\.json"):
        find_predictor("cloud", path=tmp_path / "none.json")


# ---------------------------------------------------------------- errors of predictions


def flat(graph_layers: int, latency_ms: float, spread: float) -> LayerLatencies:
    """Return the same latency for every layer, give or take ``spread`` of it."""
    latencies = [latency_ms] * graph_layers
    return LayerLatencies(latencies, [v * (1 - spread) for v in latencies], [v * (1 + spread) for v in latencies], "x")


@pytest.mark.parametrize(("spread", "is_close"), [(0.001, False), (0.9, True)])
def test_too_close_to_call_depends_on_the_errors(spread: float, is_close: bool) -> None:
    graph = model_graph("le_net")
    size = len(graph.layers)
    plan = plan_split(graph, flat(size, 1.0, spread), flat(size, 1.1, spread), 1.0, 1000.0)
    assert plan.best.point == size
    assert plan.runner_up is not None
    assert plan.runner_up.stages.total_ms == min(c.stages.total_ms for c in plan.candidates if c is not plan.best)
    assert plan.is_too_close_to_call is False  # 600 KB at 1 byte/s
    fast = plan_split(graph, flat(size, 1.0, spread), flat(size, 1.1, spread), 1e12, 0.05)
    assert fast.is_too_close_to_call is is_close


def with_last_layer(others: LayerLatencies, latency_ms: float, spread: float) -> LayerLatencies:
    """Return latencies with one layer more, give or take ``spread`` of its latency."""
    columns = [[*getattr(others, name)] for name in ("latency_ms", "low_ms", "high_ms")]
    for column, factor in zip(columns, (1, 1 - spread, 1 + spread), strict=True):
        column.append(latency_ms * factor)
    return LayerLatencies(*columns, "x")


def unsure_but_for_the_last(last_spread: float, objective: Objective, cloud_factor: float = 1.5) -> SplitPlan:
    """Return a plan of AlexNet whose best cut and runner-up differ in the last layer alone."""
    graph = model_graph("alex_net")
    others = flat(len(graph.layers) - 1, 20.0, 0.9)
    edge = with_last_layer(others, 1.0, last_spread)
    cloud = with_last_layer(others.scaled(cloud_factor), 2.0, last_spread)
    plan = plan_split(graph, edge, cloud, 1e12, 0.05, objective=objective)
    assert plan.runner_up is not None
    assert {plan.best.point, plan.runner_up.point} == {len(graph.layers) - 1, len(graph.layers)}
    return plan


@pytest.mark.parametrize(("spread", "is_close"), [(0.0, False), (0.4, False), (0.9, True)])
def test_too_close_to_call_counts_only_layers_that_differ(spread: float, is_close: bool) -> None:
    plan = unsure_but_for_the_last(spread, Objective.LATENCY)
    runner_up = plan.runner_up
    assert runner_up is not None
    assert runner_up.stages.total_ms < plan.interval(plan.best).high_ms
    assert plan.is_too_close_to_call is is_close


def test_too_close_to_call_is_false_for_one_more_layer() -> None:
    plan = unsure_but_for_the_last(0.9, Objective.THROUGHPUT, cloud_factor=45.0)
    assert plan.best.point < len(plan.graph.layers)
    assert plan.is_too_close_to_call is False


@pytest.mark.parametrize(("spread", "is_close"), [(0.0, False), (0.5, True)])
def test_too_close_to_call_counts_all_layers_of_two_bottlenecks(spread: float, is_close: bool) -> None:
    graph = model_graph("alex_net")
    sides = flat(len(graph.layers), 1.0, spread), flat(len(graph.layers), 0.9, spread)
    plan = plan_split(graph, *sides, 1e12, 0.05, objective=Objective.THROUGHPUT)
    assert plan.runner_up is not None
    edge_is_busier = [found.busy.edge_ms > found.busy.cloud_ms for found in (plan.best, plan.runner_up)]
    assert sorted(edge_is_busier) == [False, True]
    assert plan.is_too_close_to_call is is_close


def test_candidates_are_built_once_and_only_when_read() -> None:
    candidates = plan_for("alex_net", 10, 5).candidates
    assert candidates[3] is candidates[3]
    assert candidates[-1] is candidates[len(candidates) - 1]
    assert candidates[1:3] == [candidates[1], candidates[2]]
    assert list(candidates)[3] is candidates[3]
    with pytest.raises(IndexError):
        candidates[len(candidates)]


def test_interval_contains_the_total_and_both_partitions() -> None:
    graph = model_graph("le_net")
    size = len(graph.layers)
    plan = plan_split(graph, flat(size, 1.0, 0.5), flat(size, 1.0, 0.0), 1e9, 0.0)
    all_cloud, all_edge = plan.interval(plan.candidates[0]), plan.interval(plan.candidates[-1])
    assert all_cloud.low_ms == pytest.approx(all_cloud.high_ms) == pytest.approx(plan.candidates[0].stages.total_ms)
    assert all_edge.low_ms < plan.candidates[-1].stages.total_ms < all_edge.high_ms


def test_transfer_factor_makes_transfers_longer() -> None:
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


def test_command_prints_every_candidate_and_the_best(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_json_has_exactly_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_json_has_the_values_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_remeasure_machine_forgets_measured_speeds(
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


def test_command_saves_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_wrong_command_line_is_one_line_and_code_2(
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
def test_wrong_file_is_one_line_and_code_2(
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
    """Return a plan of GoogLeNet for an edge that is ten times as slow, which cuts after an early inception block."""
    graph = model_graph("googlenet")
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in ("edge", "cloud"))
    return plan_split(graph, edge.scaled(10), cloud, rate_mb_per_s * MB, 5.0, strategy=strategy, **settings)


def total_of(plan: SplitPlan, edge_nodes: frozenset[int], rate_mb_per_s: float, rtt_ms: float = 5.0) -> float:
    """Return the total time of a cut, by definition, ms."""
    graph = plan.graph
    whole = len(edge_nodes) == len(graph.nodes)
    boundary = () if whole else graph.boundary(edge_nodes)
    size_bytes = sum(node.sent_bytes for node in boundary)
    reply_bytes = graph.outputs[0].spec.size_bytes
    transfer_ms = transfer_time_ms(size_bytes, reply_bytes, rate_mb_per_s * MB, rtt_ms)
    layers = range(len(graph.layers))
    return (
        sum(plan.edge.latency_ms[layer] for layer in layers if layer + 1 in edge_nodes)
        + sum(plan.cloud.latency_ms[layer] for layer in layers if layer + 1 not in edge_nodes)
        + (transfer_ms + TENSOR_MS * (len(boundary) - 1) if boundary else 0.0)
    )


@pytest.mark.parametrize("rate", [0.1, 1, 5, 20, 50, 100, 1000])
def test_dads_is_no_slower_than_every_other_strategy(rate: float) -> None:
    best_ms = dag_plan(rate_mb_per_s=rate).best.stages.total_ms
    others = [dag_plan(strategy, rate).best.stages.total_ms for strategy in Strategy]
    assert best_ms == pytest.approx(min(others), rel=1e-5)


@pytest.mark.parametrize("strategy", Strategy)
def test_candidate_has_the_times_of_its_nodes_and_tensors(strategy: Strategy) -> None:
    plan = dag_plan(strategy, 20)
    for candidate in plan.candidates:
        edge_nodes = plan.edge_nodes(candidate)
        assert candidate.point == len(edge_nodes) - 1
        assert candidate.stages.total_ms == pytest.approx(total_of(plan, edge_nodes, 20))
    points = [candidate.point for candidate in plan.candidates]
    assert points == sorted(points)


def test_plan_finds_a_better_cut_inside_a_block() -> None:
    graph = model_graph("googlenet")
    size = len(graph.layers)
    inside = {node.index for node in graph.nodes if node.name.startswith("inception4b.branch2")}
    before = next(node.index for node in graph.nodes if node.name == "inception4a.cat")
    edge_nodes = {*range(before + 1), *inside}
    here = LayerLatencies(*[[0.0 if layer + 1 in edge_nodes else 9.0 for layer in range(size)]] * 3, "x")
    there = LayerLatencies(*[[9.0 if layer + 1 in edge_nodes else 0.0 for layer in range(size)]] * 3, "x")
    plan = plan_split(graph, here, there, 1e9, 1.0)
    assert plan.edge_nodes(plan.best) == edge_nodes
    assert len(plan.boundary(plan.best)) == 2
    assert plan.best.layer == " + ".join(node.name for node in plan.boundary(plan.best))


def test_candidates_fit_the_memory_limit() -> None:
    limit = 2 * MB
    plan = dag_plan(rate_mb_per_s=0.1, max_edge_bytes=limit)
    assert plan.best.point < len(plan.graph.layers)
    assert all(plan.memory(candidate).total_bytes <= limit for candidate in plan.candidates)
    with pytest.raises(PlanningError, match=r"no cut of googlenet .* fits into 1.0 KB"):
        dag_plan(max_edge_bytes=1000)


def test_plan_of_a_chain_has_the_best_point_that_fits() -> None:
    graph = model_graph("alex_net")
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in ("edge", "cloud"))
    free, limited = (plan_split(graph, edge, cloud, 1e4, 5.0, max_edge_bytes=size) for size in (math.inf, 50 * MB))
    fitting = [candidate for candidate in free.candidates if free.memory(candidate).total_bytes <= 50 * MB]
    assert limited.best == min(fitting, key=lambda candidate: candidate.stages.total_ms)


def test_bottleneck_is_no_longer_than_at_any_point() -> None:
    plan = dag_plan(rate_mb_per_s=20, objective=Objective.THROUGHPUT)
    points = dag_plan(Strategy.NEUROSURGEON, 20, objective=Objective.THROUGHPUT)
    assert plan.best.busy.longest_ms <= points.best.busy.longest_ms * (1 + 1e-9)


def test_command_prints_nodes_and_tensors_of_a_graph_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "googlenet", "-b", "1000", "--predictor", "linear", "--strategy", "cloud-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"best latency : \d+\.\d\d ms , edge nodes : 1 of \d+", line) for line in lines)
    assert "transferred tensor : x , 1x3x224x224 uint8 , 150.5 KB" in lines


def test_json_has_the_cut_of_a_graph_and_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_compare_prints_a_table_and_saves_a_plot(
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


def test_cuts_beside_a_crossover_take_the_same_time() -> None:
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
def test_flags_that_exclude_each_other_are_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deployment.main(["-t", "le_net", "--predictor", "linear", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_memory_limit_that_no_cut_fits_is_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert deployment.main(["-t", "le_net", "-b", "1", "--predictor", "linear", "--max-edge-memory", "0.1"]) == 1
    assert "fits into 100.0 KB on the edge" in capsys.readouterr().err
