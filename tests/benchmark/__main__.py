"""Run every benchmark: `python -m tests.benchmark`. Figures go to results/*.json."""

from __future__ import annotations

from tests.benchmark import batching, cold_start, decision, execution, overhead, prediction, transport


def main() -> None:
    for benchmark in (decision, prediction, execution, batching, transport, overhead, cold_start):
        benchmark.main()
        print()


if __name__ == "__main__":
    main()
