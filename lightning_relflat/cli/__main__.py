"""``python -m lightning_relflat.cli``."""

import sys

from lightning_relflat.cli import main

if __name__ == "__main__":
    sys.exit(main())
