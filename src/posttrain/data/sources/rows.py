"""What every reader hands out, and the reading of one row of JSON, which must be sound through and through."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from posttrain.errors import DataError

# A longer line is a damaged file or another kind of file, and reading on would fill the memory.
MAX_ROW_BYTES = 32 * 2**20
# Deeper nesting is no training row, and printing or hashing it would overflow the stack.
MAX_DEPTH = 64
MEND = "Mend or remove it; a .jsonl file holds one whole JSON object per line."


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as a source holds it. `id` is "file.jsonl:17"; `where` is the same place with the whole path."""

    id: str
    fields: dict[str, Any]
    where: str


def parse(text: bytes, where: str) -> Any:
    """One JSON value. Faults of every kind are `DataError`s that name the row."""
    try:
        return parse_text(text.decode("utf-8"), where)
    except UnicodeDecodeError as fault:
        raise not_utf8(fault, where) from None


def parse_text(text: str, where: str) -> Any:
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as fault:
        raise broken(fault, where) from None
    except RecursionError:
        raise too_deep(where) from None
    except ValueError as fault:
        raise DataError(f"{fault}.", where=where, remedy=MEND) from None
    check_value(value, text, where)
    return value


def check_value(value: Any, text: str, where: str) -> None:
    """What JSON allows and nothing after it can bear. `text` is the source of `value`, which tells where to look."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise too_deep(where)
    if "\\u" in text and "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as fault:
            raise DataError(
                f"half a character: \\u{ord(fault.object[fault.start]):04x} stands without its other half.",
                where=where,
                remedy="The text was cut inside a character: mend or remove the row.",
            ) from None


def not_utf8(fault: UnicodeDecodeError, where: str) -> DataError:
    return DataError(
        f"not UTF-8: byte 0x{fault.object[fault.start]:02x} at offset {fault.start}.",
        where=where,
        remedy="Convert the file, e.g. iconv -f latin1 -t utf-8.",
    )


def broken(fault: json.JSONDecodeError, where: str) -> DataError:
    inner = f" (line {fault.lineno})" if fault.lineno > 1 else ""
    return DataError(
        f"broken JSON at column {fault.colno}{inner}: {fault.msg}. It reads: {short(fault.doc)}",
        where=where,
        remedy=MEND,
    )


def too_deep(where: str) -> DataError:
    return DataError(f"lists and objects stand more than {MAX_DEPTH} deep inside each other.", where=where, remedy=MEND)


def too_long(what: str, where: str) -> DataError:
    return DataError(
        f"{what} is longer than {MAX_ROW_BYTES // 2**20} MiB, more than any row for training.",
        where=where,
        remedy="Check that line breaks survived and that the file is what its name says; split or remove the row.",
    )


def not_an_object(value: Any, where: str) -> DataError:
    return DataError(
        f"a row must be a JSON object, this one is {kind(value)}: {short(value)}.",
        where=where,
        remedy='Write one {"column": value} object per row.',
    )


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """The beginning of a value, fit to be printed on one line."""
    text = value[:400] if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return text if len(text) <= 80 else text[:77] + "..."


def _depth(value: Any) -> int:
    level: list[Any] = [value]
    depth = 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner: list[Iterable[Any]] = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in inner for v in part if isinstance(v, dict | list)]
    return depth


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ: of two values under one key JSON readers silently keep one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; write null where a number is missing")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
