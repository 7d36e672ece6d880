"""Rows to trees on disk, as a stream: screened, rendered in one process or several, and entered in the ledger.

No more than a few handfuls of rows are in memory at a time. How many processes there are, and where the stream is cut
for them, cannot be seen in what is written.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from posttrain.data.formats import Dropped
from posttrain.data.job import Job, Rendered, render_rows
from posttrain.data.ledger import ROWS, Bucket, Counts, Entry, Ledger, Lost
from posttrain.data.length import Lengths, Overflow
from posttrain.data.render import Renderer
from posttrain.data.store import TreeWriter
from posttrain.data.worker import Workers
from posttrain.errors import DataError
from posttrain.records import Row, Task

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 1 << 20  # rows may be books
AHEAD = 2  # chunks per process that are under way
# As long as one process takes a moment, others are not worth starting.
ALONE_S = 1.5
PREPARED = "prepared.json"

Chunk = list[Row | Lost]


class Verdict(Protocol):
    """A row is taken out: the bucket it ends in, and what the ledger says of it. `Entry` is one."""

    @property
    def bucket(self) -> Bucket: ...
    @property
    def reason(self) -> str: ...


class Screen(Protocol):
    """Takes rows out of the stream, e.g. those that hold evaluation items, or changes them.

    Yields each item it is given, in order, with the verdict on it; None: it stays. Items that are no rows (a `Lost`)
    pass through.
    """

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Verdict | None]]: ...

    def notes(self) -> Sequence[str]:
        """Lines for the user, once the stream has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Summary:
    """prepared.json: what is known of prepared rows without reading them."""

    counts: Counts
    n_trees: int
    n_tokens: int
    n_answers: int
    n_ending: int  # answers whose last token stops the sampler and carries loss
    notes: tuple[str, ...]
    first_id: str = ""
    lengths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # percentiles of tokens

    def write(self, directory: Path, **more: Any) -> None:
        stored = asdict(self) | {"counts": self.counts.as_dict()} | more
        (directory / PREPARED).write_text(json.dumps(stored, ensure_ascii=False, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> tuple[Summary, dict[str, Any]]:
        """The summary, and what was stored beside it."""
        stored = json.loads((directory / PREPARED).read_text(encoding="utf-8"))
        known = {name: stored.pop(name) for name in cls.__dataclass_fields__}
        known |= {"counts": Counts.from_dict(known["counts"]), "notes": tuple(known["notes"])}
        return cls(**known), stored


class Progress(Protocol):
    def __call__(self, n_rows: int, n_tokens: int, n_processes: int) -> None: ...


def prepare(
    rows: Iterable[Row | Dropped],
    screens: Sequence[Screen],
    renderer: Renderer,
    job: Job,
    directory: Path,
    *,
    processes: int | None,
    progress: Progress,
) -> Summary:
    """Write the trees of `rows` and their ledger into `directory`.

    `processes` None: as many as there are cores, once the rows turn out to be worth it. Raises the DataError of the
    first row that is at fault, in the order of the rows, whatever process found it.
    """
    over, lengths = Overflow(), Lengths()
    n_rows = n_answers = n_ending = 0
    first_id = ""
    with ExitStack() as stack:
        ledger = Ledger(stack.enter_context((directory / ROWS).open("w", encoding="utf-8")))
        writer = stack.enter_context(TreeWriter(directory, job.token_type))
        items: Iterator[Row | Lost] = map(_as_lost, ledger.reading(rows))
        for screen in screens:
            items = _screened(items, screen)
        crew = stack.enter_context(_Crew(renderer, job, processes))
        for chunk, done in _in_order(_chunks(items), crew):
            entries = iter(done.entries)
            for item in chunk:
                ledger.put(item.id, item.entry if isinstance(item, Lost) else next(entries))
            writer.add(done.trees)
            over += done.overflow
            lengths += done.lengths
            n_rows += len(chunk)
            n_answers += done.n_answers
            n_ending += done.n_ending
            first_id = first_id or next(iter(done.trees.ids), "")
            progress(n_rows, writer.n_tokens, crew.n)
        counts = ledger.close()
    if job.on_overflow == "error":
        over.refuse(job.max_length, n_rows, lengths)
    notes = tuple(note for screen in screens for note in screen.notes())
    return Summary(counts, writer.n_trees, writer.n_tokens, n_answers, n_ending, notes, first_id, lengths.percentiles())


def refuse_losses(counts: Counts, max_drop_rate: float) -> None:
    """Too many rows dropped, or none left."""
    counts.check_drop_rate(max_drop_rate)
    if not any(counts.buckets.get(b, 0) for b in (Bucket.TRAINED, Bucket.EVALUATED, Bucket.TRUNCATED)):
        raise DataError(
            f"none of {counts.n_rows:,} rows is left: {counts.why_dropped() or counts.summary()}.",
            remedy="Raise max_length, or give other data.",
        )


class _Crew:
    """This process, and the others once there are any."""

    def __init__(self, renderer: Renderer, job: Job, processes: int | None) -> None:
        self._renderer, self._job, self._processes = renderer, job, processes
        self._wanted = processes or _cores()
        self._others: Workers | None = None
        self._started: float | None = None

    @property
    def n(self) -> int:
        return self._others.n if self._others else 1

    def render(self, rows: Sequence[Row]) -> Future[Rendered]:
        if self._others is None and self._wanted > 1 and self._is_worth_it():
            self._others = Workers(self._wanted, self._renderer, self._job)
        if self._others is not None:
            return self._others.submit(rows)
        done: Future[Rendered] = Future()
        done.set_result(render_rows(self._renderer, self._job, rows))
        return done

    def _is_worth_it(self) -> bool:
        now = time.monotonic()
        self._started = self._started or now
        return self._processes is not None or now - self._started > ALONE_S

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._others is not None:
            self._others.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(chunks: Iterator[Chunk], crew: _Crew) -> Iterator[tuple[Chunk, Rendered]]:
    """Chunks with what became of them, in order. When the stream fails, what came before it is finished first: its
    own fault, if it has one, stands earlier in the data."""
    under_way: deque[tuple[Chunk, Future[Rendered]]] = deque()
    fault: Exception | None = None
    for chunk in _or_fault(chunks):
        if isinstance(chunk, Exception):
            fault = chunk
            break
        under_way.append((chunk, crew.render([_slim(row) for row in chunk if not isinstance(row, Lost)])))
        while len(under_way) > (AHEAD * crew.n if crew.n > 1 else 0):
            first, future = under_way.popleft()
            yield first, future.result()
    for first, future in under_way:
        yield first, future.result()
    if fault is not None:
        raise fault


def _or_fault(chunks: Iterator[Chunk]) -> Iterator[Chunk | Exception]:
    try:
        yield from chunks
    except Exception as fault:
        yield fault


def _chunks(items: Iterator[Row | Lost]) -> Iterator[Chunk]:
    chunk: Chunk = []
    n_characters = 0
    for item in items:
        chunk.append(item)
        n_characters += 0 if isinstance(item, Lost) else _characters(item)
        if len(chunk) == CHUNK_ROWS or n_characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, n_characters = [], 0
    if chunk:
        yield chunk


def _characters(row: Row) -> int:
    """About how much text there is in a row."""
    conversations = (getattr(row, name, ()) for name in ("messages", "prompt", "chosen", "rejected", "completion"))
    return len(getattr(row, "text", None) or "") + sum(len(m.content) for said in conversations for m in said)


def _slim(row: Row) -> Row:
    """What rendering needs of a row; a task's extra columns are for the rewards."""
    return replace(row, extra={}) if isinstance(row, Task) else row


def _screened(items: Iterator[Row | Lost], screen: Screen) -> Iterator[Row | Lost]:
    for item, verdict in screen(items):
        yield item if verdict is None else Lost(item.id, Entry(verdict.bucket, verdict.reason))


def _as_lost(row: Row | Dropped) -> Row | Lost:
    return Lost(row.id, Entry(Bucket.DROPPED, row.reason)) if isinstance(row, Dropped) else row
