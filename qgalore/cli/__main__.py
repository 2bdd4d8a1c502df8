"""``python -m qgalore.cli``, which is ``qgalore`` where no such program is installed."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
