"""Run every benchmark: `python -m tests.benchmark`. Figures go to results/*.json."""

from __future__ import annotations

from tests.benchmark import cold_start, decision, execution, overhead, prediction, transport


def main() -> None:
    for benchmark in (decision, prediction, execution, transport, overhead, cold_start):
        benchmark.main()
        print()


if __name__ == "__main__":
    main()
