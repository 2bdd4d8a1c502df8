"""Whether this machine is ready, and how fast it will be: ``python tools/doctor.py [--cpu]``.

The same as ``qgalore doctor``, for a copy of the project that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qgalore.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python tools/doctor.py"))
