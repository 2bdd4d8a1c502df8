"""Train variants of one configuration and compare them: ``python tools/compare_methods.py --config quickstart …``.

The same as ``qgalore compare``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/compare_methods.py"))
