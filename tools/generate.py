"""A first look at an exported model: ``python tools/generate.py runs/quickstart/export/hf --prompt "It was"``.

The same as ``qgalore generate``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/generate.py"))
