"""The cloud for streams of tasks: one process waits for tasks from the edges, one collects bandwidth data.

    python tasks_cloud_api.py -i 127.0.0.1 -p 9999 -d cpu

It serves what cloud_api.py serves, single tasks as well as many in flight on one connection.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which need packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

import sys
from collections.abc import Sequence

from neurosurgeon.cloud_service import run_cloud


def main(argv: Sequence[str] | None = None) -> int:
    return run_cloud("tasks_cloud_api.py", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
