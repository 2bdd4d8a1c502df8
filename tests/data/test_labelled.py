import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from qgalore.data.labelled import Example, LabelledTexts, Labels, read_examples
from qgalore.data.tokenizer import train_tokenizer
from qgalore.errors import ConfigError

ROWS = [('He said "no', "she left", "1"), ("a, b", "c", "0"), ("third", "row", "1")]
WANTED = [Example((a, b), label) for a, b, label in ROWS]


def write(path, kind):
    """``ROWS`` in one of the formats, with a column that nobody asked for."""
    keys = ("id", "sentence1", "sentence2", "label")
    rows = [(str(number), *row) for number, row in enumerate(ROWS)]
    if kind == "tsv":
        text = "\n".join("\t".join(row) for row in [keys, *rows])
        path.write_text("\ufeff" + text + "\n", encoding="utf-8")  # GLUE's MRPC begins with a byte order mark
    elif kind == "csv":
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [keys, *rows]]
        path.write_text("\n".join(quoted))
    elif kind == "jsonl.gz":
        lines = [json.dumps({**dict(zip(keys, row, strict=True)), "label": int(row[-1])}) for row in rows]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        columns = dict(zip(keys, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, kind):
    source = write(tmp_path / f"rows.{kind}", kind)
    assert read_examples(source, text_keys=["sentence1", "sentence2"], label_key="label") == WANTED


def test_a_table_without_names(tmp_path):
    """CoLA: the label in the second column, the sentence in the fourth."""
    path = tmp_path / "cola.tsv"
    path.write_text("gj04\t1\t\tOur friends won't.\ngj04\t0\t*\tFriends our.\n")
    found = read_examples(str(path), text_keys=["3"], label_key="1", header=False)
    assert found == [Example(("Our friends won't.",), "1"), Example(("Friends our.",), "0")]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.tsv", "sentence\tlabel\nonly one cell\n", r"line 2 has no 'label'; its keys are 'sentence'"),
        ("a.tsv", "sentence\tlabel\n", "has no rows"),
        ("a.jsonl", '{"sentence": "x"\n', "line 1 is not valid JSON"),
        ("a.jsonl", "[1]\n", "is a JSON list"),
        ("a.jsonl", '{"sentence": "x", "label": null}\n', "has no 'label'"),
        ("a.xls", "x", "convert it to one of them"),
        ("a.csv", 'sentence,label\n"x,1\ny,0\n', "line 3 is not a row of a table: unexpected end of data"),
        ("a.csv", "sentence,label\nx, and y,1\n", "line 2 has 3 cells, and the first line names 2"),
        ("a.csv", "sentence,label,label\nx,1,0\n", "names two columns 'label'"),
        ("a.jsonl", '{"sentence": ["x"], "label": 1}\n', "'sentence' is of type list"),
        ("a.jsonl", '{"sentence": "x", "label": {"is": 1}}\n', "'label' is of type dict"),
        ("a.jsonl", '{"sentence": "x", "label": NaN}\n', "'label' is not a number"),
        ("a.json", '[{"sentence": "x", "label": 1}, 2]', "item 2 is a JSON int"),
    ],
)
def test_unusable_files(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_examples(str(tmp_path / name), text_keys=["sentence"], label_key="label")


def test_a_cell_may_be_long_and_rows_may_end_in_empty_cells(tmp_path):
    text = "many words " * 50_000  # more than Python's own limit for a cell
    (tmp_path / "a.csv").write_text(f'sentence,label\n"{text}",1,,\n')
    (example,) = read_examples(str(tmp_path / "a.csv"), text_keys=["sentence"], label_key="label")
    assert example == Example((text.strip(),), "1")


def test_a_column_that_is_missing_names_those_that_are_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no 'sentence'; its keys are 'body', 'label'"):
        read_examples(str(tmp_path / "a.parquet"), text_keys=["sentence"], label_key="label")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        read_examples(str(tmp_path / "absent.tsv"), text_keys=["sentence"], label_key="label")


def test_labels():
    def of(*labels, kind="class"):
        rows = [Example(("x",), label) for label in labels]
        return Labels.of(rows, kind), rows

    assert of("10", "9", "10")[0].names == ("9", "10")
    assert of("yes", "no")[0].names == ("no", "yes")
    labels, rows = of("b", "a", "b")
    assert labels.encode(rows, "data.train").tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"data\.valid has the label 'c'"):
        labels.encode([Example(("x",), "c")], "data.valid")
    with pytest.raises(ConfigError, match="at least two"):
        of("a", "a")
    numbers, rows = of("1", "2.5", kind="number")
    assert numbers.outputs == 1
    assert numbers.encode(rows, "data.train").tolist() == [1.0, 2.5]
    for bad in ("x", "nan"):
        with pytest.raises(ConfigError, match=f"{bad!r}, which is not a number"):
            numbers.encode([Example(("x",), bad)], "data.train")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the first text and the second text"] * 4, vocab_size=270)


def test_batches_are_padded_to_their_longest(tokenizer):
    texts = [("the first text",), ("the",), ("and the second text and the first",)]
    data = LabelledTexts([Example(t, "0") for t in texts], np.array([0, 1, 0]), tokenizer, 64)
    batch = data.batch([1, 0])
    ids = [tokenizer(texts[row][0])["input_ids"] for row in (1, 0)]
    assert batch["input_ids"].shape == (2, max(map(len, ids)))
    assert batch["labels"].tolist() == [1, 0]
    for row, expected in enumerate(ids):
        mask = batch["attention_mask"][row].bool()
        assert mask.sum() == len(expected)
        assert not mask[len(expected) :].any()
        assert batch["input_ids"][row][mask].tolist() == expected
    assert data.truncated == 0
    assert data.tokens == sum(len(tokenizer(t[0])["input_ids"]) for t in texts)
    with pytest.raises(IndexError):
        data.batch([3])


def test_long_examples_are_cut_and_counted(tokenizer):
    rows = [Example(("the first text and the second", "text"), "0"), Example(("and", "the"), "1")]
    data = LabelledTexts(rows, np.array([0, 1]), tokenizer, 5)
    assert data.truncated == 1
    assert data.batch([0])["input_ids"].shape == (1, 5)


def test_the_digest_sees_texts_and_labels(tokenizer):
    def digest(text, label):
        rows = [Example((text,), "0"), Example(("other",), "1")]
        return LabelledTexts(rows, np.array([label, 1]), tokenizer, 64).digest()

    assert digest("the", 0) == digest("the", 0)
    assert len({digest("the", 0), digest("the", 1), digest("and", 0)}) == 3


def test_numbers_stay_fp32(tokenizer):
    rows = [Example(("a",), "1.5"), Example(("b",), "2")]
    data = LabelledTexts(rows, np.array([1.5, 2], dtype=np.float32), tokenizer, 8)
    assert data.batch([0, 1])["labels"].dtype == torch.float32
