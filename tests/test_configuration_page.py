"""docs/configuration.md says what the schema says."""

from pathlib import Path

from qgalore.config import incompatible, messages, reference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference.page(), (
        "write it again: python -m qgalore.config.reference > docs/configuration.md"
    )


def test_every_key_has_an_entry_and_every_conflict_a_key():
    page = reference.page()
    names = [name for name, _ in iter(messages.keys())]
    assert [line.strip("# `") for line in page.splitlines() if line.startswith("### ")] == sorted(
        names, key=lambda name: ("." in name, names.index(name))
    )
    assert {key for conflict in incompatible.TABLE for key in conflict.keys} <= set(names)
