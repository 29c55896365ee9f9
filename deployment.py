"""The deployment phase: `neurosurgeon.deployment`."""

import sys

from neurosurgeon.deployment import main

if __name__ == "__main__":
    sys.exit(main())
