"""The layer study: the measured latency, output shape, transfer size and accumulated time of every layer.

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
from neurosurgeon.edge.inputs import inputs_of
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.models.names import Catalogue
from neurosurgeon.predictor.places import config_path
from neurosurgeon.predictor.profile import show_features
from neurosurgeon.predictor.store import load_predictor
from neurosurgeon.reports import text
from neurosurgeon.reports.excel import save_tables


def main(argv: Sequence[str] | None = None, prog: str = "layers_api.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    add_model(parser, "study")
    add_device(parser, default_threads="those that the edge's data was measured with")
    parser.add_argument("--input", type=Path, metavar="IMAGE", help="input image (default: a fixed image of noise)")
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save the table")
    parser.add_switch("--json", "print one JSON object, rather than a table")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    catalogue = Catalogue(args.model_file)
    engine = TorchEngine(catalogue, args.device)
    engine.use_threads(args.threads or load_predictor(config_path("edge")).threads)
    name = catalogue.choose(args.type, args.input_size, args.classes)
    network = engine.open(name)
    arrays = inputs_of(engine, name).read(args.input) if args.input else engine.example(name)
    features = show_features(network, arrays, lambda layers: tqdm(layers, unit="layer", disable=None))
    rows = [dataclasses.asdict(feature) for feature in features]
    if args.json:
        text.print_json({"model": name, "layers": rows})
    else:
        text.print_features(features)
    if args.excel:
        save_tables(args.excel, {name: rows})
    return 0
