"""The cloud: serve split inference to any number of edges, and their bandwidth measurements.

python cloud_api.py -i 127.0.0.1 -p 9999 -d cpu
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which need packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

import sys
from collections.abc import Sequence

from neurosurgeon.cloud_service import run_cloud


def main(argv: Sequence[str] | None = None) -> int:
    return run_cloud("cloud_api.py", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
