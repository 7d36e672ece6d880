"""Single rows found again in the ledgers that finished and started stages left behind."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.data.ledger import ROWS
from posttrain.errors import DataError

LEDGERS = (ROWS, "rows-eval.jsonl")
SHOWN = 5


@dataclass(frozen=True, slots=True)
class StageLedger:
    """One ledger; `stage` is "RUN/STAGE"."""

    stage: str
    path: Path


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a row ended in one stage."""

    stage: str
    bucket: str
    reason: str


@dataclass
class _Known:
    """What the ids in the ledgers look like: for each source its lowest and highest number."""

    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, row_id: str) -> None:
        source, _, number = row_id.rpartition(":")
        if number.isdecimal():
            low, high = self.numbers.get(source, (int(number), int(number)))
            self.numbers[source] = (min(low, int(number)), max(high, int(number)))

    def suggest(self, row_id: str) -> str:
        source, _, number = row_id.rpartition(":")
        if source in self.numbers:
            low, high = self.numbers[source]
            return f"{source} has rows {low} to {high}, though perhaps not each of them."
        listed = list(self.numbers)
        close = difflib.get_close_matches(source or row_id, listed, n=SHOWN, cutoff=0.5) or listed[:SHOWN]
        asked = number if source and number.isdecimal() else ""
        return "Did you mean " + " or ".join(f"{name}:{asked or self.numbers[name][0]}" for name in close) + "?"


def ledgers(home: Path, run: str | None = None) -> list[StageLedger]:
    """The ledgers below a home, oldest first; those of artefacts whose run directory is gone, too."""
    found: dict[tuple[str, str], list[Path]] = {}
    for folder in ("runs", "artefacts"):
        for stage in sorted((home / folder).glob("*/*")):
            paths = [stage / name for name in LEDGERS if (stage / name).exists()]
            if paths:
                found.setdefault((stage.parent.name, stage.name), paths)
    wanted = {key: paths for key, paths in found.items() if run in (None, key[0])}
    if not wanted:
        runs = sorted({name for name, _ in found})
        raise DataError(
            f"no stage of {run} has a ledger of its rows." if runs else "no stage has left a ledger of its rows.",
            where=str(home),
            remedy=f"There are: {', '.join(runs)}." if runs else "Run a recipe first, or name its home with --home.",
        )
    ordered = sorted(wanted.items(), key=lambda item: item[1][0].stat().st_mtime)
    return [StageLedger("/".join(key), path) for key, paths in ordered for path in paths]


def look_up(row_id: str, where: Sequence[StageLedger]) -> list[Seen]:
    """Every stage that met the row. An id nobody knows is refused, with what is near it."""
    known = _Known()
    found = [seen for ledger in where for seen in _entries(row_id, ledger, known)]
    if not found:
        raise DataError(f"no stage has met a row {row_id}.", remedy=known.suggest(row_id) if known.numbers else "")
    return found


def _entries(row_id: str, ledger: StageLedger, known: _Known) -> Iterator[Seen]:
    with ledger.path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                raise DataError(
                    "is no entry of a ledger; the file was cut or edited.",
                    where=f"{ledger.path}:{number}",
                    remedy="Run the stage again: it writes its ledger anew.",
                ) from None
            known.add(entry["id"])
            if entry["id"] == row_id:
                yield Seen(ledger.stage, entry["bucket"], entry["reason"])
