"""Where the processes of one attempt of a job meet, apart from those of attempts before it."""

import hashlib
import time
import uuid
from datetime import timedelta

from torch import distributed as dist

PAUSE = 0.02  # seconds between two looks


def fresh_store(store: dist.Store, rank: int, size: int, patience: timedelta) -> dist.Store:
    """A part of ``store`` in which only the ``size`` processes that live now have written.

    ``torchrun`` keeps one store over its restarts, and so the addresses of processes that it has ended: one started
    again that reads such an address finds nobody there. Nor do its counts of restarts tell attempts apart: an agent
    counts the failures of its own processes alone, so that counts differ between machines.

    So each process leaves a word of its own, rank 0 proposes the list of words, everyone whose word is in the list
    agrees to it, and rank 0 settles it once all have: the dead do not answer. A list that was settled before is never
    met again, since rank 0's own word is new.

    Raises :class:`dist.DistStoreError` when not all have come within ``patience``.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    store.set(f"word/{rank}", word)
    agree = _propose if rank == 0 else _join
    while time.monotonic() < deadline:
        settled = agree(store, rank, size, word)
        if settled:
            return dist.PrefixStore(settled, store)
        time.sleep(PAUSE)
    raise dist.DistStoreError(f"not all of {size} processes came within {patience}")


def _propose(store: dist.Store, rank: int, size: int, word: str) -> str | None:
    """Rank 0: the name of the list of words, once all who left them have agreed to it."""
    others = range(1, size)
    if not store.check([f"word/{other}" for other in others]):
        return None
    words = [word, *(store.get(f"word/{other}").decode() for other in others)]
    store.set("words", ",".join(words))
    name = _name(words)
    if not store.check([f"{name}/agreed/{other}" for other in others]):
        return None
    store.set(f"{name}/settled", "")
    return name


def _join(store: dist.Store, rank: int, size: int, word: str) -> str | None:
    """Another rank: the name of the list of words, once it is settled with this one's in it."""
    if not store.check(["words"]):
        return None
    words = store.get("words").decode().split(",")
    if len(words) != size or words[rank] != word:
        return None
    name = _name(words)
    store.set(f"{name}/agreed/{rank}", "")
    return name if store.check([f"{name}/settled"]) else None


def _name(words: list[str]) -> str:
    return hashlib.blake2b("".join(words).encode(), digest_size=16).hexdigest()
