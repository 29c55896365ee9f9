"""The layer study: measured latency, output shape, transfer size and accumulated time of every layer.

python layers_api.py -t alex_net --threads 1 --excel alex_net.xlsx
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which need packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from neurosurgeon.models.sources import chosen_model
from neurosurgeon.models.zoo import WeightsSource, input_size, load_network
from neurosurgeon.predictor.predictor_utils import config_path, load_predictor
from neurosurgeon.utils import report
from neurosurgeon.utils.cli import add_device, add_model, base_parser, run_main
from neurosurgeon.utils.excel_utils import save_tables
from neurosurgeon.utils.inference_utils import check_device, load_image, random_input, show_features, use_threads


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("layers_api.py", __doc__)
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
        report.print_json({"model": network.name, "layers": rows})
    else:
        report.print_features(features)
    if args.excel:
        save_tables(args.excel, {network.name: rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
