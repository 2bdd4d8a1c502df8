"""The order in which training samples are visited: a function of seed and position, so a run can resume anywhere."""

import numpy as np

from qgalore.errors import ConfigError


class SampleOrder:
    """Independent permutations of ``n_samples`` sample indices, one an epoch, each drawn from (``seed`` below 2⁶⁴,
    epoch). NumPy may change what a generator draws, so an order is only promised for one NumPy version."""

    def __init__(self, n_samples: int, seed: int):
        self.n_samples = n_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def take(self, position: tuple[int, int], count: int) -> tuple[list[int], tuple[int, int]]:
        """The ``count`` sample indices from ``position`` (epoch, index in the epoch) on, and the position after them.
        Raises ConfigError for a position that these samples do not have."""
        epoch, index = position
        if epoch < 0 or not 0 <= index < self.n_samples:
            raise ConfigError(
                f"data position (epoch {epoch}, index {index}) is not one of {self.n_samples} samples an epoch; "
                "resume with the data, sequence_length and split the checkpoint was made with."
            )
        taken: list[int] = []
        while len(taken) < count:
            part = self._epoch_permutation(epoch)[index : index + count - len(taken)]
            taken.extend(part.tolist())
            index += len(part)
            if index == self.n_samples:
                epoch, index = epoch + 1, 0
        return taken, (epoch, index)

    def _epoch_permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Philox is keyed, not seeded: different keys give independent streams, without hashing seed and epoch.
            bits = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
            self._permutation = np.random.Generator(bits).permutation(self.n_samples)
            self._epoch = epoch
        return self._permutation
