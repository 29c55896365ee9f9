"""Measure the error of the predictors: for each kind of layer, and for whole networks that no fit has seen.

python -m predictor.evaluate                         both sides, both predictors; tables, JSON, Excel, scatter plot
python -m predictor.evaluate --side edge --compare   kinds of trees side by side
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neurosurgeon.cli.parser import add_device, base_parser, positive_int
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.torch_engine import check_device
from neurosurgeon.predictor.evaluate import PREDICTORS, ROUNDS, Evaluation, evaluate_side, summaries
from neurosurgeon.utils.errors import UsageError, writing
from neurosurgeon.utils.files import replace_file


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the tables of one side: scores of each kind of layer, and errors of whole networks."""
    print(f"\n{evaluation.side}: layers held out\n{'predictor':<10}{'kind':<12}{'split':<19}{'rows':>6}", end="")
    print(f"{'within 10 %':>13}{'within 20 %':>13}{'MAPE':>8}{'R2':>7}{'coverage':>10}{'noise':>8}")
    for score in evaluation.kinds:
        noise = f"{evaluation.noise[score.kind]:>8.1%}" if score.kind in evaluation.noise else f"{'-':>8}"
        print(
            f"{score.predictor:<10}{score.kind:<12}{score.split:<19}{score.rows:>6}{score.within_10:>13.1%}"
            f"{score.within_20:>13.1%}{score.mape:>8.1%}{score.r2:>7.3f}{score.coverage:>10.1%}{noise}"
        )
    names = list(evaluation.networks[0].predicted_ms)
    print(
        f"\n{evaluation.side}: networks that no fit has seen\n{'network':<20}{'measured, ms':>13}{'noise':>8}", end=""
    )
    print("".join(f"{name:>15}" for name in names))
    for network in evaluation.networks:
        errors = "".join(f"{network.error(name):>+15.1%}" for name in names)
        print(f"{network.network:<20}{network.measured_ms:>13.2f}{network.noise:>8.1%}{errors}")
    for label, summary in summaries(evaluation).items():
        print(f"{label:<41}" + "".join(f"{summary[name]:>15.1%}" for name in names))
    print(f"layers of the data set take {evaluation.drift:.3f} of the time that they took when they were collected")


def save_evaluations(directory: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write the evaluations as JSON, Excel tables and a scatter plot.

    Raises: UsageError: a file cannot be written.
    """
    from neurosurgeon.reports.excel import save_tables
    from neurosurgeon.reports.plots import plot_scatter

    documents = [asdict(evaluation) | {"summary": summaries(evaluation)} for evaluation in evaluations]
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "evaluation.json", json.dumps(documents, indent=2) + "\n")
    tables: dict[str, list[dict[str, Any]]] = {}
    for evaluation in evaluations:
        tables[f"{evaluation.side} layers"] = [asdict(score) for score in evaluation.kinds]
        tables[f"{evaluation.side} networks"] = [
            {"network": network.network, "measured_ms": network.measured_ms, "noise": network.noise}
            | {f"{name}_ms": value for name, value in network.predicted_ms.items()}
            for network in evaluation.networks
        ]
    save_tables(directory / "evaluation.xlsx", tables)
    points = {
        f"{evaluation.side}, {name}": [(n.measured_ms, n.predicted_ms[name], n.network) for n in evaluation.networks]
        for evaluation in evaluations
        for name in PREDICTORS
    }
    plot_scatter(directory / "evaluation.png", points)


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    add_device(parser)
    parser.add_argument(
        "--side", choices=("edge", "cloud", "both"), default="both", help="side to evaluate (default: both)"
    )
    parser.add_argument("--dataset", type=Path, help="directory of data sets of that side (default: the data in use)")
    parser.add_number("--rounds", type=positive_int, default=ROUNDS, meaning="rounds of measuring networks, at least 2")
    parser.add_switch("--compare", "also evaluate other kinds of trees")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory to write (default: results)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    if args.rounds < 2:
        raise UsageError("--rounds must be at least 2: the noise is the difference between two groups of rounds")
    if args.dataset and args.side == "both":
        raise UsageError("--dataset belongs to one side: pass --side edge or --side cloud, too")
    sides = ("edge", "cloud") if args.side == "both" else (args.side,)
    evaluations = [
        evaluate_side(side, args.device, args.threads, dataset=args.dataset, rounds=args.rounds, compares=args.compare)
        for side in sides
    ]
    for evaluation in evaluations:
        print_evaluation(evaluation)
    save_evaluations(args.output, evaluations)
    print(f"\nwritten: evaluation.json, evaluation.xlsx and evaluation.png in {args.output}{os.sep}")
    return 0
