"""What streaming costs on paper: bytes on the host and in slots, bytes that travel in a step, and their time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..lowrank.layers.bases import Basis
from ..lowrank.tensors.base import TrainedTensor
from ..lowrank.tensors.splitting import places_in
from ..models.compiling import blocks_of
from ..steps.blocks import Layout
from ..steps.streaming.records import CHANGED, Field, Record, fields_of_block, fields_of_state, lay_out, used_elsewhere
from . import orthogonal_work

# Both are assumed of a card with 16 GB; neither was measured.
LINK = 12.5e9  # bytes a second each way, of PCIe 4 with 8 lanes
SPEED = 40e12  # operations a second in bf16, in large products


@dataclass(frozen=True)
class Streamed:
    """The ``records`` of a model's blocks, ``slots`` of which have room on the device. ``weights``: by block, how many
    a token is multiplied with. ``clips``: whether blocks come once more, to step when all gradients are known."""

    records: list[Record]
    slots: int
    weights: list[float]
    clips: bool = False

    @property
    def host_bytes(self) -> int:
        return sum(record.nbytes for record in self.records)

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        return max(record.nbytes for record in self.records)

    def on_device(self) -> dict[str, int]:
        """Bytes by category. A step that makes an optimizer's state anew has that of a block beside its slot."""
        state = max(record.size(("state",)) for record in self.records)
        return {f"slots of {self.slots} blocks": self.slots * self.slot_bytes, "a block's first moments": state}

    def storages(self) -> set[int]:
        """The identities of the storages, on the meta device, that are in the records."""
        found = (entry.find() for record in self.records for entry in record.fields)
        return {tensor.untyped_storage()._cdata for tensor in found if tensor is not None}

    def bytes_in(self) -> int:
        """Of a step: all weights in the forward direction. Then all records, but for the weights of the last blocks,
        which are still in their slots. And all records once more, if it ``clips``."""
        kept = self.records[len(self.records) - self.slots :] if self.slots < len(self.records) else self.records
        weights = sum(record.size(("weights",)) for record in self.records)
        again = self.host_bytes if self.clips else 0
        return weights + self.host_bytes + again - sum(record.size(("weights",)) for record in kept)

    def bytes_out(self) -> int:
        """Of a step without a refresh: weights and state of all blocks. A block with a refresh adds its bases."""
        return sum(record.size(CHANGED) for record in self.records)

    def tokens_to_hide(self, link: float = LINK, speed: float = SPEED) -> int:
        """The tokens of a step from which every copy takes no longer than the arithmetic of the block beside it.

        A block computes 2 operations for each weight and token in the forward direction and 6 in the backward one,
        which runs it again. Attention is left out, so that a few tokens fewer may do. With two slots a block's record
        comes after another one's has gone back; with more they pass each other.
        """
        most = 0.0
        for record, weights in zip(self.records, self.weights, strict=True):
            back, forth = record.size(CHANGED), record.nbytes
            travelling = back + forth if self.slots == 2 else max(back, forth)
            forward = record.size(("weights",)) / link * speed / (2.0 * weights)
            most = max(most, forward, travelling / link * speed / (6.0 * weights))
        return round(most)

    def line(self, tokens: int) -> str:
        """What the plan says of the copies of a step of so many ``tokens``."""
        enough, last = self.tokens_to_hide(), ""
        if self.clips:
            both = self.host_bytes, self.bytes_out()
            seconds = (sum(both) if self.slots == 2 else max(both)) / LINK
            last = f". Clipping takes all blocks through once more, in {seconds:.1f} s of copies alone"
        hidden = "they hide behind the arithmetic" if tokens >= enough else "they do not hide behind the arithmetic"
        return (
            f"{self.bytes_in() / 1e9:.1f} GB to the device and {self.bytes_out() / 1e9:.1f} GB back in a step; at an "
            f"assumed {LINK / 1e9:g} GB/s each way and {SPEED / 1e12:g} TFLOP/s {hidden} of {tokens:,} tokens, as they "
            f"do from {enough:,} on{last}"
        )


@dataclass(frozen=True)
class StreamedRows(Streamed):
    """The same where processes split the blocks: the ``records`` are of one's rows, which FSDP2 copies to the device
    when it gathers a block, with its bases in both directions. ``locked``: a GPU reads them, so that PyTorch has given
    each tensor page-locked memory, by powers of two."""

    locked: bool = True

    @property
    def host_bytes(self) -> int:
        sizes = [entry.nbytes for record in self.records for entry in record.fields]
        return sum(map(page_locked, sizes)) if self.locked else sum(sizes)

    def on_device(self) -> dict[str, int]:
        """Bytes by category: the rows of one block, from which the whole is gathered."""
        return {"rows of a block that comes": max(map(_of_fields, self.records))}

    def bytes_in(self) -> int:
        """Of a step: all rows in both directions, and once more if it ``clips``."""
        return (3 if self.clips else 2) * sum(map(_of_fields, self.records))

    def bytes_out(self) -> int:
        """Of a step without a refresh: the rows that owners hand out."""
        return sum(_of_fields(record, "weights") for record in self.records)

    def line(self, tokens: int) -> str:
        """As there. FSDP2 copies on the stream on which blocks work, so that nothing hides it, whatever the ``tokens``
        are."""
        both = self.bytes_in(), self.bytes_out()
        return (
            f"{both[0] / 1e9:.1f} GB of rows to the device and {both[1] / 1e9:.1f} GB back in a step, which waits for "
            f"these copies: {sum(both) / LINK:.1f} s at an assumed {LINK / 1e9:g} GB/s"
        )


def _of_fields(record: Record, group: str | None = None) -> int:
    """Bytes of the tensors in ``record``, without gaps between them; of one ``group``, or of all."""
    return sum(entry.nbytes for entry in record.fields if group in (None, entry.group))


def page_locked(size: int) -> int:
    """Bytes that a buffer of ``size`` bytes takes: PyTorch gives page-locked memory by powers of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _rows_on_paper(block: nn.Module, shares: int) -> Record:
    """The record of the rows of one of so many ``shares`` of ``block``: of the largest."""
    fields = []
    for place in places_in(block):
        group = "bases" if isinstance(place.module, Basis) else "weights"
        shape, find = place.share(shares).shape, partial(getattr, place.module, place.key)
        fields.append(Field(place.key, group, shape, place.tensor.dtype, find))
    return lay_out(fields)


def on_paper(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tensors: Sequence[TrainedTensor],
    slots: int,
    state: bool,
    clips: bool = False,
    device: str = "cuda",
) -> Streamed:
    """The records of ``blocks`` of a converted ``model`` on the meta device, with the optimizer's ``state`` for them or
    without. ``clips``: as in :class:`Streamed`. ``device``: the kind of the device."""
    elsewhere, known = used_elsewhere(model, blocks), {}
    records, weights = [], []
    chosen = orthogonal_work.experts_of_a_token(model)
    inside = {module for block in blocks for module in block.modules()}
    shares = max((tensor.shards for tensor in tensors if tensor.module in inside), default=1)
    for block in blocks:
        weights.append(sum(m.rows * m.columns * m.tokens for m in orthogonal_work.matrices(block, chosen)))
        if shares > 1:
            records.append(_rows_on_paper(block, shares))
            continue
        fields = fields_of_block(block, elsewhere)
        if state:
            fields += fields_of_state(_stepped_in(block, tensors, elsewhere), known)
        records.append(lay_out(fields))
    if shares > 1:
        return StreamedRows(records, slots, weights, clips, locked=device != "cpu")
    return Streamed(records, slots, weights, clips)


def _stepped_in(block: nn.Module, tensors: Sequence[TrainedTensor], elsewhere: set[int]) -> list[TrainedTensor]:
    inside: set[Any] = {id(parameter) for parameter in block.parameters()}
    return [t for t in tensors if id(t.leaves()[0]) in inside and id(t.stored) not in elsewhere]


def blocks_to_stream(model: nn.Module) -> list[nn.Module]:
    """The blocks that may live in host memory. Raises :class:`ConfigError` if there are none."""
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(_not_walked(model, "transformers marks none of its modules as blocks"))
    return blocks


def check_blocks(model: nn.Module, layout: Layout | None, blocks: Sequence[nn.Module]) -> None:
    """Raise :class:`ConfigError` unless a walk goes through just these ``blocks``."""
    if layout is None or list(layout.blocks) != list(blocks):
        found = "none" if layout is None else f"the {len(layout)} of {layout.name}"
        raise ConfigError(_not_walked(model, f"a walk goes through {found}, of the {len(blocks)} that are marked"))


def _not_walked(model: nn.Module, why: str) -> str:
    """What to say of a model whose blocks cannot be streamed."""
    return (
        f"memory.stream needs a model whose blocks are called one after the other, and {type(model).__name__} is not "
        f"such a one: {why}. Set memory.stream=none"
    )
