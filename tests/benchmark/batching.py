"""Is batching worth it? Whole networks and cloud partitions in batches of 1 to 8, on the CPU, ms per task.

python -m tests.benchmark.batching
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from neurosurgeon.graph.spec import Array
from neurosurgeon.models.names import ZOO
from tests.benchmark.common import interleaved_medians, save
from tests.networks import Network, cut, load_network, random_input, run

ROUNDS = 11
SIZES = (1, 2, 4, 8)


def runner(network: Network, point: int, boundary: Sequence[Array], size: int) -> Callable[[], None]:
    """Return the function that runs a batch as the executor does: join, run, split."""
    cloud = cut(network, point).cloud

    def run_one_batch() -> None:
        inputs = [np.concatenate([array] * size) for array in boundary] if size > 1 else boundary
        result = cloud.run(inputs)
        assert result is not None
        for output in result.arrays:
            np.split(output, size)

    return run_one_batch


def measure_partition(network: Network, point: int) -> dict[int, float]:
    """Return the median time (ms) per task for every size of batch."""
    boundary = run(cut(network, point).edge, [random_input()]).arrays
    contenders = {str(size): runner(network, point, boundary, size) for size in SIZES}
    medians = interleaved_medians(contenders, ROUNDS)
    return {size: medians[str(size)] / size for size in SIZES}


def main() -> None:
    results: dict[str, dict[int, float]] = {}
    print("batching: ms per task, and the throughput relative to one by one")
    print(f"{'model, point, threads':<28}" + "".join(f"{f'batch {size}':>18}" for size in SIZES))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ZOO:
            network = load_network(name)
            for point in (0, len(network.graph.layers) // 2):
                label = f"{name} at {point}, {threads}"
                results[label] = medians = measure_partition(network, point)
                cells = [f"{value:.3f} ({medians[1] / value:.2f})" for value in medians.values()]
                print(f"{label:<28}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    save("batching", {"ms_per_task": results})


if __name__ == "__main__":
    main()
