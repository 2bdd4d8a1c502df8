"""Checkpoints: two safetensors files and one JSON in a folder that appears whole or not at all.

``model.safetensors``: the model's state dict. ``optimizer.safetensors``: inner states and fp32 masters, named
``slot|kind|name``. ``state.json``: schedules, scalars, positions, the resolved configuration, the sizes of both files,
the SHA-256 of each piece of them, and of itself. The files do not tell how many processes wrote them.

Tensors are written a piece at a time, so no second copy of the model exists. Where there is room for a copy, a
:class:`Draft` is filled from that while training goes on.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.checksums import sync
from ..errors import ConfigError
from ..parallel import ALONE, Team, apart, shards
from ..parallel.kept import Kept
from ..parallel.stages import Stages
from . import atomic
from .checkpoint_folder import (
    FILES,
    STATE,
    clear_leftovers,
    move_aside,
    name_for,
    number_of,
    remove,
    set_aside,
    step_of,
    steps_in,
)
from .checkpoint_reading import VERSION, DamagedError, NewerError, examine, newest_in, newest_of, read_state, seal_of
from .filling import flatten, load_into, load_model
from .mapping import map_model
from .safetensors import Copied, Entries, Rows, Seal, create, file_bytes, joined, share_bytes, write_share

__all__ = [
    "STATE", "DamagedError", "NewerError", "load_into", "load_model", "map_model", "name_for", "newest_in", "newest_of",
    "read_state", "set_aside", "step_of", "steps_in",
]  # fmt: skip
BEGINNING, END = "the beginning of a checkpoint", "the end of a checkpoint"


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory: tied weights keep the first of their names."""
    seen: set[int] = set()
    kept = {}
    for name, value in tensors.items():
        stored = apart.kept(value)
        # Of a tensor that is split this process may hold no rows, and so no memory to tell it by.
        place = id(stored) if shards.is_shared(stored) else stored.data_ptr()
        if value.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = stored.detach()
    return kept


def _needed_bytes(tensors: Entries) -> int:
    return file_bytes(tensors) + 256 * len(tensors)  # for what state.json says of them


def _contents(model: nn.Module, optimizer_state: dict[str, Any]) -> tuple[dict[str, Entries], dict[str, Any]]:
    """The tensors of each file, and the rest. States that were read come in another order, so those are sorted."""
    tensors, rest = flatten(optimizer_state)
    files = dict(zip(FILES, (_unshared(model.state_dict(keep_vars=True)), dict(sorted(tensors.items()))), strict=True))
    return {name: {key: _rows(value) for key, value in held.items()} for name, held in files.items()}, rest


def _rows(tensor: Tensor | Kept) -> Tensor | Rows:
    """``tensor`` with what is known of who writes it."""
    if isinstance(tensor, Kept):
        return Rows(tensor.here, tensor.dtype, tensor.shape, ((tensor.owner, tensor.nbytes),))
    if not shards.is_shared(tensor):
        return tensor
    return Rows(shards.local(tensor), tensor.dtype, tuple(tensor.shape), shards.first_holders(tensor))


class Draft:
    """A checkpoint that :func:`begin` made in all processes of ``team``: ``building`` is a hidden folder with files in
    their full length, which nobody has filled."""

    def __init__(
        self, folder: Path, building: Path, contents: dict[str, Entries], document: dict[str, Any], team: Team
    ) -> None:
        self.folder, self.building, self.document, self.team = folder, building, document, team
        self._contents = contents
        self._copies: dict[str, Copied] = {}

    def copy_bytes(self) -> int:
        """The host memory that :meth:`copy` takes in this process."""
        return sum(share_bytes(held, self.team.rank, self.team.size) for held in self._contents.values())

    def copy(self) -> bool:
        """Copy what this process will write, and let go of the tensors, which may change from now on. False, with
        nothing copied, if the system refuses the memory."""
        try:
            copies = {name: Copied(held, self.team.rank, self.team.size) for name, held in self._contents.items()}
        except (MemoryError, RuntimeError):  # the second is PyTorch's, of both kinds of memory
            return False
        self._copies, self._contents = copies, {}
        return True

    @property
    def locked(self) -> bool:
        """Whether the copy is page-locked, which PyTorch then keeps for the next one."""
        return any(copied.locked for copied in self._copies.values())

    def stages(self) -> Stages:
        """Each process fills its share, and rank 0 seals the folder and gives it its name."""
        try:
            shares = yield self._fill
            yield partial(self._finish, shares)
        except Exception:
            if self.team.leads:
                shutil.rmtree(self.building, ignore_errors=True)
            raise

    def _fill(self) -> dict[str, list[Seal]]:
        with explained(self.folder):
            team = self.team
            copied = {name: held.write(self.building / name) for name, held in self._copies.items()}
            here = {
                name: write_share(self.building / name, c, team.rank, team.size) for name, c in self._contents.items()
            }
            return copied | here

    def _finish(self, shares: list[dict[str, list[Seal]]]) -> None:
        if not self.team.leads:
            return
        with explained(self.folder):
            files = {name: _sealed(self.building / name, [share[name] for share in shares]) for name in FILES}
            document = {**self.document, "files": files}
            with (self.building / STATE).open("w", encoding="utf-8") as file:
                json.dump({**document, "sha256": seal_of(document)}, file)
                file.flush()
                os.fsync(file.fileno())
            sync(self.building)
            self.building.rename(self.folder)
            sync(self.folder.parent)


def begin(
    folder: Path, model: nn.Module, optimizer_state: dict[str, Any], run_state: dict[str, Any], team: Team = ALONE
) -> Draft | None:
    """Begin to write ``folder`` (…/step-00000100) in every process of ``team``: into a hidden sibling, which rank 0
    makes now and renames at the end. On every process this and the draft's stages raise :class:`ConfigError` on an I/O
    error in one; the other checkpoints stay as they are.

    A complete checkpoint of the same position already there is left, and None returned: the state after a step does not
    depend on how often it is reached. Anything else of that name is renamed to ``left-…``.
    """
    contents, rest = _contents(model, optimizer_state)
    document = copy.deepcopy({"version": VERSION, **run_state, "optimizer": rest})
    mine = atomic.sibling(folder, "tmp")  # rank 0's is everyone's, and new on every disk
    try:
        with team.together(BEGINNING), explained(folder):
            make = partial(_begin, folder, mine, contents, run_state.get("position"))
            building = team.of_first(BEGINNING, make)
            if building is not None and not building.is_dir():
                raise OSError(f"{building}, which rank 0 made, is not there; all processes must see one disk")
    except Exception:
        shutil.rmtree(mine, ignore_errors=True)
        raise
    return None if building is None else Draft(folder, building, contents, document, team)


def explained(folder: Path) -> AbstractContextManager[None]:
    return atomic.explained(
        f"the checkpoint {folder}",
        "Older checkpoints are intact; free space or set another run.dir, then continue with --resume auto",
    )


def _begin(folder: Path, building: Path, contents: dict[str, Entries], position: dict[str, Any] | None) -> Path | None:
    """Make ``building``, with files in their full length, and return it; None if that checkpoint is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder):
        _, there, _ = newest_of([folder])
        if there is not None and there.get("position") == json.loads(json.dumps(position)):
            return None
        print(f"note: what stands under the name {folder} is kept as {move_aside(folder)}", flush=True)
    clear_leftovers(folder.parent)
    atomic.need_room(sum(map(_needed_bytes, contents.values())), folder.parent)
    building.mkdir()
    for name, tensors in contents.items():
        create(building / name, tensors)
    return building


def _sealed(path: Path, shares: list[list[Seal]]) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "pieces": joined(shares, size)}


def pruning(
    newest: Path, keep_last: int, keep_every: int | None, keep_steps: Callable[[], Collection[int]], team: Team
) -> Stages:
    """Delete the checkpoints beside ``newest`` that are older, but for the ``keep_last`` newest, itself included, those
    of steps that are multiples of ``keep_every`` and those that ``keep_steps()`` gives at rank 0.

    Before anything is deleted, ``newest`` is read again and held against its seals. Later checkpoints are of another
    course: they neither count nor go. Raises :class:`ConfigError`.
    """

    def led(work: Callable[[], Any]) -> Callable[[], Any]:
        return work if team.leads else lambda: None

    found = yield led(lambda: _too_old(newest, keep_last, keep_every, keep_steps()))
    if not found[0]:
        return
    problems = yield lambda: examine(newest, team.rank, team.size)[1]
    if first := next(filter(None, problems), None):
        raise ConfigError(
            f"{newest} was written and does not read back as it was: {first[1]}. Older checkpoints are kept. Check the "
            "disk, then go on with --resume auto"
        )
    yield led(partial(_remove_all, found[0]))


def _remove_all(doomed: list[Path]) -> None:
    for old in doomed:
        try:
            remove(old)
        except OSError as error:
            raise ConfigError(f"the old checkpoint {old} could not be deleted: {error}; delete it by hand") from error


def _too_old(newest: Path, keep_last: int, keep_every: int | None, keep_steps: Collection[int]) -> list[Path]:
    older = [path for path in steps_in(newest.parent) if number_of(path) < number_of(newest)]
    older = older[: max(0, len(older) + 1 - keep_last)]
    steps = {path: number_of(path) for path in older}
    return [
        path for path, step in steps.items() if step not in keep_steps and not (keep_every and step % keep_every == 0)
    ]
