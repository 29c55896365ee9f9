"""Measure this device for one side of the split, then fit its predictors.

    python -m predictor.collect --side edge --device cpu --threads 1 --minutes 5

Every row is on disk as soon as its block of layers is measured. After Ctrl-C or a power cut, run the same command
again: it continues there. The data in use changes only when the collection is complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from neurosurgeon.cli.parser import add_device, base_parser, positive_float
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.torch_engine import check_device, use_threads
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.collect import (
    DEFAULT_MINUTES,
    FILES,
    SECONDS_PER_MINUTE,
    begin,
    collect,
    earlier_collections,
    new_provenance,
)
from neurosurgeon.predictor.places import collection_name, default_directory, parameter_file, root_for_new_data
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.sampling import RECIPES
from neurosurgeon.predictor.staging import activate
from neurosurgeon.predictor.store import fit_and_save
from neurosurgeon.reports.text import print_scores
from neurosurgeon.utils.errors import writing

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = "collect.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument("--side", choices=SIDES, required=True, help="side of the split that this device has")
    add_device(parser, default_threads="1 for the edge, all cores for the cloud")
    root = "predictor of a checkout, else in ~/.local/share/neurosurgeon"
    parser.add_argument(
        "--output", type=Path, help=f"directory of the CSV files (default: dataset/SIDE/own-NAME in {root})"
    )
    parser.add_argument(
        "--config", type=Path, help=f"parameter file to write (default: config/SIDE/own-NAME.json in {root})"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="measure these kinds again from the beginning; their old rows stay in use until the new ones are complete "
        "(default: continue an interrupted collection)",
    )
    parser.add_number(
        "--minutes",
        type=positive_float,
        default=DEFAULT_MINUTES,
        meaning="total time for these kinds, minutes, with interrupted runs before it",
    )
    parser.add_argument(
        "--kinds",
        type=LayerKind,
        nargs="+",
        choices=list(RECIPES),
        default=list(RECIPES),
        metavar="KIND",
        help="kinds of layers to measure; the rows of other kinds stay as they are (default: all)",
    )
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    threads = use_threads(args.threads or {"edge": 1, "cloud": os.cpu_count() or 1}[args.side])
    name, root = collection_name(args.device), root_for_new_data()
    directory = args.output or default_directory(args.side, name, root)
    provenance = new_provenance(args.side, args.device, threads)
    with writing(directory):
        partial = begin(directory, provenance, args.kinds, fresh=args.fresh)
        try:
            collect(partial, args.device, args.minutes, provenance, args.kinds)
            print_scores(fit_and_save(partial, args.config or parameter_file(args.side, name, root)))
        except KeyboardInterrupt:
            log.warning(
                "interrupted: %.0f of %.0f s are measured and kept in %s, but not in use yet; to continue: %s",
                earlier_collections(partial, args.kinds)[0],
                args.minutes * SECONDS_PER_MINUTE,
                partial,
                command_to_continue(args),
            )
            raise
        activate(directory, FILES)
    how = f": --{args.side}-config {directory} uses it" if args.output else " is in use"
    log.info("the data in %s%s", directory, how)
    return 0


def command_to_continue(args: argparse.Namespace) -> str:
    """Return the command that continues an interrupted collection: the same one, without --fresh."""
    words = ["python", "-m", "predictor.collect"]
    for name in ("side", "device", "threads", "output", "config", "minutes"):
        if getattr(args, name) is not None:
            words += [f"--{name}", f"{getattr(args, name)}"]
    if args.kinds != list(RECIPES):
        words += ["--kinds", *args.kinds]
    return shlex.join(words)
