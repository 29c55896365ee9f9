"""The cloud: serve split inference to any number of edges, and their bandwidth measurements.

python cloud_api.py -i 127.0.0.1 -p 9999 -d cpu
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cloud_service import run_cloud


def main(argv: Sequence[str] | None = None) -> int:
    return run_cloud("cloud_api.py", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
