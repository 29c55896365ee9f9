"""The four networks on a real photo, each split between this process's edges and one cloud process on loopback.

    make demo

Every edge is a process of `edge_api.py --json`, as a user would run it; the table shows the values of its JSON objects.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurosurgeon.cli.parser import base_parser, positive_int
from neurosurgeon.cli.process import ROOT, ServiceProcess, run_main
from neurosurgeon.models.names import ZOO
from neurosurgeon.utils.errors import NeurosurgeonError

EDGE_TIMEOUT_S = 300.0


def main(argv: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    parser.add_argument(
        "--input", type=Path, metavar="IMAGE", help="photo to classify (default: one of scikit-learn's)"
    )
    parser.add_number("--repeat", type=positive_int, default=20, meaning="inferences of each network")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    photo = args.input or sample_photo()
    print(f"photo: {photo.name}; one cloud process on loopback; median of {args.repeat} inferences each\n")
    with ServiceProcess(["-m", "neurosurgeon", "cloud", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        results = [run_edge(model, photo, args.repeat, cloud.ports) for model in ZOO]
    for result in results:
        print_answer(result)
    print_latencies(results)
    return 0


def sample_photo() -> Path:
    """Return a real photo, which scikit-learn contains."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def run_edge(model: str, photo: Path, repeat: int, ports: Sequence[int]) -> dict[str, Any]:
    """Return the JSON object of one edge.

    Raises: NeurosurgeonError: the edge failed.
    """
    command = [sys.executable, "-m", "neurosurgeon", "edge", "-t", model, "--input", str(photo.resolve())]
    command += ["-p", str(ports[0]), "--monitor-port", str(ports[1]), "--repeat", str(repeat), "--verify", "--json"]
    edge = subprocess.run(  # noqa: S603  # our own script
        command, cwd=ROOT, capture_output=True, text=True, timeout=EDGE_TIMEOUT_S, check=False
    )
    if edge.returncode:
        raise NeurosurgeonError(f"{model}: {edge.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(edge.stdout))


def print_answer(result: dict[str, Any]) -> None:
    """Print the best classes of one network for the photo."""
    guesses = ", ".join(
        f"{guess['label'] or 'class ' + str(guess['index'])} {guess['probability']:.1%}"
        for guess in result["output"]["top5"]
    )
    print(f"{result['model']}: {guesses}")
    print(f"  largest difference to the unsplit network: {result['max_abs_diff']:g}")


def print_latencies(results: Sequence[dict[str, Any]]) -> None:
    """Print predicted beside measured latencies of all networks, in ms."""
    print("\n(fixed-seed weights: the classes mean nothing; --weights and --pretrained bring real ones)\n")
    print(f"{'model':<12}{'cut':>8}{'':>12}{'edge':>10}{'transfer':>10}{'cloud':>10}{'total':>10}  ms")
    for result in results:
        cut = f"{result['partition_point']}/{result['layers']}"
        for label in ("predicted", "measured"):
            times = "".join(f"{value:>10.3f}" for value in result[label].values())
            print(f"{result['model']:<12}{cut:>8}{label:>12}{times}")
