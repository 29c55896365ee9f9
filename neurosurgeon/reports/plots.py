"""Plots of plans, predictions and queues, with matplotlib.

Figures are made without pyplot, so no display is needed and no global state is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from neurosurgeon.utils.errors import UsageError, writing
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s, bytes_to_mb, ms_to_s

if TYPE_CHECKING:
    from neurosurgeon.edge.records import TaskResult
    from neurosurgeon.planner.compare import Comparison
    from neurosurgeon.planner.plan import SplitPlan

RATE_COLOUR = "#999999"
STAGES = ("edge", "uplink", "cloud")  # in the order of a result's spans
EDGE_COLOUR, TRANSFER_COLOUR, CLOUD_COLOUR = "#4c9f70", "#e0a030", "#4472a8"
STRATEGY_STYLES = (  # if strategies agree, the wider lines below stay visible
    {"color": "#b03030", "linewidth": 1.5, "zorder": 5},
    {"color": TRANSFER_COLOUR, "linewidth": 4},
    {"color": "#8a6fb0", "linewidth": 7, "alpha": 0.6},
    {"color": EDGE_COLOUR, "linewidth": 1.5, "linestyle": "--"},
    {"color": CLOUD_COLOUR, "linewidth": 1.5, "linestyle": "--"},
)


def plot_plan(path: Path, plan: SplitPlan, bandwidth_mb_per_s: float, rtt_ms: float) -> None:
    """Draw the latency and output size of each layer, and below them the stages of each partition point.

    Raises: UsageError: the file cannot be written, or its suffix is no known format.
    """
    width = max(8.0, 0.28 * len(plan.candidates) + 3)
    figure = Figure(figsize=(width, 9), layout="constrained")
    above, below = figure.subplots(2)
    figure.suptitle(f"{plan.graph.model} at {bandwidth_mb_per_s:g} MB/s, RTT {rtt_ms:g} ms")
    _draw_layers(above, plan)
    _draw_candidates(below, plan)
    _save(figure, path)


def _save(figure, path):
    try:
        with writing(path):
            figure.savefig(path, dpi=120)
    except ValueError as exc:  # an unknown suffix
        raise UsageError(f"cannot write the plot {path}: {exc}") from exc


def _draw_layers(axes, plan):
    positions = range(1, len(plan.graph.layers) + 1)
    axes.bar([x - 0.2 for x in positions], plan.edge.latency_ms, 0.4, label="edge latency", color=EDGE_COLOUR)
    axes.bar([x + 0.2 for x in positions], plan.cloud.latency_ms, 0.4, label="cloud latency", color=CLOUD_COLOUR)
    axes.set(ylabel="predicted latency, ms", title="layers")
    axes.set_xticks(list(positions), [layer.name for layer in plan.graph.layers], rotation=90, fontsize=7)
    sizes = axes.twinx()
    output_mb = [bytes_to_mb(layer.output.size_bytes) for layer in plan.graph.layers]
    sizes.plot(positions, output_mb, "o-", color="#b03030", markersize=3, linewidth=1, label="output size")
    sizes.set_ylabel("output, MB")
    sizes.set_ylim(bottom=0)
    (bars, bar_labels), (lines, line_labels) = axes.get_legend_handles_labels(), sizes.get_legend_handles_labels()
    axes.legend(bars + lines, bar_labels + line_labels, fontsize=8)


def _draw_candidates(axes, plan):
    points = [candidate.point for candidate in plan.candidates]
    bottom = [0.0] * len(points)
    for label, colour in (("edge", EDGE_COLOUR), ("transfer", TRANSFER_COLOUR), ("cloud", CLOUD_COLOUR)):
        heights = [getattr(candidate.stages, f"{label}_ms") for candidate in plan.candidates]
        axes.bar(points, heights, bottom=bottom, label=label, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    best = plan.best
    axes.annotate(
        f"best: {best.point}\n{best.stages.total_ms:.2f} ms",
        (best.point, best.stages.total_ms),
        xytext=(0, 22),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        fontweight="bold",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set_ylim(top=max(bottom) * 1.15)
    axes.set_xticks(points, [str(point) for point in points], fontsize=7)
    axes.set(xlabel="partition point: layers on the edge", ylabel="predicted latency, ms", title="partition points")
    axes.legend(fontsize=8)


def plot_strategies(path: Path, comparison: Comparison, rtt_ms: float) -> None:
    """Draw the latency of every strategy over bandwidth; dotted lines where the best cut changes.

    Raises: UsageError: the file cannot be written, or its suffix is no known format.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    rates = [bytes_per_s_to_mb_per_s(rate) for rate in comparison.rates_bytes_per_s]
    for (strategy, plans), style in zip(comparison.plans.items(), STRATEGY_STYLES, strict=True):
        totals = [plan.best.stages.total_ms if plan else math.nan for plan in plans]
        axes.plot(rates, totals, label=str(strategy), **style)
    for change in comparison.crossovers:
        axes.axvline(bytes_per_s_to_mb_per_s(change.rate), color=RATE_COLOUR, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="uplink, MB/s (dotted: the best cut changes)")
    axes.set(yscale="log", ylabel="predicted latency, ms", title=f"{comparison.graph.model}, RTT {rtt_ms:g} ms")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_scatter(path: Path, series: Mapping[str, Sequence[tuple[float, float, str]]]) -> None:
    """Draw predicted over measured latencies, a panel for each series of (measured ms, predicted ms, label).

    Raises: UsageError: the file cannot be written, or its suffix is no known format.
    """
    figure = Figure(figsize=(6 * len(series), 6), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (title, points) in zip(panels, series.items(), strict=True):
        _draw_scatter(axes, title, points)
    _save(figure, path)


def _draw_scatter(axes, title, points):
    measured = [point[0] for point in points]
    ends = [min(measured) * 0.8, max(measured) * 1.25]
    axes.plot(ends, ends, color="#888888", linewidth=1)
    for share in (0.9, 1.1):
        axes.plot(ends, [end * share for end in ends], color="#bbbbbb", linewidth=0.8, linestyle="--")
    axes.scatter(measured, [point[1] for point in points], s=18, color=CLOUD_COLOUR)
    for x, y, label in points:
        axes.annotate(label, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", xlabel="measured latency, ms", title=f"{title} (dashed: 10 %)")
    axes.set(yscale="log", ylabel="predicted latency, ms")


# ---------------------------------------------------------------- a queue


def plot_queue(path: Path, results: Sequence[TaskResult]) -> None:
    """Draw a queue over time: the uplink's rate and the cut of each task, and below them the models on each stage.

    Tasks that failed before they ran have no time and are not drawn: the title has their number.

    Raises: UsageError: the file cannot be written, or its suffix is no known format.
    """
    ran = sorted((result for result in results if result.spans), key=lambda result: result.spans[0].start_ms)
    width = min(20.0, 9.0 + 0.05 * len(ran))
    figure = Figure(figsize=(width, 8), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    failed = sum(result.error is not None for result in results)
    figure.suptitle(f"a queue of {len(results)} tasks" + (f", {failed} failed" if failed else ""))
    models = sorted({result.task.model for result in results})
    colours = {model: f"C{index}" for index, model in enumerate(models)}
    _draw_rate(above, ran)
    _draw_cuts(above.twinx(), ran, colours)
    _draw_stages(below, ran, colours)
    if models:  # beside the panels, as dots may be anywhere inside
        figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def _draw_rate(axes, ran):
    known = [result for result in ran if result.rate_bytes_per_s > 0]
    starts_s = [ms_to_s(result.spans[0].start_ms) for result in known]
    rates = [bytes_per_s_to_mb_per_s(result.rate_bytes_per_s) for result in known]
    axes.step(starts_s, rates, where="post", color=RATE_COLOUR, linewidth=1.5)
    axes.set(ylabel="uplink, MB/s (line)", ylim=(0, 1.1 * max(rates, default=1.0)))
    axes.set_title("bandwidth, and the cut of each task when it started")


def _draw_cuts(axes, ran, colours):
    for model, colour in colours.items():
        planned = [result for result in ran if result.task.model == model and result.layers]
        starts_s = [ms_to_s(result.spans[0].start_ms) for result in planned]
        shares = [result.point / result.layers for result in planned]
        axes.plot(starts_s, shares, "o", color=colour, alpha=0.75, markersize=6, markeredgewidth=0, label=model)
    axes.set(ylabel="share of layers on the edge (dots)", ylim=(-0.05, 1.05))


def _draw_stages(axes, ran, colours):
    edge_width = 0.4 if len(ran) <= 100 else 0.0  # outlines would hide short bars among many
    for stage in range(len(STAGES)):
        for model, colour in colours.items():
            spans = [result.spans[stage] for result in ran if result.task.model == model and len(result.spans) > stage]
            bars = [(ms_to_s(span.start_ms), ms_to_s(span.end_ms - span.start_ms)) for span in spans]
            axes.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=edge_width)
    axes.set_yticks(range(len(STAGES)), STAGES)
    axes.set(ylim=(len(STAGES) - 0.5, -0.5), xlabel="time since the queue started, s", title="model on each stage")
