"""Files to raw rows: .jsonl, .jsonl.gz and .json (one list). Each row keeps the line it came from."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One JSON object. `id` is "file.jsonl:17"; `where` is the same place with the whole path, for messages."""

    id: str
    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file read once: its rows, and the hash of its bytes as they lie on disk."""

    rows: tuple[RawRow, ...]
    sha256: str


def read_source(path: Path, *, label: str | None = None, limit: int | None = None) -> SourceFile:
    """Read the first `limit` rows (all by default). `label` replaces the file's name in row ids."""
    reader = next((read for suffix, read in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise DataError(
            f"cannot read {path.suffix or 'a file without a suffix'}.",
            where=str(path),
            remedy=f"Known file types: {', '.join(READERS)}.",
        )
    raw = _bytes_of(path)
    rows: list[RawRow] = []
    for number, value in islice(reader(raw, path), limit):
        where = f"{path}:{number}"
        if not isinstance(value, dict):
            raise DataError(
                f"a row must be a JSON object, this one is {_kind(value)}: {_short(value)}.",
                where=where,
                remedy='Write one {"column": value} object per row.',
            )
        rows.append(RawRow(id=f"{label or path.name}:{number}", fields=value, where=where))
    if not rows:
        raise DataError(
            "the file holds no rows.", where=str(path), remedy="Check the path, or remove it from `datasets`."
        )
    return SourceFile(rows=tuple(rows), sha256=hashlib.sha256(raw).hexdigest())


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            "no such file.", where=str(path), remedy="Paths in a recipe are relative to the recipe's folder."
        ) from None
    except OSError as fault:
        raise DataError(f"cannot be read: {fault.strerror}.", where=str(path)) from fault


def _json_lines(raw: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    # Split on \n alone: U+2028 and its like are ordinary characters inside a JSON string.
    for number, line in enumerate(raw.removeprefix(UTF8_BOM).split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{path}:{number}")


def _gzipped_json_lines(raw: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        unpacked = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(
            f"not a whole gzip file: {fault}.", where=str(path), remedy="Copy or compress it again."
        ) from fault
    yield from _json_lines(unpacked, path)


def _json_list(raw: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    value = _parse(raw.removeprefix(UTF8_BOM), str(path)) if raw.strip() else []
    if not isinstance(value, list):
        raise DataError(
            f"a .json file must hold one list of rows, this one holds {_kind(value)}.",
            where=str(path),
            remedy="Wrap the rows in [ ], or write one row a line and name the file .jsonl.",
        )
    yield from enumerate(value, start=1)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise DataError(
            f"not UTF-8: byte 0x{text[fault.start]:02x} at offset {fault.start}.",
            where=where,
            remedy="Convert the file, e.g. iconv -f latin1 -t utf-8.",
        ) from fault
    except json.JSONDecodeError as fault:
        inner = f" (line {fault.lineno})" if fault.lineno > 1 else ""
        raise DataError(
            f"broken JSON at column {fault.colno}{inner}: {fault.msg}. It reads: {_short(text.decode())}",
            where=where,
            remedy="Mend or remove it; a .jsonl file holds one whole JSON object per line.",
        ) from fault


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


READERS: dict[str, Callable[[bytes, Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _gzipped_json_lines,
    ".json": _json_list,
}
