"""Export a checkpoint: ``python tools/export.py runs/quickstart --format int8 --out DIR``.

The same as ``qgalore export``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/export.py"))
