"""The printed output: the contract's lines letter by letter, and documents of plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import socket

import numpy as np
import pytest
import torch

from neurosurgeon.cloud.events import CloudEvent
from neurosurgeon.edge.outcome import output_document
from neurosurgeon.edge.records import (
    Answered,
    EdgeComputed,
    Finished,
    Guess,
    LinkKnown,
    Planned,
    Prepared,
    Replied,
    Sent,
)
from neurosurgeon.engine.base import Verdict
from neurosurgeon.engine.torch_engine import as_array
from neurosurgeon.graph.trees import Leaf
from neurosurgeon.planner.plan import Candidate, SplitPlan, plan_split
from neurosurgeon.predictor.latencies import LayerFeature
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.reports.text import FINISHED, EdgeReport, cloud_lines, print_features, print_json, print_plan
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import StageTimes, stage_timings
from tests.equality import output_digest
from tests.networks import model_graph


def plan_of(model: str) -> SplitPlan:
    graph = model_graph(model)
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in SIDES)
    return plan_split(graph, edge, cloud, 1e6, 5.0)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def report(stream: io.StringIO) -> EdgeReport:
    return EdgeReport(stream)


# ---------------------------------------------------------------- the edge


def test_the_lines_of_a_task_are_those_of_the_contract(report: EdgeReport, stream: io.StringIO) -> None:
    best = Candidate(0, "None", StageTimes(0.0, 1.07, 9.0), StageTimes(0.0, 1.0, 9.0), 602_112)
    report(LinkKnown(LinkEstimate(3259.5787388244685e6, 1.0)))
    report(Planned(dataclasses.replace(plan_of("alex_net"), best=best), best))
    report(Prepared())
    report(EdgeComputed("alex_net", 0.072))
    report(Sent())
    report(Replied("alex_net", StageTimes(0.072, 0.129, 34.621)))
    report(Finished())
    assert stream.getvalue().splitlines() == [
        "get bandwidth value : 3259.5787388244685 MB/s",
        "best latency : 10.07 ms , best partition point : 0 - None",
        "-" * 106,
        "short message , model type has been sent successfully",
        "short message , partition strategy has been sent successfully",
        "alex_net 在边缘端设备上推理完成 - 0.072 ms",
        "get yes , edge output has been sent successfully",
        "alex_net 传输完成 - 0.129 ms",
        "alex_net 在云端设备上推理完成 - 34.621 ms",
        "================= DNN Collaborative Inference Finished. ===================",
    ]


def test_a_forced_point_is_shown_after_the_best(report: EdgeReport, stream: io.StringIO) -> None:
    best = Candidate(0, "None", StageTimes(0.0, 1.0, 9.0), StageTimes(0.0, 1.0, 9.0), 602_112)
    forced = Candidate(3, "features.2 (maxpool)", StageTimes(2.0, 3.0, 7.5), StageTimes(2.0, 2.0, 7.5), 301_056)
    report(Planned(dataclasses.replace(plan_of("alex_net"), best=best), forced))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "best latency : 10.00 ms , best partition point : 0 - None"
    assert lines[1] == "forced partition point : 3 - features.2 (maxpool) , 12.50 ms"


def test_a_report_without_stream_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    EdgeReport()(Finished())
    assert capsys.readouterr().out == FINISHED + "\n"


ANSWERED = Answered(
    guesses=[],
    is_seeded=False,
    predicted=StageTimes(1, 2, 3),
    measured=StageTimes(2, 3, 4),
    timings={},
    runs=1,
    origins={},
    where="split",
    verdict=None,
)


@pytest.mark.parametrize(("is_trained", "title"), [(True, "top-5 classes:"), (False, "the classes mean nothing")])
def test_classes_of_untrained_weights_are_marked_as_meaningless(
    report: EdgeReport, stream: io.StringIO, is_trained: bool, title: str
) -> None:
    guess = Guess(7, "cock" if is_trained else None, 0.5)
    report(ANSWERED._replace(guesses=[guess], is_seeded=not is_trained))
    first, second, *_ = stream.getvalue().splitlines()
    assert title in first
    assert second.split() == ["50.00%", *(["cock"] if is_trained else ["class", "7"])]


def test_predicted_times_are_above_measured_times(report: EdgeReport, stream: io.StringIO) -> None:
    report(ANSWERED._replace(runs=20))
    _, predicted, measured, where = stream.getvalue().splitlines()
    assert predicted.replace("ms", "").split() == ["predicted", "1.000", "2.000", "3.000", "6.000"]
    assert measured.replace("ms", "").split() == ["measured", "2.000", "3.000", "4.000", "9.000"]
    assert where == "answered by split"


def test_a_single_run_is_marked_as_cold(report: EdgeReport, stream: io.StringIO) -> None:
    report(ANSWERED)
    assert "--repeat" in stream.getvalue().splitlines()[-2]


def test_repeated_runs_show_their_spread(report: EdgeReport, stream: io.StringIO) -> None:
    report(ANSWERED._replace(runs=2, timings=stage_timings([StageTimes(1, 2, 3), StageTimes(3, 2, 1)])))
    lines = stream.getvalue().splitlines()[-4:]
    assert [line.split()[0] for line in lines] == ["edge", "transfer", "cloud", "total"]
    assert lines[0].endswith("median 2.000 ms, min 1.000, max 3.000, interquartile 1.000 (2 runs)")


def test_a_verified_answer_shows_the_difference(report: EdgeReport, stream: io.StringIO) -> None:
    report(ANSWERED._replace(verdict=Verdict(0.0, 0.0, True)))
    assert stream.getvalue().endswith(": 0\n")


# ---------------------------------------------------------------- the cloud


def test_the_cloud_prints_the_lines_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        for event in CloudEvent:
            cloud_lines(event, sock)
        described = str(sock)
    assert capsys.readouterr().out.splitlines() == [
        f"successfully connection :{described}",
        "get model type successfully.",
        "get partition point successfully.",
        "get edge_output and transfer latency successfully.",
        "short message , transfer latency has been sent successfully",
        "short message , cloud latency has been sent successfully",
        "================= DNN Collaborative Inference Finished. ===================",
    ]


# ---------------------------------------------------------------- documents and tables


def test_a_json_document_is_one_line_of_readable_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "推理", "values": [1, 2.5, None]})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "推理" in line
    assert json.loads(line) == {"name": "推理", "values": [1, 2.5, None]}


def test_an_output_is_described_by_shape_type_digest_and_guesses() -> None:
    output = np.array([[1.0, 2.0]], np.float32)
    document = output_document(Leaf(0), [output], [Guess(1, "goldfish", 0.7)])
    assert document == {
        "shape": [1, 2],
        "dtype": "float32",
        "digest": hashlib.sha256(output.tobytes()).hexdigest(),
        "top5": [{"index": 1, "label": "goldfish", "probability": 0.7}],
    }


def test_a_plan_document_is_plain_json() -> None:
    plan = plan_of("le_net")
    document = plan.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert [layer["index"] for layer in document["layers"]] == list(range(1, 13))


def test_a_printed_plan_marks_only_the_best_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("le_net")
    print_plan(plan, 1.0, 5.0)
    marked = [line for line in capsys.readouterr().out.splitlines() if "<- best" in line]
    assert len(marked) == 1
    assert int(marked[0].split()[0]) == plan.best.point


def test_the_layer_study_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_features([LayerFeature(1, "features.0", "conv", (1, 6, 224, 224), 1_204_224, 1.5, 1.5)])
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["1", "features.0", "conv", "1x6x224x224", "1.2", "MB", "1.500", "1.500"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_an_output_of_any_type_has_a_digest(dtype: torch.dtype) -> None:
    outputs = [torch.tensor([[0, 1, 1]]).to(dtype), torch.tensor([[1, 0, 1]]).to(dtype), torch.zeros(1, 0, dtype=dtype)]
    assert len({output_digest(as_array(output)) for output in outputs}) == 3
    assert output_digest(np.zeros((2, 3)).T) == output_digest(np.zeros((3, 2)))
