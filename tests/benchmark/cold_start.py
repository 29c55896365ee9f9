"""From typing `edge_api.py` to its output, against `python -c 'import torch'`, interleaved, with a running cloud.

Also over 3G, with and without a measurement of the link. The relay of 3G (`--shape`) takes some tenths of a second to
start.

python -m tests.benchmark.cold_start
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

from neurosurgeon.cli.process import ROOT, ServiceProcess
from tests.benchmark.common import interleaved_medians, save

ROUNDS = 7
MODELS = ("le_net", "mobile_net")
LINK_3G = ("--shape", "1.1,60")


def command(arguments: Sequence[str]) -> Callable[[], object]:
    """Return a function that runs a Python command to its end."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

    return run


def main() -> None:
    with ServiceProcess(["cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
        contenders = {"import torch": command(["-c", "import torch"])}
        for model in MODELS:
            contenders[model] = command(["edge_api.py", "-t", model, *address])
            contenders[f"{model}, point 3"] = command(["edge_api.py", "-t", model, "--point", "3", *address])
            for how in ("always", "auto"):
                flags = ["--measure", how, *LINK_3G, *address]
                contenders[f"{model}, 3G, {how}"] = command(["edge_api.py", "-t", model, *flags])
        medians = interleaved_medians(contenders, ROUNDS, warmup=1)
    print(f"cold start\n{'':<24}{'median, s':>10}{'over import torch, s':>22}")
    for name, median_ms in medians.items():
        print(f"{name:<24}{median_ms / 1000:>10.2f}{(median_ms - medians['import torch']) / 1000:>22.2f}")
    save("cold_start", {"medians_ms": medians})


if __name__ == "__main__":
    main()
