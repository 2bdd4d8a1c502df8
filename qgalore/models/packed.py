"""The int8 export (see ``export.int8``) as a model to start from: its integers and scales, unchanged where they fit."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files.headers import Entry
from ..quant.int8 import QMAX, dequantize

_PARTS = (".weight_packed", ".weight_scale", ".weight_shape")


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) of which the files hold four integers to a word, and bf16 scales (out, groups)."""

    words: Entry
    scales: Entry
    shape: tuple[int, ...]
    dtype = torch.float32  # what it reads as

    @property
    def path(self) -> Path:
        return self.words.path

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    def codes(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """int8 (b − a, in) and bf16 (b − a, groups) of rows a … b−1. Raises ``ValueError`` for those that no export
        writes."""
        unsigned = self.words.rows(a, b).contiguous().view(torch.uint8)[:, : self.shape[1]]
        codes, scales = (unsigned.to(torch.int16) - 128).to(torch.int8), self.scales.rows(a, b)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise ValueError(f"the scales of rows {a} to {b - 1} are not all finite and above zero")
        if bool((codes < -QMAX).any()):
            raise ValueError(f"rows {a} to {b - 1} hold the integer −128, which no export writes")
        return codes, scales

    def rows(self, a: int, b: int) -> Tensor:
        return dequantize(*self.codes(a, b))


def unpacked(found: dict[str, Entry]) -> dict[str, Entry | Packed]:
    """``found`` with a :class:`Packed` under the weight's name in place of the three tensors that stand for it. Raises
    :class:`ConfigError` where they are incomplete or do not fit each other."""
    made: dict[str, Entry | Packed] = {n: e for n, e in found.items() if not n.endswith(_PARTS)}
    for name in sorted({n.rpartition(".")[0] for n in found if n.endswith(_PARTS)}):
        parts = [found.get(name + part) for part in _PARTS]
        if None in parts:
            lacks = name + _PARTS[parts.index(None)]
            raise ConfigError(f"it has no tensor {lacks}")
        if f"{name}.weight" in made:
            beside = f"it holds {name}.weight beside {name}.weight_packed"
            raise ConfigError(f"{beside}. Remove the one that is not meant from the files")
        words, scales, stated = parts
        if (words.kind, scales.kind, stated.kind, stated.shape) != ("I32", "BF16", "I64", (2,)):
            raise ConfigError(f"{name} is not packed as qgalore packs it")
        shape = tuple(stated.rows(0, 2).tolist())
        rows, width = shape
        fits = rows > 0 and width > 0 and words.shape == (rows, -(-width // 4))
        if not fits or len(scales.shape) != 2 or scales.shape[0] != rows or width % max(1, scales.shape[1]):
            what = f"words {words.shape} and scales {scales.shape}"
            raise ConfigError(f"{name}.weight_shape is {shape}, which does not fit its {what}")
        made[f"{name}.weight"] = Packed(words, scales, shape)
    return made
