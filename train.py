"""Train a language model in little memory: ``python train.py --config quickstart.yaml [key=value …]``, on several
cards or machines ``torchrun --nproc_per_node N train.py …``.

The same as ``qgalore train``, for a copy of the project that is not installed.
"""

import sys

from qgalore.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python train.py"))
