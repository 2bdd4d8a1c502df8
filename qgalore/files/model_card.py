"""A model card: the README.md of an exported folder, with the loss as a picture beside it.

It has no date and no path of the machine, so that the same model gets the same card. Its last line is a checksum of the
others, by which a card that nobody has changed is told from one that somebody wrote.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..errors import printable

CARD, PICTURE = "README.md", "loss.svg"
_MARK = re.compile(r"<!-- written by qgalore, sha256 ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class ModelCard:
    """``header``: fields of :class:`huggingface_hub.ModelCardData`; ``rows``: (what, value in Markdown) of the table;
    ``usage``: lines of Python; ``picture``: the loss (SVG), "" if nothing is known of it."""

    name: str
    header: dict[str, Any]
    rows: list[tuple[str, str]]
    usage: str
    notes: list[str] = field(default_factory=list)
    picture: str = ""

    def text(self) -> str:
        parts = [f"---\n{ModelCardData(**self.header).to_yaml()}\n---", f"# {code(self.name)}"]
        parts.append("\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in self.rows)]))
        if self.picture:
            parts.append(f"![The loss over the steps of training]({PICTURE})")
        parts += ["## Use", *self.notes, f"```python\n{self.usage}\n```"]
        body = "\n\n".join(parts) + "\n\n"
        return f"{body}<!-- written by qgalore, sha256 {_checksum(body)} -->\n"

    def write(self, folder: Path) -> None:
        """Write README.md and the picture into ``folder``, which exists. Raises ``OSError``."""
        (folder / CARD).write_text(self.text(), encoding="utf-8")
        if self.picture:
            (folder / PICTURE).write_text(self.picture, encoding="utf-8")


def of_another(folder: Path) -> bool:
    """Whether ``folder`` has a README.md that was not written here, or was changed since."""
    path = folder / CARD
    if not path.exists():
        return False
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    found = _MARK.search(text)
    return found is None or found[1] != _checksum(text[: found.start()])


def code(text: str) -> str:
    """``text``, from a file or a path, as code in a table of Markdown."""
    plain = " ".join(printable(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
