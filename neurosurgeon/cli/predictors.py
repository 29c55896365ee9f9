"""Fit the predictors of one side again, and show their errors on held-out rows.

python -m predictor.predictor_utils --side edge
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from neurosurgeon.cli.parser import base_parser
from neurosurgeon.cli.process import run_main
from neurosurgeon.predictor.places import dataset_directory, default_directory, parameter_file
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import fit_and_save
from neurosurgeon.reports.text import print_scores


def main(argv: Sequence[str] | None = None, prog: str = "predictor_utils.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument("--side", choices=SIDES, required=True, help="side whose data sets are fitted")
    parser.add_argument("--dataset", type=Path, help="directory of CSV files (default: the data in use)")
    parser.add_argument("--output", type=Path, help="parameter file to write (default: beside the file in use)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    directory = dataset_directory(args.side, "cpu")
    name = "cpu" if args.dataset or directory == default_directory(args.side, "cpu") else directory.name
    print_scores(fit_and_save(args.dataset or directory, args.output or parameter_file(args.side, name)))
    return 0
