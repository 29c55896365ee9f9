"""Are folded batch norms and channels-last faster? Whole networks, batch 1, against plain eager.

python -m tests.benchmark.execution
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.models.build import fold_batch_norms
from neurosurgeon.models.names import ZOO
from neurosurgeon.models.weights import seeded_state
from tests.benchmark.common import interleaved_medians, save
from tests.networks import model_graph, random_input, skeleton

ROUNDS = 15


def variants(name: str) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """Return the four ways to execute a model."""
    plain = skeleton(name)
    plain.load_state_dict(seeded_state(name, plain), assign=True)
    folded = fold_batch_norms(copy.deepcopy(plain), model_graph(name))
    formats = {"": torch.contiguous_format, " + channels-last": torch.channels_last}
    return {
        label + suffix: (copy.deepcopy(model).to(memory_format=memory_format), memory_format)
        for label, model in (("plain", plain), ("folded", folded))
        for suffix, memory_format in formats.items()
    }


def measure_model(name: str) -> dict[str, float]:
    """Return the median time (ms) of every variant."""

    def runner(model: nn.Module, memory_format: torch.memory_format) -> Callable[[], None]:
        value = as_tensor(random_input()).contiguous(memory_format=memory_format)

        def run() -> None:
            with torch.inference_mode():
                model(value)

        return run

    contenders = {label: runner(*variant) for label, variant in variants(name).items()}
    return interleaved_medians(contenders, ROUNDS, calls=3)


def main() -> None:
    results: dict[str, dict[str, float]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name in ZOO:
            medians = measure_model(name)
            results[f"{name}, {threads} threads"] = medians
            if len(results) == 1:
                print("execution: median ms of a whole network\n" + f"{'':<24}" + "".join(f"{v:>24}" for v in medians))
            print(f"{name + f', {threads} threads':<24}" + "".join(f"{v:>24.3f}" for v in medians.values()), flush=True)
    save("execution", {"medians_ms": results})


if __name__ == "__main__":
    main()
