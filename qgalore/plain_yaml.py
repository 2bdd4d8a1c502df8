"""YAML as people mean it: numbers such as ``1e-5``, no dates, no key twice, nothing that grows when it is read.

PyYAML follows YAML 1.1. There ``1e-5`` is text, ``1:30`` is the number 90, ``010`` is 8, ``2024-01-05`` is a date, and
of two equal keys the last one wins without a word. This module reads the core of YAML 1.2 instead, keeps ``yes``,
``no``, ``on`` and ``off``, and says where a file goes wrong in one line. Files may come from strangers, so length,
depth and what aliases expand to are bounded.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 18  # PyYAML reads about 100,000 in a second
MAX_DEPTH = 32  # of lists and mappings in each other
MAX_NODES = 20_000  # values, those that aliases repeat counted again

_PREFIX = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")
_BOOL = re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_READ = ("map", "seq", "str", "int", "float", "bool", "null")

Path = tuple[str, ...]


class NotReadable(ValueError):
    """The text is no YAML, or none that is read here; the message says where and why, in one line."""


class _Reader(yaml.SafeLoader):
    """PyYAML's safe reader with the types above, a bound on depth, and errors of one kind."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's registry, of this class alone)
    yaml_constructors: dict = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of lists and mappings", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # "!!bool perhaps", or an integer of 5,000 digits
            what = node.tag.removeprefix(_PREFIX)
            raise yaml.constructor.ConstructorError(
                None, None, f"this cannot be read as {what}", node.start_mark
            ) from error


def _whole_number(reader: _Reader, node: yaml.ScalarNode) -> int:
    return int(reader.construct_scalar(node).replace("_", ""), 0)


def _unread(reader: _Reader, node: yaml.Node) -> None:
    tag = node.tag.replace(_PREFIX, "!!")
    raise yaml.constructor.ConstructorError(None, None, f"the tag {tag} is not read here", node.start_mark)


_TYPES = (
    ("bool", _BOOL, "yYnNtTfFoO"),
    ("float", _FLOAT, "-+0123456789."),
    ("int", _INT, "-+0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("merge", re.compile("<<$"), "<"),
)
for _name, _pattern, _first in _TYPES:
    _Reader.add_implicit_resolver(_PREFIX + _name, _pattern, list(_first))
for _name in _READ:
    _Reader.add_constructor(_PREFIX + _name, yaml.SafeLoader.yaml_constructors[_PREFIX + _name])
_Reader.add_constructor(_PREFIX + "int", _whole_number)
_Reader.add_constructor(None, _unread)


class _Writer(yaml.SafeDumper):
    """PyYAML's safe writer, which also quotes texts that only our reader takes for a number, such as ``1e-5``."""


_Writer.add_implicit_resolver(_PREFIX + "float", _FLOAT, list("-+0123456789."))
_Writer.add_implicit_resolver(_PREFIX + "int", _INT, list("-+0123456789"))


def write(data: Any) -> str:
    """``data`` as YAML that :func:`read` gives back."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def read(text: str, is_text: Callable[[Path], bool] = lambda path: False) -> Any:
    """The value that ``text`` holds, of dictionaries, lists, texts, numbers, truth values and None. ``is_text(path)``
    says of a value, by the keys that lead to it, that it is text: ``name: 2024`` is then "2024". Raises
    :class:`NotReadable`."""
    if len(text) > MAX_CHARACTERS:
        raise NotReadable(f"it has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    reader = None
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, set())
        _settle(node, (), is_text)
        return reader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise NotReadable(_one_line(error)) from error
    except yaml.reader.ReaderError as error:
        raise NotReadable(
            f"the character at position {error.position} ({error.character!r}) may not stand in YAML"
        ) from error
    except RecursionError as error:
        raise NotReadable("its lists and mappings lie too deeply in each other") from error
    finally:
        if reader is not None:
            reader.dispose()


def _one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join((error.problem or error.context or "this is not YAML").split())


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse(node: yaml.Node, why: str) -> None:
    raise yaml.composer.ComposerError(None, None, why, node.start_mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], open_nodes: set[int]) -> tuple[int, int]:
    """(values, levels) of a node with every alias expanded. An alias costs nothing in the file, but every repetition is
    walked and copied later, so a few lines could stand for billions of values."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_nodes:
        _refuse(node, "this value contains itself")
    open_nodes.add(id(node))
    parts = [_measure(child, known, open_nodes) for child in _children(node)]
    open_nodes.discard(id(node))
    size, depth = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    if size > MAX_NODES:
        _refuse(node, f"with its aliases written out this holds more than {MAX_NODES:,} values")
    if depth > MAX_DEPTH:
        _refuse(node, f"more than {MAX_DEPTH} levels of lists and mappings")
    known[id(node)] = size, depth
    return size, depth


def _settle(node: yaml.Node, path: Path, is_text: Callable[[Path], bool]) -> None:
    """Check keys and characters below ``node``, and make text of what is to be text."""
    if isinstance(node, yaml.ScalarNode):
        _check_characters(node)
        if node.style is None and node.tag != _PREFIX + "null" and is_text(path):
            node.tag = _PREFIX + "str"
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _settle(child, path, is_text)
    else:
        _settle_mapping(node, path, is_text)


def _settle_mapping(node: yaml.MappingNode, path: Path, is_text: Callable[[Path], bool]) -> None:
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            _refuse(key, "a list or a mapping stands where a key is expected")
        if key.tag == _PREFIX + "merge":
            _settle(value, path, is_text)
            continue
        _check_characters(key)
        if key.value in seen:
            _refuse(key, f"the key {key.value!r} is given twice")
        seen.add(key.value)
        key.tag = _PREFIX + "str"
        _settle(value, (*path, key.value), is_text)


def _check_characters(node: yaml.ScalarNode) -> None:
    """No key or value needs a NUL, an escape code for terminals or half of a surrogate pair, and each breaks something
    further on: paths, the screen, writing as UTF-8."""
    for letter in node.value:
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\r\t":
            _refuse(node, f"the character U+{ord(letter):04X} may not stand in a configuration")
