"""docs/configuration.md says what the schema says, and what it shows can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from qgalore import config, plain_yaml
from qgalore.config import incompatible, messages, reading, reference
from qgalore.errors import ConfigError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
ENTRIES = {part.split("`")[0]: part for part in reference.page().split("### `")[1:]}


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


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_complete_and_its_example_is_taken(name):
    entry = ENTRIES[name].split("\n## ")[0]
    lines = [line for line in entry.splitlines()[1:] if line and not line.startswith("|")]
    assert all(line.endswith(".") for line in lines), "every line is a sentence"
    assert not lines[0].startswith("-"), "the meaning comes first"
    for part in ("- Type: ", "- Default: ", "- Example: "):
        assert sum(line.startswith(part) for line in lines) == 1

    (argument,) = shlex.split(re.search(r"- Example: `(.*)`\.", entry)[1])
    data = plain_yaml.read(reference.EXAMPLE)
    before = messages.default_of(messages.field_at(tuple(name.split("."))))
    reading._override(data, argument)
    taken = config.Config.model_validate(data)
    for part in name.split("."):
        taken = getattr(taken, part)
    assert taken is not None
    if isinstance(before, bool) or any(before == word for word in reference._literals(_annotation(name))):
        assert taken != before, "an example of a choice shows another than the default"


def _annotation(name: str):
    return messages.field_at(tuple(name.split("."))).annotation


def test_the_whole_configuration_at_the_top_is_one(tmp_path):
    shown = re.search(r"This is a whole one\.\n\n((?:    .*\n)+)", reference.page())[1]
    (tmp_path / "mine.yaml").write_text(re.sub(r"^    ", "", shown, flags=re.M))
    loaded = config.load(str(tmp_path / "mine.yaml"))
    assert (loaded.run.name, loaded.train.max_steps, loaded.train.lr) == ("mine", 1000, 0.001)


def test_only_limits_that_nobody_asks_for_are_left_out():
    assert "Type: a whole number of at least 1, or `full` or `auto`." in ENTRIES["lowrank.rank"]
    assert "Type: a number above 0 and below 0.5." in ENTRIES["data.valid_fraction"]
    assert "Type: a number above 0 and at most 100." in ENTRIES["train.lr"]
    assert "it must be a whole number from 1 to 1,099,511,627,776" in _complaint("train.max_steps=0")


def _complaint(override: str) -> str:
    data = plain_yaml.read(reference.EXAMPLE)
    reading._override(data, override)
    with pytest.raises(ConfigError) as error:
        reading.parse(data, "here")
    return str(error.value)
