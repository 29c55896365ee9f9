"""The cloud: serve split inference to any number of edges, and their bandwidth measurements.

python cloud_api.py -i 127.0.0.1 -p 9999 -d cpu
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.sources import parse_weights
from models.zoo import canonical_name, model_graph
from net.messages import Latencies
from net.net_utils import format_address
from net.transport import bind, start_listening
from utils.cli import (
    EXIT_INTERRUPTED,
    ServiceProcess,
    add_device,
    add_predictor_choice,
    address_parser,
    end_with_parent,
    listening_line,
    run_main,
    stop_event,
)

if TYPE_CHECKING:  # a busy port is reported before torch is imported
    from utils.inference_utils import CloudEngine

log = logging.getLogger(__name__)

CHECK_S = 1.0  # how often the bandwidth service is looked after


def main(argv: Sequence[str] | None = None) -> int:
    parser = address_parser("cloud_api.py", __doc__, monitor_port=True)
    add_device(parser)
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="weights of a model: checkpoint or safetensors; may be repeated (default: fixed-seed weights)",
    )
    parser.add_argument("--pretrained", action="store_true", help="use torchvision's pretrained weights (default: off)")
    add_predictor_choice(parser, "forest", "linear", "measured", sides=("cloud",))
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    with bind(args.ip, args.port) as listener:  # first: a busy port is reported before torch is imported
        return serve(args, listener)


def latency_source(engine: CloudEngine, name: str, path: Path | None) -> Callable[[str], Latencies]:
    """Return the function that tells edges what a model's layers take here, predicted or measured."""
    from predictor.predictor_utils import find_predictor
    from predictor.profile import measured_latencies
    from utils.inference_utils import as_network_input, random_input

    def latencies(model: str) -> Latencies:
        if name == "measured":
            network = engine.network(model)
            tensor = as_network_input(random_input(), engine.device)
            known = engine.submit_job(lambda: measured_latencies(network, tensor))()
        else:
            known = find_predictor("cloud", engine.device, name, path).predict(model_graph(canonical_name(model)))
        columns = (list(known.latency_ms), list(known.low_ms), list(known.high_ms))
        return Latencies(model, known.source, *columns, list(known.extrapolated))

    return latencies


def serve(args: argparse.Namespace, listener: socket.socket) -> int:
    """Serve edges until SIGINT or SIGTERM; return the exit code."""
    from net.session import CloudServer
    from predictor.predictor_utils import dataset_threads
    from utils.inference_utils import CloudEngine
    from utils.report import cloud_lines

    weights = parse_weights(args.weights, args.pretrained)
    threads = args.threads or dataset_threads("cloud", args.device)
    engine = CloudEngine(args.device, threads, weights)
    server = CloudServer(listener, engine, cloud_lines, latency_source(engine, args.predictor, args.cloud_config))
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    if args.until_stdin_closes:
        end_with_parent(stop)
    monitor = ["-m", "net.monitor_server", "-i", args.ip, "--monitor-port", str(args.monitor_port)]
    with ServiceProcess(monitor) as bandwidth_service:
        start_listening(listener)
        threading.Thread(target=server.serve, daemon=True).start()
        log.info(listening_line("cloud", format_address(listener.getsockname())))
        log.info(listening_line("bandwidth service", format_address((args.ip, bandwidth_service.ports[0]))))
        while not stop.wait(CHECK_S):
            if not bandwidth_service.is_running():
                log.error("the bandwidth service ended; edges go on with their last value, or --bandwidth")
                stop.wait()
        server.stop()
    return EXIT_INTERRUPTED if stop.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
