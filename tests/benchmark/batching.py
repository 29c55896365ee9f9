"""Does batching pay? Whole networks and second halves in batches of 1 to 8, on the CPU, ms per task.

python -m tests.benchmark.batching
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neurosurgeon.engine.torch_engine import random_input, run_half
from neurosurgeon.models.zoo import ZOO, Network, load_network
from tests.benchmark.common import interleaved_medians, save

ROUNDS = 11
SIZES = (1, 2, 4, 8)


def runner(network: Network, point: int, crossing: Sequence[Tensor], size: int) -> Callable[[], None]:
    """Return the function that does what the engine does with a batch: join, run, part."""
    cloud = network.cut(point).cloud

    def run() -> None:
        inputs = [torch.cat([tensor] * size) for tensor in crossing] if size > 1 else crossing
        for output in run_half(cloud, inputs).tensors:
            output.chunk(size)

    return run


def measure_half(network: Network, point: int) -> dict[int, float]:
    """Return the median time (ms) per task for every size of batch."""
    crossing = run_half(network.cut(point).edge, [random_input()]).tensors
    contenders = {str(size): runner(network, point, crossing, size) for size in SIZES}
    medians = interleaved_medians(contenders, ROUNDS)
    return {size: medians[str(size)] / size for size in SIZES}


def main() -> None:
    results: dict[str, dict[int, float]] = {}
    print("batching: ms per task, and how many times as many tasks a second as one by one")
    print(f"{'model, point, threads':<28}" + "".join(f"{f'batch {size}':>18}" for size in SIZES))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ZOO:
            network = load_network(name)
            for point in (0, len(network.graph.layers) // 2):
                label = f"{name} at {point}, {threads}"
                results[label] = medians = measure_half(network, point)
                cells = [f"{value:.3f} ({medians[1] / value:.2f})" for value in medians.values()]
                print(f"{label:<28}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    save("batching", {"ms_per_task": results})


if __name__ == "__main__":
    main()
