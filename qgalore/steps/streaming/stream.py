"""Blocks that are on the device only for their turns in a walk.

Between its turns a block's tensors are views of its record in host memory, where everyone may read and write them as
usual: checkpoints, exports, an optimizer's ``load_state_dict``. In its turn they are views of a slot on the device. The
next block in the direction of the walk is fetched meanwhile, and what a step has changed goes back behind it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...lowrank.optimizer import LowRankOptimizer
from .copies import Copies, CopyError, Moment, copies_for
from .locking import Locked, lock
from .records import CHANGED, GROUPS, Field, Record, fields_of_block, fields_of_state, gather, lay_out, used_elsewhere
from .slots import Slot, Slots


class Stream:
    """The ``blocks`` of ``model`` as records in host memory, ``slots`` of which are on ``device`` at a time.

    It takes the blocks' parameters and buffers at once (``filled`` False: as unset memory, zeros), and the optimizer's
    state with :meth:`adopt`. It is a :class:`Turns` for a walk. Outside of a walk a block is fetched when it is called,
    one ahead, and nothing is written back. ``copied``: bytes so far, each way. ``waits``: whether a walk's blocks keep
    their gradients and step only in a :meth:`visit` after it.
    """

    stays = False

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        slots: int = 2,
        copies: Copies | None = None,
        filled: bool = True,
        waits: bool = False,
    ) -> None:
        if slots < 2:
            raise ValueError(f"{slots} slots are too few: while one block computes, another one travels")
        self.blocks, self.device, self.count = list(blocks), device, slots
        self.copied = {"in": 0, "out": 0}
        self.waits = waits
        self._copies = copies or copies_for(device)
        self._made: Slots | None = None
        self._locked: Locked | None = None
        self._versions: dict[str, int] = {}  # of the tensors in the current turn, by name
        self._current: int | None = None
        self._walking, self._expected = False, 0
        self._elsewhere = used_elsewhere(model, self.blocks)
        self.records = [lay_out(fields_of_block(block, self._elsewhere)) for block in self.blocks]
        for number, block in enumerate(self.blocks):
            gather(self.records[number], device, filled)
            block.register_forward_pre_hook(lambda *_, number=number: self._called(number))
            block.register_forward_hook(lambda *call, number=number: self._returned(number, call[-1]), always_call=True)

    @property
    def host_bytes(self) -> int:
        """Bytes of all records."""
        return sum(record.nbytes for record in self.records)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, whatever the number of blocks is."""
        return max(record.nbytes for record in self.records)

    def adopt(self, optimizer: LowRankOptimizer, *, state: bool) -> None:
        """Let the optimizer's ``state`` for the blocks travel with them, or else stay on the device. Call it once,
        between the optimizer's making and the first step."""
        known: dict[Any, dict[str, Any]] = {}
        for number, block in enumerate(self.blocks):
            tensors = [t for t in optimizer.tensors_of(block) if id(t.stored) not in self._elsewhere]
            for own in (value for tensor in tensors for value in tensor.tensors().values()):
                if not state if own.ndim else own.is_floating_point():  # what counts steps stays with the host
                    own.data = own.to(self.device)
            for part in (part for tensor in tensors if state for part in tensor.parts):
                part.rests_on = torch.device("cpu")  # what a checkpoint loads need not pass through the device
            if state:
                record = lay_out([*self.records[number].fields, *fields_of_state(tensors, known)])
                gather(record, self.device)
                self.records[number] = record
        self._made = None

    def lock(self) -> str:
        """Lock the records' pages for a GPU, as long as this object lives. Returns what there is to say of it. Call it
        after :meth:`adopt`, which makes new records."""
        self._locked = lock([record.memory for record in self.records if record.memory is not None])
        return str(self._locked)

    def collect(self) -> None:
        """Bring what was loaded or replaced since the last step into the records, so that no second copy waits."""
        for block in range(len(self.blocks)):
            self._collect(block)

    # A walk's turns.

    def begin(self) -> None:
        """A walk begins. Records may have been written since the last one, so nothing in the slots counts."""
        self._slots.clear()
        self._walking = True
        self._fetch(0, whole=False)

    def enter(self, block: int, backward: bool) -> None:
        """Put ``block`` on the device, and begin to fetch the next one of the direction. Raises :class:`CopyError`."""
        if 0 <= block < len(self.blocks):
            self._enter(block, backward, block - 1 if backward else block + 1)

    def _enter(self, block: int, whole: bool, ahead: int) -> None:
        """:meth:`enter` with the ``whole`` record or its weights alone, and the block ``ahead`` alike."""
        slot = self._fetch(block, whole)
        for moment in slot.arrivals:
            self._copies.hold(moment)
        slot.arrivals, self._current, self._versions = [], block, {}
        for entry, tensor in _present(self.records[block]):
            if entry.group in slot.groups:
                tensor.data = entry.view(slot.memory)
                self._versions[entry.name] = tensor._version
        if 0 <= ahead < len(self.blocks):
            self._fetch(ahead, whole)

    def leave(self, block: int, stepped: bool) -> None:
        """Take ``block`` off the device. If it has ``stepped``, its record is written anew while others work."""
        self._leave(block, stepped, moved=not self.waits)
        if self._walking and not stepped and block == len(self.blocks) - 1:
            self._fetch(block, whole=True)  # what it lacks comes while the loss is computed

    def _leave(self, block: int, stepped: bool, moved: bool) -> None:
        """:meth:`leave`, where what has ``stepped`` may not have ``moved`` yet: then only new bases are written."""
        slot = self._slot_of(block)
        changed = self._take_off(block, slot, stepped)
        slot.free = [self._copies.reached()]
        if self._walking:
            self._check_idle(block, slot)
        if stepped and (changed or moved):
            slot.free = self._copy("out", block, GROUPS if changed else CHANGED, slot)

    def end(self, whole: bool) -> None:
        """Wait until all records are written. After an error (not ``whole``) the block of the broken turn keeps the
        record that it had. Raises :class:`CopyError` if nothing else went wrong."""
        self._walking = False
        if self._current is not None:
            self._take_off(self._current, self._slot_of(self._current), stepped=False)
        error = self._settle()
        self._slots.clear()
        if error is not None and whole:
            raise error

    def visit(self, act: Callable[[int], None], *, stepped: bool = True) -> None:
        """Call ``act`` with the number of each block, from the first to the last, while it is on the device: all of it,
        which is written back, if it ``stepped`` there; else its weights alone. Raises :class:`CopyError`."""
        self._slots.clear()
        self._walking, whole = True, False
        try:
            for block in range(len(self.blocks)):
                self._enter(block, stepped, block + 1)
                act(block)
                self._leave(block, stepped, moved=True)
            whole = True
        finally:
            self.end(whole)

    # The calls of blocks outside of a walk.

    def _called(self, block: int) -> None:
        if self._walking or self._current == block:
            return
        if block != self._expected:
            self._slots.clear()
        self.enter(block, backward=False)

    def _returned(self, block: int, output: Any) -> None:
        if self._walking or self._current != block:
            return
        self.leave(block, stepped=False)
        self._slot_of(block).clear()
        self._expected = block + 1
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(_refuse)

    # What both do.

    @property
    def _slots(self) -> Slots:
        if self._made is None:
            self._made = Slots(self.count, self.slot_bytes, self.device)
        return self._made

    def _slot_of(self, block: int) -> Slot:
        slot = self._slots.of(block)
        assert slot is not None, f"block {block} has a turn without a slot"
        return slot

    def _fetch(self, block: int, whole: bool) -> Slot:
        """The slot where ``block`` is, or is coming to: the ``whole`` record, or its weights alone."""
        slot = self._slots.of(block) or self._slots.give(block, self._current)
        missing = [group for group in (GROUPS if whole else ("weights",)) if group not in slot.groups]
        if missing:
            self._collect(block)
            slot.arrivals += self._copy("in", block, missing, slot)
            slot.groups.update(missing)
        return slot

    def _copy(self, way: str, block: int, groups: Sequence[str], slot: Slot) -> list[Moment]:
        record, coming = self.records[block], way == "in"
        assert record.memory is not None, "a record on paper does not travel"
        pair = (slot.memory, record.memory) if coming else (record.memory, slot.memory)
        what = f"the copy of block {block} {'to the device' if coming else 'back to host memory'}"
        self.copied[way] += record.size(groups)
        return [self._copies.start(way, *pair, span, slot.free, what) for span in record.spans(groups)]

    def _collect(self, block: int) -> None:
        """Bring tensors that were made or replaced between two turns into the record."""
        record = self.records[block]
        assert record.memory is not None, "a record on paper holds nothing"
        for entry, tensor in _present(record):
            place = entry.view(record.memory)
            if tensor.data_ptr() != place.data_ptr():
                self._put(block, entry, tensor, place)
                tensor.data = place

    def _take_off(self, block: int, slot: Slot, stepped: bool) -> bool:
        """Make the tensors views of the record again; a step may have made new ones, which go into the slot first.
        Returns whether a basis has changed."""
        record, changed, self._current = self.records[block], False, None
        assert record.memory is not None, "a record on paper holds nothing"
        for entry, tensor in _present(record):
            place = entry.view(slot.memory)
            moved = stepped and tensor.data_ptr() != place.data_ptr()
            if moved:
                self._put(block, entry, tensor, place)
            if entry.group == "bases":
                changed |= moved or tensor._version != self._versions.get(entry.name, tensor._version)
            tensor.data = entry.view(record.memory)
        return changed

    def _put(self, block: int, entry: Field, tensor: Tensor, place: Tensor) -> None:
        if (tensor.shape, tensor.dtype) != (entry.shape, entry.dtype):
            raise ValueError(
                f"{entry.name} of block {block} is {tuple(tensor.shape)} {tensor.dtype} now, and its record has room "
                f"for {tuple(entry.shape)} {entry.dtype}"
            )
        place.copy_(tensor.detach())

    def _check_idle(self, block: int, slot: Slot) -> None:
        """Raise if some tensor still lies in the slot: it would hold another block's values soon."""
        if slot.views() == self._slots.idle:
            return
        gc.collect()
        if slot.views() != self._slots.idle:
            raise RuntimeError(
                f"block {block} cannot be streamed: its modules keep tensors that are views of its weights beyond its "
                "turn. Keep the module instead, or set memory.stream to none"
            )

    def _settle(self) -> CopyError | None:
        """Wait for the last copies, behind which there are no others; the first error."""
        found = None
        for moment in [moment for slot in self._slots.all for moment in (*slot.arrivals, *slot.free)]:
            try:
                self._copies.settle(moment)
            except CopyError as error:  # the others must come to their ends all the same
                found = found or error
        return found


def _present(record: Record) -> Iterator[tuple[Field, Tensor]]:
    """The fields that have a tensor now, and that tensor."""
    for entry in record.fields:
        tensor = entry.find()
        if tensor is not None:
            yield entry, tensor


def _refuse(_: Tensor) -> NoReturn:
    raise RuntimeError(
        "a backward pass reached a streamed block outside of a walk, when its weights are back in host memory. "
        "Take the step with qgalore.step"
    )
