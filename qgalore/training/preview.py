"""The first rows that a run trains on, as text, with what of them the loss learns."""

import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..data.labelled import Labels
from ..data.mixing import MixedOrder, Mixture
from ..data.packing import IGNORED
from ..errors import counted, printable
from .parts import Batch

_MARGIN = {True: "learned", False: "masked"}
_COLOURS = {True: "\x1b[32m", False: "\x1b[2m"}  # on a terminal: green, and faint
_PLAIN = "\x1b[0m"
Lines = Callable[[Batch], Iterator[str]]  # of a batch that holds one row


def on_terminal() -> bool:
    """Whether lines are read on a terminal whose user has nothing against colours (https://no-color.org)."""
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def coloured(line: str) -> str:
    """A line of a preview, in a colour that says whether the loss learns it."""
    for learns, word in _MARGIN.items():
        if line.startswith(f"{word:>8} | "):
            return f"{_COLOURS[learns]}{line}{_PLAIN}"
    return line


def pieces(batch: Batch) -> list[tuple[bool, list[int]]]:
    """Tokens of the one row of ``batch`` that follow each other, and whether the loss learns them. ``batch`` has
    input_ids, labels and position_ids, int64 (1, L). A token is learned where it is the target of the one before it. A
    piece also ends where its document does."""
    ids, targets, positions = (batch[key][0].tolist() for key in ("input_ids", "labels", "position_ids"))
    tokens = [*ids, *(target for target in targets[-1:] if target != IGNORED)]
    learned = [False, *(target != IGNORED for target in targets)]
    starts = [*(position == 0 for position in positions), False]
    found: list[tuple[bool, list[int]]] = []
    for token, learns, begins in zip(tokens, learned, starts, strict=False):
        if begins or learns != found[-1][0]:
            found.append((learns, []))
        found[-1][1].append(token)
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """``ids`` as text. A special token that comes again and again, as padding does, is written once and counted."""
    parts: list[str] = []
    plain: list[int] = []
    for _, group in groupby(ids):
        run = list(group)
        if len(run) > 3 and run[0] in tokenizer.all_special_ids:
            parts += [_decoded(tokenizer, plain), f"{_decoded(tokenizer, run[:1])} × {len(run)}"]
            plain = []
        else:
            plain += run
    return printable("".join([*parts, _decoded(tokenizer, plain)]))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def of_text(tokenizer: PreTrainedTokenizerBase) -> Lines:
    """How a row of packed text or conversations is shown: every line of it as learned or masked."""

    def lines(batch: Batch) -> Iterator[str]:
        targets, documents = (int(found.sum()) for found in (batch["labels"] != IGNORED, batch["position_ids"] == 0))
        tokens = counted(batch["input_ids"].numel(), "token")
        parts = counted(documents, "part that sees only itself", "parts that see only themselves")
        yield f"{tokens}, {counted(targets, 'target')}, in {parts}"
        for learns, ids in pieces(batch):
            for line in _text(tokenizer, ids).split("\n"):
                yield f"{_MARGIN[learns]:>8} | {line}"

    return lines


def of_examples(tokenizer: PreTrainedTokenizerBase, labels: Labels) -> Lines:
    """How a labelled example is shown."""

    def lines(batch: Batch) -> Iterator[str]:
        value = batch["labels"][0].item()
        label = f"{value:g}" if labels.names is None else labels.names[int(value)]
        ids = batch["input_ids"][0].tolist()
        yield f"{counted(len(ids), 'token')}, label {printable(label)!r}"
        for line in _text(tokenizer, ids).split("\n"):
            yield f"{'read':>8} | {line}"

    return lines


def _origin(data: Mixture, number: int) -> str:
    """Where a row comes from, in words."""
    place, inside = data.place(number)
    name = data.names[place]
    return f"sample {inside:,} of {len(data.sources[place]):,}" + (f" of {name}" if name else "")


def rows(data: Mixture, order: MixedOrder, count: int, shown: Lines) -> Iterator[str]:
    """The lines of the first ``count`` rows in the ``order`` of training, or of all, if there are fewer."""
    numbers, _ = order.take((), min(count, len(data)))
    for place, number in enumerate(numbers, start=1):
        first, *more = shown(data.batch([number]))
        yield f"row {place} ({_origin(data, number)}): {first}"
        yield from more
