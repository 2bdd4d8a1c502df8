"""Multiple choice and held-out loss: ``python tools/evaluate.py runs/NAME --choices FILE --text FILE``.

The same as ``qgalore evaluate``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/evaluate.py"))
