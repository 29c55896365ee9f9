"""Plots: a picture is written without a display, and an unknown suffix is a usage error."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from neurosurgeon.edge.records import TaskResult
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.reports.plots import plot_plan, plot_queue, plot_scatter
from neurosurgeon.utils.errors import UsageError
from tests.edge.samples import failed, finished, queue_of
from tests.networks import model_graph


@pytest.fixture(scope="module")
def plan() -> SplitPlan:
    graph = model_graph("alex_net")
    edge, cloud = (find_predictor(side, name="linear").predict(graph) for side in SIDES)
    return plan_split(graph, edge, cloud, 1e6, 5.0)


def test_a_plan_becomes_a_picture(tmp_path: Path, plan: SplitPlan) -> None:
    plot_plan(tmp_path / "plan.png", plan, 1.0, 5.0)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


@pytest.mark.parametrize("name", ["plan.sheet", "missing/plan.png"])
def test_an_unwritable_path_is_named(tmp_path: Path, plan: SplitPlan, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write .*{name}"):
        plot_plan(tmp_path / name, plan, 1.0, 5.0)


def test_no_figure_stays_open(tmp_path: Path, plan: SplitPlan) -> None:
    from matplotlib import pyplot

    plot_plan(tmp_path / "plan.png", plan, 1.0, 5.0)
    assert pyplot.get_fignums() == []


def test_a_scatter_plot_has_a_panel_for_each_series(tmp_path: Path) -> None:
    points = [(1.0, 1.1, "one"), (10.0, 9.0, "ten")]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot_scatter(one, {"edge": points})
    plot_scatter(two, {"edge": points, "cloud": points})
    with Image.open(one) as narrow, Image.open(two) as wide:
        assert wide.width > 1.5 * narrow.width


# ---------------------------------------------------------------- a queue


@pytest.mark.parametrize("count", [40, 320])
def test_a_queue_becomes_a_picture(tmp_path: Path, count: int) -> None:
    plot_queue(tmp_path / "queue.png", queue_of(count))
    with Image.open(tmp_path / "queue.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


@pytest.mark.parametrize("results", [[], [failed(1)], [finished(1)], [finished(1, rate_bytes_per_s=0.0), failed(2)]])
def test_a_queue_with_few_results_is_drawn(tmp_path: Path, results: list[TaskResult]) -> None:
    plot_queue(tmp_path / "queue.svg", results)
    assert (tmp_path / "queue.svg").stat().st_size > 0


@pytest.mark.parametrize("name", ["queue.sheet", "missing/queue.png"])
def test_an_unwritable_path_of_a_queue_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write .*{name}"):
        plot_queue(tmp_path / name, [finished(1)])
