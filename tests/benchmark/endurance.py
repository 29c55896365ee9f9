"""Many edges in a row against one cloud, a process each, models and points mixed; counts hangs and errors.

python -m tests.benchmark.endurance [RUNS]
"""

from __future__ import annotations

import random
import subprocess
import sys
import time

from tqdm import tqdm

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.models.names import ZOO
from tests.benchmark.common import save
from tests.networks import model_graph

DEFAULT_RUNS = 200
HANG_S = 60.0


def main() -> None:
    runs = int(sys.argv[1]) if sys.argv[1:] else DEFAULT_RUNS
    draw = random.Random(0)
    hangs, errors = 0, []
    start_s = time.monotonic()
    with ServiceProcess(["cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        for _ in tqdm(range(runs), unit="run", disable=None):
            model = draw.choice(list(ZOO))
            point = draw.randrange(len(model_graph(model).layers) + 1)
            command = [sys.executable, "edge_api.py", "-t", model, "--point", str(point), "-p", str(cloud.ports[0])]
            command += ["--monitor-port", str(cloud.ports[1])]
            try:
                edge = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
            except subprocess.TimeoutExpired:
                hangs += 1
                continue
            if edge.returncode:
                errors.append(edge.stderr.strip())
    duration_s = time.monotonic() - start_s
    print(f"endurance: {runs} edge runs in {duration_s:.0f} s, {hangs} hangs, {len(errors)} errors {errors[:3]}")
    save("endurance", {"runs": runs, "hangs": hangs, "errors": errors, "duration_s": duration_s})


if __name__ == "__main__":
    main()
