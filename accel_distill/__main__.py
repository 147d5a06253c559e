"""`python -m accel_distill`: the command `accel-distill`, where the package is not installed."""

import sys

from accel_distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
