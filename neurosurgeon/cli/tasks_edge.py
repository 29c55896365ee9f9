"""The edge with a queue of tasks: each is split for the bandwidth of the moment, and many are in flight at once.

python tasks_edge_api.py -i 127.0.0.1 -p 9999 -d cpu
python tasks_edge_api.py --input-dir docs -t mobile_net alex_net --objective throughput --plot queue.png
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from neurosurgeon.cli.parser import (
    access_of_edge,
    add_deadline,
    add_device,
    add_link,
    add_model_files,
    add_no_correction,
    add_objective,
    add_on_cloud_loss,
    add_predictor_choice,
    add_weights,
    address_parser,
    forget_if_asked,
    non_negative_int,
    positive_float,
    positive_int,
)
from neurosurgeon.cli.process import EXIT_INTERRUPTED, run_main
from neurosurgeon.cli.relay import add_shaping, shaped
from neurosurgeon.edge.inputs import draw_tasks, read_task_file, tasks_of_directory
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.run import CloudAddress, LinkChoice, run_queue
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.engine.base import find_engine
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights import parse_weights
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Schedule
from neurosurgeon.reports.queue_report import QueueReport, print_summary
from neurosurgeon.reports.summary import QueueSummary, queue_document, queue_sheets, summarise
from neurosurgeon.reports.text import print_json
from neurosurgeon.utils.errors import NeurosurgeonError

if TYPE_CHECKING:
    from neurosurgeon.edge.records import TaskResult

log = logging.getLogger(__name__)

DEFAULT_TASKS = 40
DEFAULT_IN_FLIGHT = 8


def main(argv: Sequence[str] | None = None, prog: str = "tasks_edge_api.py") -> int:
    return run_main(queue_parser(prog), argv, _run)


def queue_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of this command line."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--tasks", type=positive_int, default=DEFAULT_TASKS, help=f"random tasks to draw (default: {DEFAULT_TASKS})"
    )
    source.add_argument("--task-file", type=Path, metavar="FILE", help="tasks, one a line: MODEL [IMAGE]")
    source.add_argument("--input-dir", type=Path, metavar="DIR", help="every image in it is a task")
    parser.add_argument("--seed", type=non_negative_int, help="of the random tasks (default: others every time)")
    parser.add_argument(
        "-t",
        "--type",
        nargs="+",
        default=list(ZOO),
        metavar="MODEL",
        help="models of random tasks, and in turn of --input-dir (default: the four classic ones)",
    )
    add_model_files(parser)
    add_weights(parser)
    add_link(parser)
    add_shaping(parser)
    add_deadline(parser)
    parser.add_argument(
        "--monitor-interval",
        type=positive_float,
        default=1.0,
        help="seconds between bandwidth measurements (default: 1)",
    )
    add_predictor_choice(parser, "forest", "linear", "measured")
    add_no_correction(parser)
    parser.add_argument(
        "--no-load-feedback", action="store_true", help="plan as if the cloud were always idle (default: off)"
    )
    parser.add_argument(
        "--in-flight",
        type=positive_int,
        default=DEFAULT_IN_FLIGHT,
        help=f"tasks begun and without an answer, at most; 1: one after the other (default: {DEFAULT_IN_FLIGHT})",
    )
    add_on_cloud_loss(parser)
    parser.add_argument(
        "--no-hedging",
        action="store_true",
        help="wait for the cloud, however long a task is stuck on its way, and finish here what was begun here "
        "(default: off; with --on-cloud-loss local, a task goes the other way as soon as that pays, and the first "
        "answer counts)",
    )
    add_objective(parser)
    parser.add_argument(
        "--schedule",
        choices=("fifo", "johnson"),
        default="fifo",
        help="order of the tasks: as they come, or Johnson's, for the shortest makespan (default: fifo)",
    )
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save a row for each task, and the summary")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bandwidth, cuts and stages over time")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout (default: lines)")
    return parser


def _run(args: argparse.Namespace) -> int:
    out = sys.stderr if args.json else sys.stdout
    catalogue = Catalogue(args.model_file)
    forget_if_asked(args)
    tasks, settings = tasks_of(args, catalogue), settings_of(args, catalogue)
    access = replace(access_of_edge(args), cloud_name=args.ip)
    interrupted = threading.Event()
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(shaped(args.ip, (args.port, args.monitor_port), args.shape, args.trace))

        def start() -> None:
            """Begin the trace of the emulated network, and finish tasks in flight before Ctrl-C ends the queue."""
            network.begin()
            stack.enter_context(patient_interrupts(interrupted))

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
    """Return the tasks that the command line describes.

    Raises: UsageError.
    """
    if args.task_file:
        return read_task_file(args.task_file, catalogue.canonical_name)
    models = [catalogue.canonical_name(name) for name in args.type]
    if args.input_dir:
        return tasks_of_directory(args.input_dir, models)
    return draw_tasks(args.tasks, args.seed, models)


def settings_of(args: argparse.Namespace, catalogue: Catalogue) -> QueueSettings:
    """Return the settings of the queue that the command line describes.

    Raises: UsageError: weights that are not there or do not fit.
    """
    if args.device == "cuda":
        find_engine()(catalogue, args.device)
    return QueueSettings(
        weights=parse_weights(catalogue, args.weights, args.pretrained),
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


@contextlib.contextmanager
def patient_interrupts(interrupted: threading.Event) -> Iterator[None]:
    """Let the first Ctrl-C set an event, so that the tasks in flight are finished; the second ends at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        log.warning("finishing the tasks in flight; Ctrl-C again to stop now")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def save(args: argparse.Namespace, results: Sequence[TaskResult], summary: QueueSummary) -> None:
    """Write what the command line asks for.

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
