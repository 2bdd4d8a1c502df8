"""How training and its subspaces converge: ``python tools/convergence.py runs/quickstart --html report.html``.

The same as ``qgalore convergence``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.convergence import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/convergence.py"))
