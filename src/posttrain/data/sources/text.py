"""Readers of text files: .jsonl, .jsonl.gz, .json (one list), .csv and .tsv. Each yields (line or row number, value).

None holds the file: one row at a time, and a bounded piece of the file beside it.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from posttrain.data.sources.rows import (
    DECODER,
    MAX_ROW_BYTES,
    broken,
    check_value,
    not_an_object,
    not_utf8,
    parse,
    short,
    too_deep,
    too_long,
)
from posttrain.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
CHUNK = 2**20
Numbered = Iterator[tuple[int, Any]]


def json_lines(path: Path) -> Numbered:
    with path.open("rb") as file:
        for number, line in _lines(file, path):
            yield number, parse(line, f"{path}:{number}")


def count_lines(path: Path) -> int:
    """Rows of a .jsonl file, without looking into them."""
    with path.open("rb") as file:
        return sum(1 for _ in _lines(file, path))


def gzipped_json_lines(path: Path) -> Numbered:
    for number, line in _unpacked(path):
        yield number, parse(line, f"{path}:{number}")


def count_gzipped_lines(path: Path) -> int:
    return sum(1 for _ in _unpacked(path))


def _lines(file: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something. Split on \\n alone: U+2028 and its like are ordinary characters inside JSON."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_long("the line", f"{path}:{number}")
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def _unpacked(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in _lines(file, path):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise DataError(
            f"not a whole gzip file, it ends or breaks after line {number}: {fault}.",
            where=str(path),
            remedy="Copy or compress it again.",
        ) from None


def json_list(path: Path) -> Numbered:
    """A list of objects, decoded one after the other from a window that moves over the file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _items(file, path)
    except UnicodeDecodeError as fault:
        raise not_utf8(fault, str(path)) from None


def _items(file: IO[str], path: Path) -> Numbered:
    window = _Window(file)
    first = window.peek()
    if not first:
        return
    if first != "[":
        raise DataError(
            f"a .json file must hold one list of rows, this one holds {_kind_of(first)}.",
            where=str(path),
            remedy="Wrap the rows in [ ], or write one row a line and name the file .jsonl.",
        )
    window.at += 1
    number = 0
    while window.peek() not in ("]", ""):
        number += 1
        yield number, window.item(f"{path}:{number}")
        if window.peek() == ",":
            window.at += 1
            if window.peek() == "]":
                raise DataError("a comma with no row after it.", where=f"{path}:{number}", remedy="Remove the comma.")
        elif window.peek() not in ("]", ""):
            raise DataError(f"no comma after row {number}.", where=f"{path}:{number}", remedy="Mend the list.")
    if window.peek() != "]":
        raise DataError(
            f"the file ends after row {number} without closing its list: it was cut.",
            where=str(path),
            remedy="Copy or write it again.",
        )
    window.at += 1
    if rest := window.peek():
        raise DataError(f"something stands after the list: {rest!r}.", where=str(path), remedy="Remove it.")


class _Window:
    """A piece of a text file; `at` is where the next value begins."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.at = 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def more(self) -> bool:
        """Drop what is behind, and take in as much again as there is (so that a long row costs linear time)."""
        self.text = self.text[self.at :]
        self.at = 0
        added = self.file.read(min(max(CHUNK, len(self.text)), MAX_ROW_BYTES + 1))
        self.text += added
        return bool(added)

    def item(self, where: str) -> Any:
        if (opening := self.peek()) != "{":
            if opening == "[":
                raise not_an_object([], where)
            raise DataError(
                f"a row must be a JSON object, this one is {_kind_of(opening)}: {short(self.text[self.at :][:60])}.",
                where=where,
                remedy='Write one {"column": value} object per row.',
            )
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as fault:
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise too_long("the row", where) from None
                if not self.more():
                    inside = json.JSONDecodeError(fault.msg, self.text[self.at :], max(0, fault.pos - self.at))
                    raise broken(inside, where) from None
            except RecursionError:
                raise too_deep(where) from None
            except ValueError as fault:
                raise DataError(f"{fault}.", where=where, remedy="Mend or remove the row.") from None
            else:
                if end - self.at > MAX_ROW_BYTES:
                    raise too_long("the row", where)
                check_value(value, self.text[self.at : end], where)
                self.at = end
                return value


def _kind_of(opening: str) -> str:
    kinds = {"{": "an object", "[": "a list", '"': "a string", "t": "a boolean", "f": "a boolean", "n": "null"}
    return kinds.get(opening, "a number" if opening in "-0123456789" else f"no JSON: it begins with {opening!r}")


def comma_separated(path: Path) -> Numbered:
    return _table(path, ",")


def tab_separated(path: Path) -> Numbered:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Numbered:
    """Cells are text, whatever they look like: "007" stays "007". The first line names the columns."""
    csv.field_size_limit(MAX_ROW_BYTES)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _check_header(header, f"{path}:1")
            line = reader.line_num + 1
            for cells in reader:
                if cells:  # a blank line
                    yield line, _cells(header, cells, f"{path}:{line}")
                line = reader.line_num + 1
    except UnicodeDecodeError as fault:
        raise not_utf8(fault, f"{path}, in or after line {line}") from None
    except csv.Error as fault:
        if "field larger than" in str(fault):
            raise too_long("a cell", f"{path}:{line}") from None
        raise DataError(f"broken table: {fault}.", where=f"{path}:{line}", remedy="Check its quotes.") from None


def _check_header(header: list[str], where: str) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"the column {twice[0]!r} is named twice.", where=where, remedy="Rename one of them.")


def _cells(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise DataError(
            f"{len(cells)} cells in a table of {len(header)} columns ({', '.join(header)}).",
            where=where,
            remedy="Put quotes around cells that hold the separator or line breaks.",
        )
    if any("\0" in cell for cell in cells):
        raise DataError("a NUL byte.", where=where, remedy="The file is damaged or no text: mend or remove the row.")
    return dict(zip(header, cells, strict=True))
