"""Text whose tokens the disk has no room for is refused before it is tokenized, and only then."""

import gzip
import json
import random
import re
from collections import namedtuple

import pytest

from qgalore.data import room
from qgalore.data.tokenizer import train_tokenizer
from qgalore.data.tokens import tokenize_to_disk
from qgalore.errors import ConfigError

TEXT = "The hen met a fox, and the fox met a dog. " * 400
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=280, report=lambda line: None)


@pytest.fixture
def read(tokenizer, tmp_path, monkeypatch):
    """A function (source, free bytes, …) → the tokens that were written; files of 1 KB count as large."""
    monkeypatch.setattr(room, "LARGE", 1000)
    monkeypatch.setattr(room, "SAMPLE", 4000)

    def read(source, free, **how):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: Usage(0, 0, free))
        cache = tmp_path / f"cache-{free}"
        made = tokenize_to_disk(str(source), tokenizer, cache_dir=cache, report=lambda line: None, **how)
        return len(made.tokens)

    return read


def files(folder):
    (folder / "a.txt").write_text(TEXT)
    rows = [json.dumps({"id": n, "other": "x" * 50, "story": TEXT[:160]}) for n in range(100)]
    (folder / "b.jsonl").write_text("\n".join(rows))
    with gzip.open(folder / "c.txt.gz", "wt") as file:
        file.write("".join(random.Random(0).choices("the fox and a dog", k=4000)))


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl"])
def test_the_estimate_is_what_is_written(read, tmp_path, name):
    files(tmp_path)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / name, 10, text_key="story")
    told = str(error.value)
    expected = int(re.search(r"about ([\d,]+) tokens", told)[1].replace(",", ""))
    tokens = read(tmp_path / name, 10**9, text_key="story")
    assert abs(expected - tokens) < 0.05 * tokens
    assert "of 2 bytes each, and 0.0 GB are free" in told
    assert "data.max_tokens to at most 4, free some space, or set data.cache_dir" in told
    assert "gzipped" not in told


def test_only_what_surely_does_not_fit_is_refused(read, tmp_path):
    files(tmp_path)
    tokens = read(tmp_path / "a.txt", 10**9)
    assert read(tmp_path / "a.txt", int(tokens * 1.1)) == tokens  # two bytes each; half of them would have room
    with pytest.raises(ConfigError, match=r"Set data\.max_tokens to at most"):
        read(tmp_path / "a.txt", int(tokens * 0.9))
    # what the message says works
    assert read(tmp_path / "a.txt", int(tokens * 0.9) + 1, max_tokens=int(tokens * 0.4)) == int(tokens * 0.4)


def test_zipped_files_are_said_to_be_guessed(read, tmp_path):
    files(tmp_path)
    with pytest.raises(ConfigError, match="gzipped ones being taken to hold 3 times their size"):
        read(tmp_path / "c.txt.gz", 1)


def test_small_files_and_what_is_not_known_are_read(read, tmp_path, monkeypatch):
    files(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps([{"text": TEXT}]))
    assert read(tmp_path / "d.json", 2)
    monkeypatch.setattr(room, "LARGE", 10**6)
    assert read(tmp_path / "a.txt", 1)


def test_lines_that_are_no_rows_are_the_readers_to_name(read, tmp_path):
    (tmp_path / "e.jsonl").write_text("[1]\nnothing\n" + json.dumps({"text": TEXT}) + "\n")
    with pytest.raises(ConfigError, match="line 1 is a JSON list"):
        read(tmp_path / "e.jsonl", 10**9)
