"""Correct a bias, forget it, and leave unbiased predictions as they are."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neurosurgeon.predictor.correction import DECAY, MAX_LOG_FACTOR, MIN_SAMPLES, Corrections, Residuals, _path


def after(ratios: list[float], start: Residuals | None = None) -> Residuals:
    residuals = start or Residuals()
    for ratio in ratios:
        residuals = residuals.with_sample(10.0, 10.0 * ratio)
    return residuals


def test_residuals_have_no_factor_before_a_few_inferences() -> None:
    for samples in range(MIN_SAMPLES):
        assert after([2.0] * samples).factor == 1.0
    assert after([2.0] * MIN_SAMPLES).factor == pytest.approx(2.0)


@pytest.mark.parametrize("bias", [0.5, 0.8, 1.3, 2.5])
def test_residuals_find_a_bias_in_noise(bias: float) -> None:
    rng = np.random.default_rng(0)
    factor = after((bias * np.exp(rng.normal(0, 0.05, 30))).tolist()).factor
    assert abs(np.log(factor / bias)) < abs(np.log(bias)) / 2


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1, 0.3])
def test_a_correction_costs_an_unbiased_stage_at_most_2_percent(noise: float) -> None:
    """Mean error with correction against without, over many runs of 60 inferences each."""
    rng = np.random.default_rng(7)
    with_correction, without = [], []
    for _ in range(200):
        residuals = Residuals()
        for measured in np.exp(rng.normal(0, noise, 60)).tolist():
            with_correction.append(abs(residuals.factor / measured - 1))
            without.append(abs(1 / measured - 1))
            residuals = residuals.with_sample(1.0, measured)
    assert np.mean(with_correction) <= np.mean(without) + 0.02 * np.mean(without) + 0.002
    assert np.mean(with_correction) - np.mean(without) < 0.02


def test_residuals_forget_a_bias_that_is_gone() -> None:
    learnt = after([2.0] * 20)
    assert after([1.0] * 40, learnt).factor == pytest.approx(1.0, abs=0.02)
    assert (1 - DECAY) ** 40 < 1e-3


@pytest.mark.parametrize("measured_ms", [0.06, 1e9])
def test_a_correction_is_bounded(measured_ms: float) -> None:
    residuals = Residuals()
    for _ in range(50):
        residuals = residuals.with_sample(10.0, measured_ms)
    assert abs(np.log(residuals.factor)) == pytest.approx(MAX_LOG_FACTOR)


def test_residuals_ignore_a_stage_that_did_not_run() -> None:
    assert Residuals().with_sample(0.0, 5.0) == Residuals() == Residuals().with_sample(5.0, 0.0)


def test_corrections_are_kept_between_runs() -> None:
    corrections = Corrections.load()
    for _ in range(5):
        corrections.learn("edge le_net", 10.0, 15.0)
    corrections.save()
    assert Corrections.load().factor("edge le_net") == pytest.approx(1.5)
    assert Corrections.load().factor("edge alex_net") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"a": {"mean": 0, "mean_square": 0, "samples": Infinity}}',
        '{"a": 1}',
        '{"a": {"mean": 99, "mean_square": 1, "samples": 5}}',
        '{"a": {"mean": NaN}}',
    ],
)
def test_damaged_corrections_are_reported_and_replaced(text: str, caplog: pytest.LogCaptureFixture) -> None:
    _path().parent.mkdir(parents=True, exist_ok=True)
    _path().write_text(text)
    corrections = Corrections.load()
    assert "starting without corrections" in caplog.text
    corrections.learn("a", 1.0, 2.0)
    corrections.save()
    assert json.loads(_path().read_text())["a"]["samples"] == 1
