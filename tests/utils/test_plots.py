"""Plots: a picture is written without a display, and a wrong ending is the user's mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from deployment import SplitPlan, load_predictors, plan_split
from models.zoo import model_graph
from utils.errors import UsageError
from utils.plots import plot_plan


@pytest.fixture(scope="module")
def plan() -> SplitPlan:
    return plan_split(model_graph("alex_net"), *load_predictors(None, None), 1e6, 5.0)


def test_a_plan_becomes_a_picture(tmp_path: Path, plan: SplitPlan) -> None:
    plot_plan(tmp_path / "plan.png", plan, 1.0, 5.0)
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


@pytest.mark.parametrize("name", ["plan.sheet", "missing/plan.png"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, plan: SplitPlan, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write .*{name}"):
        plot_plan(tmp_path / name, plan, 1.0, 5.0)


def test_no_figure_stays_open(tmp_path: Path, plan: SplitPlan) -> None:
    from matplotlib import pyplot

    plot_plan(tmp_path / "plan.png", plan, 1.0, 5.0)
    assert pyplot.get_fignums() == []
