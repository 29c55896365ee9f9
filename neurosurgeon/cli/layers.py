"""The layer study: measured latency, output shape, transfer size and accumulated time of every layer.

python layers_api.py -t alex_net --threads 1 --excel alex_net.xlsx
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from neurosurgeon.cli.parser import add_device, add_model, base_parser
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.engine.torch_engine import check_device, load_image, random_input, use_threads
from neurosurgeon.models.sources import chosen_model
from neurosurgeon.models.zoo import input_size, load_network
from neurosurgeon.predictor.predictor_utils import config_path, load_predictor
from neurosurgeon.predictor.profile import show_features
from neurosurgeon.reports import text
from neurosurgeon.reports.excel import save_tables


def main(argv: Sequence[str] | None = None, prog: str = "layers_api.py") -> int:
    parser = base_parser(prog, __doc__)
    add_model(parser, "study")
    add_device(parser)
    parser.add_argument("--input", type=Path, metavar="IMAGE", help="image to run on (default: a fixed image of noise)")
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save the table")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a table)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    check_device(args.device)
    use_threads(args.threads or load_predictor(config_path("edge")).threads)
    name = chosen_model(args.type, args.model_file, args.input_size)
    network = load_network(name, WeightsSource(), args.device)
    tensor = load_image(args.input, input_size(name)) if args.input else random_input(network.graph.input.shape)
    features = show_features(network, tensor, lambda layers: tqdm(layers, unit="layer", disable=None))
    rows = [dataclasses.asdict(feature) for feature in features]
    if args.json:
        text.print_json({"model": network.name, "layers": rows})
    else:
        text.print_features(features)
    if args.excel:
        save_tables(args.excel, {network.name: rows})
    return 0
