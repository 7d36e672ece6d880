"""YAML that remembers its lines.

PyYAML reads YAML 1.1, where `1e-4` is text, `on` is true, `010` is eight and `1:30` is ninety. A recipe means what
it looks like, so scalars follow the core schema of YAML 1.2 instead, and a key written twice is a fault rather
than a silent win for the last one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]  # list items are counted from 0 here, from 1 in everything a user sees

INT, FLOAT, BOOL, NULL, STR = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str"))


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own interface


for _tag, _pattern, _first in (
    (BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


@dataclass(frozen=True)
class YamlFault:
    line: int
    message: str


@dataclass(frozen=True)
class Document:
    """Plain data, where each key path of it was written, and what was wrong with the writing."""

    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: tuple[YamlFault, ...] = ()

    def line_of(self, path: KeyPath) -> int:
        """The line of the nearest enclosing key that was really written."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(text: str) -> Document:
    """Read one YAML document. Faults of syntax and doubled keys are returned, not raised, to be told all at once."""
    try:
        root = _CoreLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        return Document(None, faults=(YamlFault(line, f"this is not YAML: {error.problem or error.context}."),))
    except yaml.YAMLError as error:
        return Document(None, faults=(YamlFault(1, f"this is not YAML: {error}."),))
    if root is None:
        return Document(None)
    reader = _Reader()
    data = reader.convert(root, ())
    return Document(data, reader.lines, tuple(reader.faults))


def read_value(text: str) -> Any:
    """One value as a recipe would read it, for `key=value` on the command line."""
    document = read_yaml(text)
    if document.faults:
        raise ValueError(document.faults[0].message)
    return document.data


class _Reader:
    """Turns PyYAML's node tree into plain data, noting lines and faults on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[YamlFault] = []
        self._open: set[int] = set()  # collections being read, to see an alias that contains itself

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        if id(node) in self._open:
            self.faults.append(YamlFault(line, "this alias contains itself."))
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(YamlFault(line, "a key must be a plain word."))
                continue
            key = key_node.value
            if key in found:
                first = self.lines[(*path, key)]
                self.faults.append(YamlFault(line, f"{key} is set twice in one section, first on line {first}."))
                continue
            self.lines[(*path, key)] = line
            found[key] = self.convert(value_node, (*path, key))
        return found

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        read = _SCALARS.get(node.tag)
        if read is None:
            self.faults.append(YamlFault(line, f"the tag {node.tag} is not read here; write the plain value."))
            return node.value
        try:
            return read(node.value)
        except ValueError:  # only an explicit tag gets here: `!!int many`
            self.faults.append(YamlFault(line, f"{node.value} does not fit its tag {node.tag.rsplit(':')[-1]}."))
            return node.value


def _read_int(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _read_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


_SCALARS: dict[str, Callable[[str], Any]] = {
    NULL: lambda text: None,  # noqa: ARG005
    BOOL: _read_bool,
    INT: _read_int,
    FLOAT: _read_float,
    STR: str,
}


def key_name(path: KeyPath) -> str:
    """A key path as users write it: "2-dpo.datasets.1.path". Lists count from 1."""
    words = [str(part + 1) if isinstance(part, int) else part for part in path]
    if words[0] == "stages" and len(words) >= 3:
        words[:3] = [f"{words[1]}-{words[2]}"]
    return ".".join(words)


def value_at(data: Any, path: KeyPath, default: Any = None) -> Any:
    """What plain data holds at `path`."""
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return default
    return data


def with_value(document: Document, path: KeyPath, value: Any) -> Document:
    """A copy with `value` at `path`; enclosing sections are made where missing. The new value has no line."""
    data = copy.deepcopy(document.data)
    inside = data
    for key in path[:-1]:
        if isinstance(inside, dict) and inside.get(key) is None:
            inside[key] = {}
        inside = inside[key]
    inside[path[-1]] = value
    return Document(data, _lines_outside(document, path), document.faults)


def without(document: Document, path: KeyPath) -> Document:
    """A copy in which `path` was never written."""
    data = copy.deepcopy(document.data)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return Document(data, _lines_outside(document, path), document.faults)


def _lines_outside(document: Document, path: KeyPath) -> dict[KeyPath, int]:
    return {key: line for key, line in document.lines.items() if key[: len(path)] != path}
