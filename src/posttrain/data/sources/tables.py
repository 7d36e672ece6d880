"""Readers of typed tables: .parquet, .arrow (IPC file or stream) and folders that datasets' save_to_disk wrote.

A table gives every row every column and every object every key; what a row did not have is null there. So nulls inside
lists and objects are taken out again: a tool's `{"city": "Paris", "zip": null}` was written as `{"city": "Paris"}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 256
ARROW_FILE = b"ARROW1"


def parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    return _numbered(_parquet_batches(path), path)


def count_parquet(path: Path) -> int:
    import pyarrow.parquet as pq

    with _sound(path, lambda: 0), pq.ParquetFile(path) as file:
        return file.metadata.num_rows
    raise AssertionError("unreachable")


def arrow_rows(path: Path) -> Iterator[tuple[int, Any]]:
    return _numbered(_arrow_batches(path), path)


def count_arrow(path: Path) -> int:
    n = 0
    with _sound(path, lambda: n):
        for batch in _arrow_batches(path):
            n += batch.num_rows
    return n


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with path.open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    with pa.memory_map(str(path)) as mapped:
        if is_file:
            with pa.ipc.open_file(mapped) as table:
                for i in range(table.num_record_batches):
                    yield table.get_batch(i)
        else:
            with pa.ipc.open_stream(mapped) as stream:
                yield from stream


def _numbered(batches: Iterator[pa.RecordBatch], path: Path) -> Iterator[tuple[int, Any]]:
    done = 0
    with _sound(path, lambda: done):
        for batch in batches:
            _check_names(batch, path)
            for start in range(0, batch.num_rows, BATCH_ROWS):  # Arrow batches may hold a million rows
                for row in _python(batch.slice(start, BATCH_ROWS), path, done):
                    done += 1
                    yield done, {name: without_nulls(value) for name, value in row.items()}


def _check_names(batch: pa.RecordBatch, path: Path) -> None:
    names = batch.schema.names
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the column {twice!r} is named twice.", where=str(path), remedy="Rename one of them.")


def _python(batch: pa.RecordBatch, path: Path, done: int) -> list[dict[str, Any]]:
    """Rows as Python values, once they are known to be sound: damaged offsets would be read as addresses."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as fault:
        raise DataError(
            f"damaged: {first_line(fault)}.",
            where=f"{path}:{done + 1 + _first_broken(batch)}",
            remedy="Copy or write the file again; text in it must be UTF-8.",
        ) from None
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _first_broken(batch: pa.RecordBatch) -> int:
    import pyarrow as pa

    for i in range(batch.num_rows):
        try:
            batch.slice(i, 1).validate(full=True)
        except pa.ArrowInvalid:
            return i
    return 0


def first_line(fault: BaseException) -> str:
    return str(fault).strip().split("\n")[0].rstrip(".") or type(fault).__name__


def without_nulls(value: Any) -> Any:
    """Keys that hold null inside lists and objects, taken out."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


@contextmanager
def _sound(path: Path, done: Callable[[], int]) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as fault:
        after = f" after row {done()}" if done() else ""
        said = first_line(fault)
        raise DataError(
            f"not a whole {path.suffix.lstrip('.')} file, it breaks{after}: {said}.",
            where=str(path),
            remedy="Copy or write it again.",
        ) from None


def saved_files(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a folder that save_to_disk wrote, in order; None: it is another kind of folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json_of(folder / "dataset_dict.json").get("splits", [])
        if split not in splits:
            raise DataError(
                f"there is no split {split!r} in it.",
                where=str(folder),
                remedy=f"Set split to one of: {', '.join(map(str, splits)) or 'none'}.",
            )
        folder = folder / split
    if not (folder / "state.json").is_file():
        return None
    listed = _json_of(folder / "state.json").get("_data_files", [])
    return [folder / entry["filename"] for entry in listed]


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise DataError(f"cannot be read: {fault}.", where=str(path), remedy="Save the data set again.") from None
    return found if isinstance(found, dict) else {}
