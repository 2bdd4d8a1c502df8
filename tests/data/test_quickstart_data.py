import gzip
import json
from pathlib import Path

import pytest

from qgalore.data.sources import documents

FOLDER = Path(__file__).parents[2] / "configs" / "quickstart_data"


def books(name):
    with gzip.open(FOLDER / name, "rt", encoding="utf-8") as file:
        return {json.loads(line)["book"] for line in file}


@pytest.mark.parametrize(
    ("name", "count", "smallest", "largest"),
    [("train.jsonl.gz", 385, 3_500_000, 4_500_000), ("valid.jsonl.gz", 10, 100_000, 140_000)],
)
def test_sizes(name, count, smallest, largest):
    texts = list(documents(str(FOLDER / name)))
    assert len(texts) == count
    assert smallest < sum(len(text.encode()) for text in texts) < largest
    assert (FOLDER / name).read_bytes()[4:8] == bytes(4), "gzip must carry no time, to be reproducible"


def test_validation_books_are_not_trained_on():
    train, valid = books("train.jsonl.gz"), books("valid.jsonl.gz")
    assert len(train) == 5
    assert valid == {"36_the_war_of_the_worlds", "84_frankenstein_or_the_modern_prometheus"}
    assert not train & valid


def test_documents_have_the_gutenberg_licence_text_removed():
    for name in ("train.jsonl.gz", "valid.jsonl.gz"):
        assert not any("gutenberg" in text.lower() for text in documents(str(FOLDER / name)))
