"""What a person sees while something runs: a live bar on a terminal, plain lines anywhere else. Torch-free."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_EVERY_S = 10.0  # a plain progress line at most this often


class Reporter:
    """Lines and progress to one stream (stderr, so that stdout stays for results)."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._console: Any = None
        if not quiet and self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False)

    def line(self, text: str = "") -> None:
        if self._quiet:
            return
        if self._console is not None:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Task]:
        """Progress of `total` steps (None: nobody knows) of which `done` were done before (a resumed run)."""
        if self._console is None:
            yield Task(label, total, done, self.line)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            bar_id = bar.add_task(label, total=total, completed=done, note="")
            yield Task(label, total, done, None, lambda n, note: bar.update(bar_id, completed=n, note=note))


class Task:
    """One running count with its estimate of the time left."""

    def __init__(self, label: str, total: int | None, done: int, line: Any = None, live: Any = None) -> None:
        self._label, self._total, self._first = label, total, done
        self._line, self._live = line, live
        self._started = self._last_line = time.monotonic()

    def update(self, done: int, values: Mapping[str, str] = {}) -> None:
        """`values` are the figures that matter, already formatted."""
        now = time.monotonic()
        note = "  ".join([*(f"{k} {v}" for k, v in values.items()), self._eta(done, now)]).strip()
        if self._live is not None:
            self._live(done, note)
        elif self._line is not None and (now - self._last_line >= PLAIN_EVERY_S or done == self._total):
            of_total = "" if self._total is None else f"/{self._total}"
            self._line(f"{self._label} {done}{of_total}  {note}".rstrip())
            self._last_line = now

    def _eta(self, done: int, now: float) -> str:
        fresh = done - self._first
        if fresh <= 0 or self._total is None or done >= self._total:
            return f"{now - self._started:.0f} s"
        return f"{duration((now - self._started) / fresh * (self._total - done))} left"


def duration(seconds: float) -> str:
    """Seconds for people: 8 s, 2 min 05 s, 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
