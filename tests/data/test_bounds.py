"""Sources that are odd, huge or hostile: read within bounds, or refused with file and line."""

import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qgalore.data import opening
from qgalore.data.notes import Notes
from qgalore.data.opening import Unfinished, in_pieces
from qgalore.data.sources import documents, rows
from qgalore.data.tokenizer import train_tokenizer
from qgalore.data.tokens import tokenize_to_disk
from qgalore.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the sea and the land, the old sea "] * 20, vocab_size=290, report=lambda line: None)


def made_of(path, tokenizer, **options):
    lines = []
    options = {"cache_dir": path.parent / "cache", "report": lines.append, **options}
    return tokenize_to_disk(str(path), tokenizer, **options), lines


def test_a_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch):
    text = "the sea\nand the old land " * 40
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "the end"}) + "\n")
    whole, _ = made_of(tmp_path / "a.jsonl", tokenizer)
    monkeypatch.setattr(opening, "PIECE", 50)
    monkeypatch.setattr(opening, "_SEARCHED", 40)
    parts, _ = made_of(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "other")
    assert parts.offsets.tolist() == whole.offsets.tolist()
    assert parts.n_documents == 2
    assert np.array_equal(parts.tokens, whole.tokens)
    cut, _ = made_of(tmp_path / "a.jsonl", tokenizer, max_tokens=20)
    assert np.array_equal(cut.tokens, whole.tokens[:20])
    assert cut.offsets.tolist() == [0, 20]


def test_pieces_are_all_of_the_text(monkeypatch):
    monkeypatch.setattr(opening, "PIECE", 10)
    for chunks in (["abc def ghi jkl mno"], ["x" * 35], ["ab", "", "cdefghij klmn op"], [""]):
        pieces = list(in_pieces(chunks))
        assert "".join(pieces) == "".join(chunks)
        assert max(map(len, pieces)) <= 10
        assert [isinstance(piece, Unfinished) for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_a_long_text_is_not_read_beyond_max_tokens(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the old sea " * 3_000_000)
    made_of(tmp_path / "a.txt", tokenizer, max_tokens=10)  # what is loaded once
    tracemalloc.start()
    made, _ = made_of(path, tokenizer, max_tokens=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made.tokens) == 1000
    assert peak < 60e6, f"{peak:,} bytes for a file of {path.stat().st_size:,}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(opening, "MAX_LINE", 1000)
    data = (json.dumps({"text": "x" * 900}) + "\n" + json.dumps({"text": "y" * 1000}) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    stream = documents(str(tmp_path / name))
    assert next(stream) == "x" * 900
    with pytest.raises(ConfigError, match=r"line 2 is longer than"):
        next(stream)


def test_what_expands_without_end_is_refused(tmp_path):
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress((b" " * 9_999 + b"\n") * 1000))
        with pytest.raises(ConfigError, match=r"expands to more than"):
            list(documents(str(tmp_path / name)))
    text = b"".join(b"line %d of a table that repeats itself\n" % n for n in range(120_000))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    assert "".join(documents(str(tmp_path / "b.txt.gz"))).encode() == text


def test_lone_surrogates_are_replaced_and_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a \\ud83d b \\ude00 c \\ud83d\\ude00"}\n')
    stream = documents(str(path))
    assert list(stream) == ["fine", "a \ufffd b \ufffd c \U0001f600"]
    (line,) = stream.notes.lines()
    assert "2 lone surrogates" in line
    assert "line 2" in line
    _, said = made_of(path, tokenizer)
    _, again = made_of(path, tokenizer)
    for lines in (said, again):  # what was noticed is said as often as the tokens are used
        assert any("2 lone surrogates" in one for one in lines)


def test_numbers_of_thousands_of_digits(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "1" * 5000 + "}\n")
    with pytest.raises(ConfigError, match="line 1 is not valid JSON"):
        list(documents(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "A.JSON", "a.json.gz"])
def test_json_arrays(tmp_path, name, indent, monkeypatch):
    monkeypatch.setattr("qgalore.data.jsons.CHUNK", 7)
    monkeypatch.setattr("qgalore.data.opening.CHUNK", 7)
    wanted = [{"text": f"number {n} ] , [ ß", "n": n} for n in range(5)]
    text = json.dumps(wanted, indent=indent, ensure_ascii=False).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert [row for row, _ in rows(str(tmp_path / name))] == wanted
    assert list(documents(str(tmp_path / name))) == [row["text"] for row in wanted]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[{"text": "x"}', "lacks a comma or the end of the array after item 1"),
        ('[{"text": "x"} {"text": "y"}]', "lacks a comma"),
        ('[{"text": "x"}, {"text": ]', "item 2 is not valid JSON"),
        ('[{"text": "x"}] more', "goes on after the end"),
        ('[{"text": "x"}, 5]', "item 2 is a JSON int, not an object"),
        ("[" * 100_000, "item 1 is not valid JSON"),
        ('{"data":\n [{"text": "x"}]}', "must be one array of rows"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_broken_json_files(tmp_path, text, complaint):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        list(documents(str(tmp_path / "a.json")))


def test_lines_in_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert list(documents(str(tmp_path / "a.json"))) == ["x", "y"]


def test_what_a_folder_has_beside_texts_is_said(tmp_path, tokenizer):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.TXT", "c.md", "deep/d.pdf", ".hidden.txt"):
        (tmp_path / "in" / name).write_text(f"the sea of {name}")
    (tmp_path / "in" / "deep" / "loop").symlink_to(tmp_path / "in")
    stream = documents(str(tmp_path / "in"))
    assert list(stream) == ["the sea of a.txt", "the sea of b.TXT"]
    (line,) = stream.notes.lines()
    assert "2 (c.md, deep/d.pdf) and 1 hidden ones" in line
    _, said = made_of(tmp_path / "in", tokenizer)
    assert any("c.md" in one for one in said)


def test_parquet_rows_with_lists_of_turns(tmp_path):
    turns = [[{"role": "user", "content": "a", "weight": None}, {"role": "assistant", "content": "b", "weight": 1}]]
    pq.write_table(pa.table({"messages": turns * 3}), tmp_path / "a.parquet")
    found = list(rows(str(tmp_path / "a.parquet"), notes=Notes()))
    assert [row["messages"] for row, _ in found] == turns * 3
    assert "row 3" in found[-1][1]


def test_a_value_that_repeats_is_not_multiplied_in_memory(tmp_path):
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 2000, ["the sea " * 12_500])})
    pq.write_table(table, tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    stream = documents(str(tmp_path / "a.parquet"))
    for _ in range(1500):
        assert len(next(stream)) == 100_000
        assert pa.total_allocated_bytes() - before < 30e6


def test_special_strings_in_documents_are_counted_or_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "the <|endoftext|> sea"}\n{"text": "the sea"}\n' * 3)
    made, lines = made_of(tmp_path / "a.jsonl", tokenizer)
    assert any("'<|endoftext|>' 3 times" in line and "split_special_tokens" in line for line in lines)
    assert (np.asarray(made.tokens) == tokenizer.eos_token_id).sum() == 9
    tokenizer.save_pretrained(tmp_path / "t")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": True}))
    from qgalore.data.tokenizer import load_tokenizer

    made, lines = made_of(tmp_path / "a.jsonl", load_tokenizer(str(tmp_path / "t")))  # the remedy, as it is printed
    assert (np.asarray(made.tokens) == tokenizer.eos_token_id).sum() == 6
    assert not any("<|endoftext|>" in line for line in lines)
