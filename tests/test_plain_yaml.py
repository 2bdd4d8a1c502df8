"""YAML is read as people mean it, and what a stranger's file could do is bounded."""

import math

import pytest

from qgalore import plain_yaml

BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 4)}]\n" for i in range(1, 30))
CHAIN = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{y: *a{i - 1}}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E6", -2e6),
        ("1_000", 1000),
        ("0x1f", 31),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("010", "010"),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90
        ("2024-01-05", "2024-01-05"),  # a date
        ("2024-13-45", "2024-13-45"),  # a traceback
        ("off", False),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("1: 2", {"1": 2}),
        ("a: &b {l: 1e-3}\nc: {<<: *b, d: 2}", {"a": {"l": 1e-3}, "c": {"l": 1e-3, "d": 2}}),
    ],
)
def test_values(text, value):
    assert plain_yaml.read(text) == value
    assert type(plain_yaml.read(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is given twice"),
        ("1: 2\n'1': 3", "the key '1' is given twice"),
        ("? [x]\n: 1", "a list or a mapping stands where a key is expected"),
        ("a: &a [*a]", "contains itself"),
        ("a: !!python/object:os.system x", "the tag !!python/object:os.system is not read"),
        ("a: !!set {x}", "the tag !!set is not read"),
        ("a: !!bool perhaps", "cannot be read as bool"),
        ("a: " + "9" * 5000, "cannot be read as int"),
        ('a: "\\0"', "U+0000"),
        ('a: "\\uD800"', "U+D800"),
        ("a: \x1b[2J", "position 3"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: *nothing", "undefined alias"),
        ("[" * 5000, "levels of lists"),
        ("{" * 5000, "levels of lists"),
        (BOMB, "with its aliases written out"),
        (CHAIN, "levels of lists"),
        ("a: b\n" * 60000, "characters"),
    ],
)
def test_what_is_refused_in_one_line(text, why):
    with pytest.raises(plain_yaml.NotReadable) as error:
        plain_yaml.read(text)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_text_stays_as_it_was_typed_where_text_is_meant():
    found = plain_yaml.read("run: {name: 007, dir: no, n: 1, none: ~, list: [1, off]}", lambda path: path[-1] != "n")
    assert found == {"run": {"name": "007", "dir": "no", "n": 1, "none": None, "list": ["1", "off"]}}


def test_what_is_written_is_read_back():
    values = ["1e-5", 1e-5, "010", "1:30", "off", None, "2024-01-05", "", 1.5e300, "-1", "0o17", "é\n", True, [], {}]
    assert plain_yaml.read(plain_yaml.write({"a": values})) == {"a": values}
