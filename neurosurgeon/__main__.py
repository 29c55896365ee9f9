"""python -m neurosurgeon COMMAND ..."""

import sys

from neurosurgeon.cli.console import main

if __name__ == "__main__":
    sys.exit(main())
