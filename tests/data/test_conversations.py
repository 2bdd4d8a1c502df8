import gzip
import json

import pytest

from qgalore.data.conversations import conversations, messages_of
from qgalore.errors import ConfigError

TWO = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TWO, "id": 3}, TWO),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, TWO),
        ({"conversations": TWO}, TWO),
        ({"prompt": "Q", "completion": "A"}, TWO),
        ({"instruction": "Q", "output": "A"}, TWO),
        ({"instruction": "Q", "input": "", "output": "A"}, TWO),
        (
            {"instruction": "Q", "input": "R", "output": "A"},
            [{"role": "user", "content": "Q\n\nR"}, {"role": "assistant", "content": "A"}],
        ),
        ({"messages": TWO, "tools": []}, TWO),
        ({"messages": [{"role": "system", "content": "S"}, *TWO]}, [{"role": "system", "content": "S"}, *TWO]),
        ({"messages": None, "prompt": "Q", "completion": "A"}, TWO),
    ],
)
def test_layouts(row, expected):
    assert messages_of(row, "here") == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, "has the keys 'text'; a row needs 'messages'"),
        ({}, "has the keys none"),
        ({"messages": []}, "is empty; it must be a list of turns"),
        ({"messages": "hello"}, "is str; it must be a list"),
        ({"messages": ["hello"]}, "turn 1 is of type str"),
        ({"messages": [{"role": "user"}]}, "turn 1 has the keys 'role'; it needs role and content"),
        ({"messages": [*TWO, {"role": "tool", "content": "x"}]}, "turn 3 has the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 has the role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "'content' has a part of type 'image' that is no text",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "calls tools"),
        ({"messages": TWO, "tools": [{"name": "clock"}]}, "offers tools"),
        ({"prompt": 3, "completion": "A"}, "'prompt' is of type int"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "'input' is of type int"),
    ],
)
def test_other_rows_are_named_with_what_was_expected(row, expected):
    with pytest.raises(ConfigError) as error:
        messages_of(row, "'f.jsonl' line 7")
    assert "'f.jsonl' line 7" in str(error.value)
    assert expected in str(error.value)


def test_files_and_folders(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": TWO}) + "\n\n" + json.dumps({"text": 1}) + "\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "P", "completion": "C"}) + "\n")
    stream = conversations(str(tmp_path))
    assert [next(stream)[0][0]["content"] for _ in range(2)] == ["P", "Q"]
    with pytest.raises(ConfigError, match=r"b\.jsonl' line 3 has the keys 'text'"):
        next(stream)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", "hello", "an ending that is not read here; convert it to .jsonl"),
        ("x.jsonl", "[1]\n", "not an object"),
        ("x.jsonl", "\n", "it is empty"),
    ],
)
def test_files_without_conversations(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=expected):
        list(conversations(str(tmp_path / name)))
