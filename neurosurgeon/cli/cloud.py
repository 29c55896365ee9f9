"""The cloud: serve split inference to any number of edges, and their bandwidth measurements.

python cloud_api.py -i 127.0.0.1 -p 9999 -d cpu
python tasks_cloud_api.py -i 127.0.0.1 -p 9999 -d cpu

Both are the same server, for single tasks and for queues with many tasks in flight on one connection.
"""

from __future__ import annotations

import argparse
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neurosurgeon.cli.parser import (
    SCALED_DATA,
    Parser,
    access_of_cloud,
    add_device,
    add_model_files,
    add_predictor_choice,
    add_service,
    add_weights,
    address_parser,
    free_threads,
    non_negative_float,
    port_number,
    positive_int,
    worker_count,
)
from neurosurgeon.cli.process import (
    EXIT_INTERRUPTED,
    ServiceProcess,
    StopEvent,
    end_with_parent,
    listening_line,
    run_main,
    stop_event,
)
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.models.weights_sources import parse_weights
from neurosurgeon.net.access import Access
from neurosurgeon.net.frames import Limits
from neurosurgeon.net.limits import AUTHENTICATION_TIMEOUT_S, DEFAULT_CONNECTIONS, ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.memory import MemoryLimit
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.sockets import bind, start_listening
from neurosurgeon.utils.load import Load
from neurosurgeon.utils.machine import free_cores
from neurosurgeon.utils.metrics import PrometheusMetrics
from neurosurgeon.utils.units import mb_to_bytes

if TYPE_CHECKING:  # a busy port is reported before torch is imported
    from neurosurgeon.cloud.conversation import Service
    from neurosurgeon.cloud.events import Observer
    from neurosurgeon.cloud.executor import Executor

log = logging.getLogger(__name__)

CHECK_S = 0.5  # between two looks at the bandwidth service, which gets the load each time


def main(argv: Sequence[str] | None = None, prog: str = "cloud_api.py") -> int:
    """Run this command; return its exit code."""
    return run_main(cloud_parser(prog), argv, _run)


def cloud_parser(prog: str) -> Parser:
    """Return the parser of a cloud's command line."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser, default_threads="2, as the data; 1 if other programs leave fewer cores")
    add_model_files(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="serve only these models, at their usual input size or as MODEL@PIXELS (default: any that an edge names)",
    )
    add_weights(parser)
    add_predictor_choice(parser, "forest", "linear", "measured", sides={"cloud": SCALED_DATA})
    _add_numbers(parser)
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        help="waiting tasks of one model and cut that run as one batch, at most (default: 1 on cpu, 8 on cuda)",
    )
    add_service(parser)
    parser.add_switch("--allow-nonfinite", "compute tensors with NaN or infinite values, rather than refuse them")
    parser.add_argument(
        "--metrics-port",
        type=port_number,
        help="loopback port of counters for Prometheus; 0 takes a free port (default: off)",
    )
    return parser


def _add_numbers(parser: Parser) -> None:
    edges, strangers = DEFAULT_CONNECTIONS.max_connections, DEFAULT_CONNECTIONS.max_unauthenticated
    for flag, type_, default, meaning in (
        ("--workers", worker_count, 1, "tasks computed at the same time, which share --threads"),
        ("--batch-wait-ms", non_negative_float, 0.0, "time that a task waits for its batch to fill, ms; 0: not at all"),
        ("--max-models", positive_int, 16, "models kept in memory, at most"),
        ("--max-queue", positive_int, 64, 'waiting tasks of all edges, at most; any more are answered "busy"'),
        ("--max-frame-mb", positive_int, 256, "tensors of one message, MB at most"),
        ("--max-connection-mb", positive_int, 512, "messages of one edge in memory, MB at most"),
        ("--max-memory-mb", positive_int, 1024, "messages of all edges in memory, MB at most"),
        ("--max-connections", positive_int, edges, "edges connected at the same time, at most"),
        (
            "--max-strangers",
            positive_int,
            strangers,
            "unauthenticated connections at the same time, at most; beyond, the oldest of the busiest address is "
            f"closed; each is closed after {AUTHENTICATION_TIMEOUT_S:g} s",
        ),
    ):
        parser.add_number(flag, type=type_, default=default, meaning=meaning)


def _run(args: argparse.Namespace) -> int:
    access = access_of_cloud(args)
    with bind(args.ip, args.port, access) as listener:  # a busy port is reported before torch is imported
        return serve(args, listener, access)


def make_service(args: argparse.Namespace, catalogue: Catalogue, observe: Observer) -> Service:
    """Return the service of a command line; its workers run.

    Raises: UsageError: the device, a model, or weights are missing or do not fit. PortBusyError: of the metrics.
    """
    from neurosurgeon.cloud.conversation import Rules, Service
    from neurosurgeon.cloud.executor import Executor, ExecutorLimits
    from neurosurgeon.cloud.latencies import CloudLatencies
    from neurosurgeon.cloud.store import NetworkStore
    from neurosurgeon.engine.base import find_engine

    weights = parse_weights(catalogue, args.weights, args.pretrained)
    names = [weights.named(catalogue.canonical_name(name)) for name in args.models or ()]
    served = tuple(dict.fromkeys(names)) or None
    engine = find_engine()(catalogue, args.device)
    for name in served or ZOO:
        engine.graph(name)  # traced now: later, it stops all workers
    threads = args.threads or default_threads(args.device)
    metrics = None
    if args.metrics_port is not None:
        metrics = PrometheusMetrics(args.metrics_port)
        log.info("metrics at http://127.0.0.1:%d/metrics", metrics.port)
    limits = ExecutorLimits(threads, args.workers, args.max_batch, args.batch_wait_ms, args.max_queue)
    executor = Executor(engine, limits, metrics)
    store = NetworkStore(executor, weights, served, args.max_models)
    rules = Rules(Limits(max_body_bytes=mb_to_bytes(args.max_frame_mb)), args.allow_nonfinite)
    latencies = CloudLatencies(store, executor, args.predictor, args.cloud_config)
    return Service(executor, store, observe, latencies, rules)


def default_threads(device: str) -> int:
    """Return the number of CPU threads without --threads: that of the data, or 1 with a warning (`free_threads`)."""
    from neurosurgeon.predictor.store import dataset_threads

    measured = dataset_threads("cloud", device)
    threads = free_threads(measured)
    if threads < measured:
        log.warning(
            "other programs leave %.1f cores: this cloud computes with one thread; cloud_api.py --threads %d insists",
            free_cores(),
            measured,
        )
    return threads


def serve(args: argparse.Namespace, listener: socket.socket, access: Access) -> int:
    """Serve edges until SIGINT or SIGTERM; return the exit code."""
    from neurosurgeon.reports.text import cloud_lines

    service = make_service(args, Catalogue(args.model_file), cloud_lines)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    if args.until_stdin_closes:
        end_with_parent(stop)
    with running(args, service, listener, access) as bandwidth_service:
        log.info(listening_line("cloud", format_address(listener.getsockname())))
        log.info(listening_line("bandwidth service", format_address((args.ip, bandwidth_service.ports[0]))))
        _report_load(bandwidth_service, service.executor, stop)
    return EXIT_INTERRUPTED if stop.interrupted else 0


@contextmanager
def running(
    args: argparse.Namespace, service: Service, listener: socket.socket, access: Access
) -> Iterator[ServiceProcess]:
    """Serve edges on threads of this process while the block runs; yield the bandwidth service, a child process."""
    from neurosurgeon.cloud.server import CloudServer

    memory = MemoryLimit(mb_to_bytes(args.max_memory_mb), mb_to_bytes(args.max_connection_mb))
    limiter = ConnectionLimiter(access, ConnectionLimits(args.max_connections, args.max_strangers), memory)
    server = CloudServer(listener, service, limiter)
    with ServiceProcess(_monitor_command(args)) as bandwidth_service:
        start_listening(listener)
        threading.Thread(target=server.serve, daemon=True).start()
        yield bandwidth_service
        server.stop()


def _monitor_command(args: argparse.Namespace) -> list[str]:
    """Return the command of the bandwidth service, with the same authentication; secrets stay in their files."""
    command = ["-m", "neurosurgeon", "monitor-server", "-i", args.ip, "--monitor-port", str(args.monitor_port)]
    for flag in ("key_file", "tls_cert", "tls_key", "tls_ca"):
        path = getattr(args, flag)
        if path is not None:
            command += [f"--{flag.replace('_', '-')}", str(path.absolute())]
    return [*command, *["--insecure"] * args.insecure, "--log-level", args.log_level, *["--log-json"] * args.log_json]


def _report_load(bandwidth_service: ServiceProcess, executor: Executor, stop: StopEvent) -> None:
    """Send each new load to the bandwidth service, which adds it to its pongs. Blocks until ``stop``."""
    sent = Load().line()
    while not stop.wait(CHECK_S):
        if not bandwidth_service.is_running():
            log.error("the bandwidth service ended; edges continue with their last rate, or with --bandwidth")
            stop.wait()
            return
        line = executor.load.line()
        if line != sent:
            bandwidth_service.send_line(line)
            sent = line
