"""The cloud: serve split inference to any number of edges, and their bandwidth measurements.

python cloud_api.py -i 127.0.0.1 -p 9999 -d cpu
python tasks_cloud_api.py -i 127.0.0.1 -p 9999 -d cpu

Both serve the same: single tasks, and queues with many tasks in flight on one connection.
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
    Parser,
    access_of_cloud,
    add_device,
    add_insecure,
    add_model_files,
    add_predictor_choice,
    add_weights,
    address_parser,
    forget_if_asked,
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
from neurosurgeon.models.weights import parse_weights
from neurosurgeon.net.access import Access
from neurosurgeon.net.frames import Limits
from neurosurgeon.net.limits import DEFAULT_CONNECTIONS, INTRODUCTION_S, ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.memory import MemoryLimit
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.sockets import bind, start_listening
from neurosurgeon.utils.load import CloudLoad
from neurosurgeon.utils.machine import SPARE_CORE, free_cores
from neurosurgeon.utils.metrics import Metrics, PrometheusMetrics
from neurosurgeon.utils.units import mb_to_bytes

if TYPE_CHECKING:  # a busy port is reported before torch is imported
    from neurosurgeon.cloud.conversation import Service
    from neurosurgeon.cloud.events import Observer
    from neurosurgeon.cloud.executor import Executor

log = logging.getLogger(__name__)

CHECK_S = 0.5  # how often the bandwidth service is looked after, and told the load


def main(argv: Sequence[str] | None = None, prog: str = "cloud_api.py") -> int:
    return run_main(cloud_parser(prog), argv, _run)


def cloud_parser(prog: str) -> Parser:
    """Return the parser of a cloud's command line."""
    parser = address_parser(prog, __doc__, monitor_port=True)
    add_device(parser)
    add_model_files(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="serve these models alone, at their usual size, or as MODEL@PIXELS (default: all that an edge may name)",
    )
    add_weights(parser)
    add_predictor_choice(parser, "forest", "linear", "measured", sides=("cloud",))
    _add_engine(parser)
    _add_limits(parser)
    parser.add_argument(
        "--metrics-port",
        type=port_number,
        help="serve counters for Prometheus on this port of loopback; 0 takes a free one (default: off)",
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=1,
        help="tasks computed at the same time, sharing the CPU threads (default: 1)",
    )
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        help="waiting tasks of one model and point that run as one batch (default: 1 on cpu, 8 on cuda)",
    )
    parser.add_argument(
        "--batch-wait-ms",
        type=non_negative_float,
        default=0.0,
        help="time that a task waits for others to run with, in ms (default: 0, only for those that already wait)",
    )
    parser.add_argument("--max-models", type=positive_int, default=16, help="models kept in memory (default: 16)")
    parser.add_argument(
        "--max-queue",
        type=positive_int,
        default=64,
        help="tasks that may wait, of all edges; beyond, an edge hears that the cloud is busy (default: 64)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add_insecure(parser)
    parser.add_argument(
        "--max-frame-mb", type=positive_int, default=256, help="tensors of one message, MB at most (default: 256)"
    )
    parser.add_argument(
        "--max-connection-mb",
        type=positive_int,
        default=512,
        help="messages of one edge in memory, MB at most (default: 512)",
    )
    parser.add_argument(
        "--max-memory-mb",
        type=positive_int,
        default=1024,
        help="messages of all edges in memory, MB at most (default: 1024)",
    )
    parser.add_argument(
        "--max-connections",
        type=positive_int,
        default=DEFAULT_CONNECTIONS.max_connections,
        help=f"edges at a time (default: {DEFAULT_CONNECTIONS.max_connections})",
    )
    parser.add_argument(
        "--max-strangers",
        type=positive_int,
        default=DEFAULT_CONNECTIONS.max_strangers,
        help="connections that have not said hello; the one that waits longest goes, and all go after "
        f"{INTRODUCTION_S:g} s (default: {DEFAULT_CONNECTIONS.max_strangers})",
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="compute tensors with NaN or infinite values, too (default: they are refused)",
    )


def _run(args: argparse.Namespace) -> int:
    access = access_of_cloud(args)
    with bind(args.ip, args.port, access) as listener:  # first: a busy port is reported before torch is imported
        return serve(args, listener, access)


def make_limiter(args: argparse.Namespace, access: Access) -> ConnectionLimiter:
    """Return who may come in, and how many, and how much memory their messages may take."""
    memory = MemoryLimit(mb_to_bytes(args.max_memory_mb), mb_to_bytes(args.max_connection_mb))
    return ConnectionLimiter(access, ConnectionLimits(args.max_connections, args.max_strangers), memory)


def access_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that ask of the bandwidth service what is asked of this one; secrets stay in their files."""
    flags = ["--insecure"] if args.insecure else []
    for flag in ("key_file", "tls_cert", "tls_key", "tls_ca"):
        path = getattr(args, flag)
        if path is not None:
            flags += [f"--{flag.replace('_', '-')}", str(path.absolute())]
    return flags


def make_service(args: argparse.Namespace, catalogue: Catalogue, observe: Observer) -> Service:
    """Return the service that a command line asks for; its workers run.

    Raises: UsageError: the device, a model, or weights, are not there or do not fit.
    """
    from neurosurgeon.cloud.conversation import Rules, Service
    from neurosurgeon.cloud.executor import Executor, ExecutorLimits
    from neurosurgeon.cloud.latencies import CloudLatencies
    from neurosurgeon.cloud.store import NetworkStore
    from neurosurgeon.engine.base import find_engine
    from neurosurgeon.predictor.store import dataset_threads

    served = tuple(dict.fromkeys(map(catalogue.canonical_name, args.models))) if args.models else None
    weights = parse_weights(catalogue, args.weights, args.pretrained)
    engine = find_engine()(catalogue, args.device)
    for name in served or ZOO:
        engine.graph(name)  # traced now: later, it stops all workers
    threads = args.threads or free_threads(dataset_threads("cloud", args.device))
    limits = ExecutorLimits(threads, args.workers, args.max_batch, args.batch_wait_ms, args.max_queue)
    executor = Executor(engine, limits, metrics_of(args))
    store = NetworkStore(executor, weights, served, args.max_models)
    rules = Rules(Limits(max_body_bytes=mb_to_bytes(args.max_frame_mb)), args.allow_nonfinite)
    latencies = CloudLatencies(store, executor, args.predictor, args.cloud_config)
    return Service(executor, store, observe, latencies, rules)


def free_threads(threads: int) -> int:
    """Return so many CPU threads, or one where other programs leave fewer cores.

    Threads that wait for each other take longer than one alone: MobileNetV2 beside two busy loops on two cores 36 ms
    with two threads, 12 ms with one (`tests.benchmark.busy`).
    """
    free = free_cores()
    if threads == 1 or free > threads - SPARE_CORE:
        return threads
    log.warning(
        "other programs leave %.1f cores: this cloud computes with one thread; cloud_api.py --threads %d insists",
        free,
        threads,
    )
    return 1


def metrics_of(args: argparse.Namespace) -> Metrics | None:
    """Return the counters that a command line asks for, and serve them.

    Raises: UsageError, PortBusyError.
    """
    if args.metrics_port is None:
        return None
    metrics = PrometheusMetrics(args.metrics_port)
    log.info("metrics at http://127.0.0.1:%d/metrics", metrics.port)
    return metrics


def serve(args: argparse.Namespace, listener: socket.socket, access: Access) -> int:
    """Serve edges until SIGINT or SIGTERM; return the exit code."""
    from neurosurgeon.reports.text import cloud_lines

    forget_if_asked(args)
    service = make_service(args, Catalogue(args.model_file), cloud_lines)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    if args.until_stdin_closes:
        end_with_parent(stop)
    with running(args, service, listener, access) as bandwidth_service:
        log.info(listening_line("cloud", format_address(listener.getsockname())))
        log.info(listening_line("bandwidth service", format_address((args.ip, bandwidth_service.ports[0]))))
        _send_load(bandwidth_service, service.executor, stop)
    return EXIT_INTERRUPTED if stop.interrupted else 0


@contextmanager
def running(
    args: argparse.Namespace, service: Service, listener: socket.socket, access: Access
) -> Iterator[ServiceProcess]:
    """Serve edges on threads of this process while the block runs; yield the bandwidth service, a child process."""
    from neurosurgeon.cloud.server import CloudServer

    server = CloudServer(listener, service, make_limiter(args, access))
    monitor = ["-m", "neurosurgeon", "monitor-server", "-i", args.ip, "--monitor-port", str(args.monitor_port)]
    monitor += [*access_flags(args), "--log-level", args.log_level] + ["--log-json"] * args.log_json
    with ServiceProcess(monitor) as bandwidth_service:
        start_listening(listener)
        threading.Thread(target=server.serve, daemon=True).start()
        yield bandwidth_service
        server.stop()


def _send_load(bandwidth_service: ServiceProcess, executor: Executor, stop: StopEvent) -> None:
    """Until ``stop``, send the load to the bandwidth service when it has changed; its pongs carry it to the edges."""
    told = CloudLoad().line()
    while not stop.wait(CHECK_S):
        if not bandwidth_service.is_running():
            log.error("the bandwidth service ended; edges go on with their last value, or --bandwidth")
            stop.wait()
            return
        load = executor.load
        line = CloudLoad(load.queue_ms, load.service_ms).line()
        if line != told:
            bandwidth_service.tell(line)
            told = line
