"""Mutated data: it is read, or refused with a message; nothing else happens, and nothing takes long."""

import contextlib
import gzip
import io
import json
import random
import resource
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qgalore.data.chat import PLAIN_TEMPLATE
from qgalore.data.instruct import conversations_to_disk
from qgalore.data.labelled import LabelledTexts, Labels, read_examples
from qgalore.data.tokenizer import train_tokenizer
from qgalore.data.tokens import tokenize_to_disk
from qgalore.errors import ConfigError

TEXTS = [f'The sea tells of number {n}; größer, "quoted", 🗺.' for n in range(12)]
CHATS = [
    {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:9], "weight": n % 2}],
        "system": "Be brief.",
        "history": None,
    }
    for n, text in enumerate(TEXTS)
]
# What is put in place of a value, or into the bytes.
VALUES = [
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    "",
    " ",
    "\ud83d",
    "\0",
    "<|endoftext|>",
    [],
    [[]],
    {},
    {"text": 1},
    "x" * 9999,
]
PIECES = [
    b"\xff",
    b"\0",
    b"\n",
    b"]",
    b"{",
    b'"',
    b",",
    b"\\ud83d",
    b"[" * 3000,
    b"1" * 5000,
    b"\t" * 50,
    b"\xef\xbb\xbf",
    b"",
]
BYTES_GROWN = 1 << 30


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TEXTS, vocab_size=300, report=lambda line: None)
    made.chat_template = PLAIN_TEMPLATE
    return made


def whole_files(folder):
    """The kinds of sources, each a file that is read as it is: (name, its bytes)."""
    texts = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    lines = {"t": texts, "c": CHATS}
    for key, rows in lines.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        yield f"{key}.jsonl", data
        yield f"{key}.jsonl.gz", gzip.compress(data, mtime=0)
        yield f"{key}.json", json.dumps(rows, indent=1).encode()
        pq.write_table(pa.Table.from_pylist(rows), folder / "made.parquet")
        yield f"{key}.parquet", (folder / "made.parquet").read_bytes()
    yield "t.txt", "\n".join(TEXTS).encode()
    yield "t.csv", ("text,label\n" + "".join(f'"{row["text"][:20]}",{row["label"]}\n' for row in texts)).encode()
    yield "t.tsv", ("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in texts)).encode()


def mutated(data: bytes, name: str, draw: random.Random) -> bytes:
    if name.endswith((".jsonl", ".json")) and draw.random() < 0.5:
        rows = json.loads(data) if name.endswith(".json") else [json.loads(line) for line in data.splitlines()]
        for _ in range(draw.randint(1, 3)):
            _change(rows[draw.randrange(len(rows))], draw)
        if name.endswith(".json"):
            return json.dumps(rows).encode()
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found) + 1)
        kind = draw.choice(("put", "cut", "flip", "take", "end"))
        if kind == "put":
            found[place:place] = draw.choice(PIECES)
        elif kind == "cut":
            found[place : place + draw.randint(1, 30)] = b""
        elif kind == "flip" and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == "take":
            found[place : place + 5] = draw.choice(PIECES)
        else:
            found = found[: max(place, 1)]
    return bytes(found)


def _change(value, draw: random.Random) -> None:
    """Put something else somewhere into a JSON object."""
    while isinstance(value, (dict, list)) and value:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[key], (dict, list)) and draw.random() < 0.7:
            value = value[key]
            continue
        if isinstance(value, dict) and draw.random() < 0.3:
            value[draw.choice(("weight", "train", "role", "content", "tools", "text", "\ud83d"))] = draw.choice(VALUES)
        else:
            value[key] = draw.choice(VALUES)
        return


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(path, tokenizer, cache) -> None:
    """As a run of the kind that the file is of does."""
    quiet = {"cache_dir": cache, "report": lambda line: print(line)}
    if path.name.endswith((".csv", ".tsv")):
        examples = read_examples(str(path), text_keys=["text"], label_key="label")
        labels = Labels.of(examples, "class")
        LabelledTexts(examples, labels.encode(examples, "data.train"), tokenizer, 64)
    elif path.name.startswith("c."):
        conversations_to_disk(str(path), tokenizer, sequence_length=128, **quiet)
    else:
        tokenize_to_disk(str(path), tokenizer, **quiet)


@pytest.mark.slow
def test_mutated_sources(tmp_path, tokenizer):
    draw = random.Random(14)
    files = list(whole_files(tmp_path))
    for name, data in files:
        (tmp_path / name).write_bytes(data)
        read(tmp_path / name, tokenizer, tmp_path / "cache")
    before = peak_memory()
    refused = taken = 0
    for number in range(300):
        name, data = files[number % len(files)]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(mutated(data, name, draw))
        started, said = time.monotonic(), io.StringIO()
        complaint = None
        try:
            with contextlib.redirect_stdout(said):
                read(folder / name, tokenizer, folder / "cache")
            taken += 1
        except ConfigError as error:
            complaint = str(error)
            refused += 1
        if complaint is not None:
            complaint.encode()  # it can be printed
            assert len(complaint) < 2000
            assert not list((folder / "cache").glob("*"))
        said.getvalue().encode()
        assert time.monotonic() - started < 20, f"mutation {number} of {name} took long"
    assert peak_memory() - before < BYTES_GROWN
    print(f"300 mutated sources: {taken} read, {refused} refused")
    assert min(taken, refused) > 30  # both happen
