"""The edge with a queue of tasks: each is split for the current link estimate, and many are in flight at once.

python tasks_edge_api.py -i 127.0.0.1 -p 9999 -d cpu
python tasks_edge_api.py --input-dir docs -t mobile_net alex_net --objective throughput --plot queue.png
python tasks_edge_api.py --input VIDEO.mp4 -t mobile_net --json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from neurosurgeon.cli import streams
from neurosurgeon.cli.parser import (
    Parser,
    access_of_edge,
    add_device,
    add_edge,
    add_labels,
    add_model_files,
    add_objective,
    add_weights,
    address_parser,
    non_negative_int,
    positive_float,
    positive_int,
)
from neurosurgeon.cli.process import EXIT_INTERRUPTED, deferred_interrupt, run_main
from neurosurgeon.cli.relay import add_shaping, shaped
from neurosurgeon.edge.inputs import draw_tasks, read_task_file, tasks_of_directory
from neurosurgeon.edge.labels import labels_of
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.run import CloudAddress, LinkChoice, run_queue
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.engine.base import find_engine
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights_sources import WeightsSources, parse_weights
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Schedule
from neurosurgeon.reports.queue_report import QueueReport, print_summary
from neurosurgeon.reports.summary import QueueSummary, queue_document, queue_sheets, summarise
from neurosurgeon.reports.text import print_json
from neurosurgeon.utils.errors import NeurosurgeonError

if TYPE_CHECKING:
    from neurosurgeon.edge.records import TaskResult

DEFAULT_TASKS = 40
DEFAULT_IN_FLIGHT = 8


def main(argv: Sequence[str] | None = None, prog: str = "tasks_edge_api.py") -> int:
    """Run this command; return its exit code."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser)
    _add_tasks(parser)
    add_edge(parser)
    add_shaping(parser)
    _add_queue(parser)
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save a row for each task, and the summary")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bandwidth, cuts and stages over time")
    parser.add_switch("--json", "print one JSON object on stdout (with --input, one a frame), and all lines on stderr")
    return run_main(parser, argv, _run)


def _add_tasks(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--tasks", type=positive_int, default=DEFAULT_TASKS, help=f"number of random tasks (default: {DEFAULT_TASKS})"
    )
    source.add_argument("--task-file", type=Path, metavar="FILE", help="file of tasks, one a line: MODEL [IMAGE]")
    source.add_argument("--input-dir", type=Path, metavar="DIR", help="directory of images, each of which is a task")
    streams.add_stream(parser, source)
    parser.add_argument(
        "--seed", type=non_negative_int, help="seed of the random tasks (default: other tasks in each run)"
    )
    parser.add_argument(
        "-t",
        "--type",
        nargs="+",
        default=list(ZOO),
        metavar="MODEL",
        help="models of random tasks; with --input-dir, models that the images get in turn (default: the four classic "
        "ones)",
    )
    add_model_files(parser)
    add_weights(parser)
    add_labels(parser)


def _add_queue(parser: Parser) -> None:
    parser.add_number(
        "--monitor-interval", type=positive_float, default=1.0, meaning="time between two link measurements, s"
    )
    parser.add_switch("--no-load-feedback", "plan as if the cloud were always idle")
    parser.add_number(
        "--in-flight",
        type=positive_int,
        default=DEFAULT_IN_FLIGHT,
        meaning="tasks started and without a result, at most; 1: one after the other",
    )
    parser.add_switch(
        "--no-hedging",
        "wait for the cloud however long a transfer is stalled, and finish here each computation that began here. "
        "Otherwise, with --on-cloud-loss local, a task is moved as soon as the other side is predicted to be faster, "
        "and the first result counts",
    )
    add_objective(parser)
    parser.add_argument(
        "--schedule",
        choices=("fifo", "johnson"),
        default="fifo",
        help="order of the tasks: that of the list (fifo), or Johnson's, for the shortest makespan (default: fifo)",
    )


def _run(args: argparse.Namespace) -> int:
    out = sys.stderr if args.json else sys.stdout
    catalogue = Catalogue(args.model_file)
    streams.check_flags(args)
    weights = parse_weights(catalogue, args.weights, args.pretrained)
    settings = settings_of(args, catalogue, weights)
    if args.input is not None:
        return streams.run(args, catalogue, settings)
    tasks = [replace(task, model=weights.named(task.model)) for task in tasks_of(args, catalogue)]
    access = replace(access_of_edge(args), cloud_name=args.ip)
    interrupted = threading.Event()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(shaped(args.ip, (args.port, args.monitor_port), args.shape, args.trace))

        def start() -> None:
            """Begin the trace of the emulated network, and finish tasks in flight before Ctrl-C ends the queue."""
            network.begin()
            stack.enter_context(deferred_interrupt(interrupted))

        report = stack.enter_context(QueueReport(out, start))
        outcome = run_queue(
            tasks,
            settings,
            lambda: find_engine()(catalogue, args.device),
            CloudAddress(network.host, args.port, args.monitor_port, access),
            LinkChoice(args.bandwidth, args.rtt, interval_s=args.monitor_interval),
            report,
            interrupted.is_set,
        )
    summary = summarise(
        outcome.results,
        makespan_ms=outcome.makespan_ms,
        objective=args.objective,
        schedule=args.schedule,
        predicted_makespan_ms=outcome.predicted_makespan_ms,
        predicted_from=outcome.origins,
    )
    print_summary(summary, out)
    save(args, outcome.results, summary)
    if interrupted.is_set():
        return EXIT_INTERRUPTED
    return 0 if all(result.is_finished for result in outcome.results) else NeurosurgeonError.exit_code


def tasks_of(args: argparse.Namespace, catalogue: Catalogue) -> list[QueuedTask]:
    """Return the tasks of the command line, in the order of their list.

    Raises: UsageError.
    """
    if args.task_file:
        return read_task_file(args.task_file, catalogue.canonical_name)
    models = [catalogue.canonical_name(name) for name in args.type]
    if args.input_dir:
        return tasks_of_directory(args.input_dir, models)
    return draw_tasks(args.tasks, args.seed, models)


def settings_of(args: argparse.Namespace, catalogue: Catalogue, weights: WeightsSources) -> QueueSettings:
    """Return the settings of the command line.

    Raises: UsageError: the device is missing, or the labels cannot be read.
    """
    if args.device == "cuda":
        find_engine()(catalogue, args.device)
    return QueueSettings(
        weights=weights,
        labels=labels_of(args.labels),
        device=args.device,
        threads=args.threads,
        predictor=args.predictor,
        edge_config=args.edge_config,
        cloud_config=args.cloud_config,
        learns=not args.no_correction,
        objective=Objective(args.objective),
        schedule=Schedule(args.schedule),
        in_flight=args.in_flight,
        uses_load=not args.no_load_feedback,
        hedges=not args.no_hedging,
        deadline_ms=args.deadline_ms,
        on_cloud_loss=OnCloudLoss(args.on_cloud_loss),
    )


def save(args: argparse.Namespace, results: Sequence[TaskResult], summary: QueueSummary) -> None:
    """Write the JSON document, the spreadsheet and the plot that the command line asks for.

    Raises: UsageError: a file cannot be written.
    """
    if args.json:
        print_json(queue_document(results, summary))
    if args.excel:
        from neurosurgeon.reports.excel import save_tables

        save_tables(args.excel, queue_sheets(results, summary))
    if args.plot:
        from neurosurgeon.reports.plots import plot_queue

        plot_queue(args.plot, results)
