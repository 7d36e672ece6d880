"""Data sets of the Hub, through `datasets`; also local folders that only it understands. Imported on use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.data.sources.tables import first_line, without_nulls
from posttrain.errors import DataError
from posttrain.network import go_offline_if_unreachable
from posttrain.settings import DatasetSettings

# A streamed data set cannot be shuffled as a whole: rows are drawn from a buffer of so many.
SHUFFLE_BUFFER = 10_000


def load_dataset(path: str, **asked: Any) -> Any:
    from datasets import load_dataset as load

    if not Path(path).is_dir():
        go_offline_if_unreachable()
    return load(path, **asked)


def load(dataset: DatasetSettings, path: str) -> Any:
    """A `Dataset`, or an `IterableDataset` for `streaming: true`. Everything `datasets` raises becomes one sentence."""
    asked = dict(name=dataset.name, split=dataset.split, revision=dataset.revision, streaming=dataset.streaming)
    try:
        return load_dataset(path, **asked)
    except Exception as fault:  # network, Hub, cache, builder: `datasets` passes on whatever it meets
        lost = "" if Path(path).is_dir() else "It is no file here. "
        raise DataError(
            f"datasets cannot load it (split {dataset.split}): {first_line(fault)}.",
            where=dataset.path,
            remedy=f"{lost}Correct path, name, split or revision; without a network, download it first.",
        ) from None


def rows(loaded: Any, dataset: DatasetSettings) -> Iterator[tuple[int, Any]]:
    if dataset.streaming and dataset.shuffle_seed is not None:
        loaded = loaded.shuffle(seed=dataset.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    number = 0
    try:
        for number, row in enumerate(loaded, start=1):
            yield number, {name: without_nulls(value) for name, value in row.items()}
    except Exception as fault:
        raise DataError(
            f"datasets fails after row {number}: {first_line(fault)}.",
            where=dataset.path,
            remedy="Try again, or download it first.",
        ) from None


def content_hash(loaded: Any) -> str:
    """Of the Arrow files `datasets` keeps of it; of its rows where it keeps none."""
    digest = hashlib.sha256(str(len(loaded)).encode())  # a slice of a split has the files of the whole
    for entry in loaded.cache_files:
        with Path(entry["filename"]).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if not loaded.cache_files:
        for row in loaded:
            digest.update(row_bytes(row))
    return digest.hexdigest()


def row_bytes(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, default=str).encode() + b"\n"
