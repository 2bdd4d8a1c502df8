"""What a reader noticed about its source that is no error: it is printed once, at the end."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_NAMES_SHOWN = 6
_HALVES = range(
    0xD800, 0xE000
)  # halves of a UTF-16 pair; alone they are no characters, and UTF-8 has no bytes for them
_REPLACE = dict.fromkeys(_HALVES, "\N{REPLACEMENT CHARACTER}")


def short(value: Any) -> str:
    """``value`` as Python writes it, cut where it would fill a screen."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def listed(names: Iterable[Any]) -> str:
    """The names of keys for a message, cut where they would fill a screen."""
    names = list(names)
    return (", ".join(map(short, names[:20])) + (", …" if len(names) > 20 else "")) or "none"


@dataclass
class Notes:
    """Counts of what was changed, ignored or left out, each with the place of the first."""

    surrogates: int = 0
    first_surrogate: str = ""
    left_out: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)  # links to files that are read anyway
    hidden: int = 0
    read: str = ""  # the endings that are read
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)  # key → (rows that have it, the first of them)
    not_learned: int = 0
    not_answers: int = 0

    def clean(self, value: Any, where: str) -> Any:
        """``value``, as JSON gives it, with U+FFFD for every half of a surrogate pair that stands alone."""
        if isinstance(value, str):
            if value.isascii() or not any(ord(character) in _HALVES for character in value):
                return value
            self.surrogates += sum(ord(character) in _HALVES for character in value)
            self.first_surrogate = self.first_surrogate or where
            return value.translate(_REPLACE)
        if isinstance(value, dict):
            return {self.clean(key, where): self.clean(item, where) for key, item in value.items()}
        if isinstance(value, list):
            return [self.clean(item, where) for item in value]
        return value

    def ignore(self, key: str, where: str) -> None:
        """Count a key whose value is not used."""
        count, first = self.ignored.get(key, (0, where))
        self.ignored[key] = (count + 1, first)

    def lines(self) -> Iterator[str]:
        if self.left_out or self.hidden:
            names = ", ".join(self.left_out[:_NAMES_SHOWN]) + (", …" if len(self.left_out) > _NAMES_SHOWN else "")
            hidden = f"{self.hidden} hidden ones" if self.hidden else ""
            listing = " and ".join(filter(None, (f"{len(self.left_out)} ({names})" if names else "", hidden)))
            yield f"files of the folder that are left out: {listing}; what is read ends in {self.read}"
        if self.linked:
            names = ", ".join(sorted(self.linked)[:_NAMES_SHOWN]) + (", …" if len(self.linked) > _NAMES_SHOWN else "")
            yield f"links to files that are read anyway are not read again: {len(self.linked)} ({names})"
        if self.surrogates:
            yield (
                f"{self.surrogates} lone surrogates, which are no characters, became U+FFFD; the first is in "
                f"{self.first_surrogate}"
            )
        if self.ignored:
            shown = sorted(self.ignored.items())
            keys = ", ".join(f"{short(key)} ({count} times)" for key, (count, _) in shown[:20])
            keys += ", …" if len(shown) > 20 else ""
            first = next(iter(self.ignored.values()))[1]
            yield f"keys that are not read: {keys}; the first stands in {first}"
        if self.not_learned:
            yield f"{self.not_learned} turns are marked as not to be learned and are no targets"
        if self.not_answers:
            yield f"{self.not_answers} turns that are no answers are marked to be learned; only answers are targets"
