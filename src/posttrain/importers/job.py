"""One import under way: the file's keys on one side, the recipe on the other, and the way keys cross."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.importers.draft import Draft, Item, dataset_fits, first_fitting, top_fits
from posttrain.importers.ledger import Added, Ledger, is_off
from posttrain.recipe.faults import show
from posttrain.recipe.yaml_lines import KeyPath, key_name
from posttrain.settings import DatasetSettings

ROWS_FILE = re.compile(r".*\.(jsonl?|jsonl\.gz|csv|tsv|txt|parquet|arrow)", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SLICED = re.compile(r"([\w.-]+)(?:\[:(\d+)\])?")
NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Job:
    """What the converters of one tool work on. `folders`: where the tool may have looked for relative paths."""

    tool: str
    ledger: Ledger
    draft: Draft
    folders: tuple[Path, ...]
    out_folder: Path
    processes: int | None = None
    added: list[Added] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def get(self, *path: str | int, default: Any = None) -> Any:
        return self.ledger.get(*path, default=default)

    def number(self, *path: str | int, default: float | None = None) -> float | None:
        """A number, also one that YAML 1.1 leaves as text ("1e-4"); the default where there is none to read."""
        try:
            return float(self.get(*path))
        except (TypeError, ValueError):
            return default

    def move(self, path: KeyPath, ours: str, value: Any = None, *, remedy: str = "") -> bool:
        """Carry a key to the stage, or say why the stage does not take it."""
        value = self.get(*path) if value is None else value
        fitted, refusal = self.draft.fitting(ours, value)
        if refusal:
            self.ledger.lost(path, remedy or f"{self.draft.method} stages do not take it: {refusal}")
            return False
        self.draft.put(ours, fitted, self.origin(path))
        self.ledger.carried(path, ours, fitted)
        return True

    def add(self, ours: str, value: Any, why: str) -> None:
        """A stage key that the file does not say; left out where this version has no such key."""
        fitted, refusal = self.draft.fitting(ours, value)
        if not refusal and not self.draft.has(ours):
            self.draft.put(ours, fitted, why)
            self.added.append(Added(ours, fitted, why))

    def move_top(self, path: KeyPath, ours: str, value: Any) -> bool:
        if not top_fits(ours, value):
            self.ledger.lost(path, f"set {ours} in the recipe; {show(value)} does not fit there.")
            return False
        self.draft.top[ours] = Item(value, self.origin(path))
        self.ledger.carried(path, ours, value)
        return True

    def not_needed(self, keys: str | Iterable[KeyPath], why: str) -> None:
        """Keys that are not needed here; words for keys at the top of the file."""
        for path in _paths(keys):
            self.ledger.not_needed(path, why)

    def lost(self, keys: str | Iterable[KeyPath], remedy: str) -> None:
        """Keys that cannot be carried. One that is off takes nothing away."""
        for path in _paths(keys):
            if is_off(self.get(*path)):
                self.ledger.not_needed(path, "is off")
            else:
                self.ledger.lost(path, remedy)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def origin(self, path: KeyPath) -> str:
        line = self.ledger.line(path)
        return f"{key_name(path)}, line {line}" if line else key_name(path)

    def apply(self, tables: Tables) -> None:
        """Settle by table what no converter has settled."""
        for path in self.ledger.open_keys():
            key = str(path[0])
            if len(path) == 1 and self.get(key) is None and key in tables.known:
                self.ledger.not_needed(path, "is empty")
            elif key in tables.same:
                self.move(path, tables.same[key])
            elif key in tables.unneeded:
                self.ledger.not_needed(path, tables.unneeded[key])
            elif key in tables.missing:
                self.lost([path], tables.missing[key])
            elif key in tables.known and self.get(*path) is None:
                self.ledger.not_needed(path, "is empty")
            elif len(path) == 1 and key in tables.handled:
                self.lost([path], f"{self.draft.method} stages do not read it, or not with this value.")
            else:
                what = f"not a key of {self.tool} that this importer knows"
                self.ledger.lost(path, f"{what}. See `posttrain schema` for what a recipe may hold.")


@dataclass(frozen=True)
class Tables:
    """Keys that need no thought. `handled`: the ones a converter looks at, which may also stand there empty."""

    same: Mapping[str, str]
    unneeded: Mapping[str, str]
    missing: Mapping[str, str]
    handled: frozenset[str]

    @property
    def known(self) -> frozenset[str]:
        return self.handled | self.same.keys() | self.unneeded.keys() | self.missing.keys()

    def __or__(self, other: Tables) -> Tables:
        return Tables(
            {**self.same, **other.same},
            {**self.unneeded, **other.unneeded},
            {**self.missing, **other.missing},
            self.handled | other.handled,
        )


def by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """{"why": "key key"} as {key: why}."""
    return {key: why for why, keys in reasons.items() for key in keys.split()}


def _paths(keys: str | Iterable[KeyPath]) -> list[KeyPath]:
    return [(key,) for key in keys.split()] if isinstance(keys, str) else list(keys)


# Data sets


def hub_is_read() -> bool:
    """Whether recipes may name data sets of the Hub."""
    return "split" in DatasetSettings.model_fields


def place(job: Job, path: str, folders: tuple[Path, ...] | None = None) -> tuple[str, bool]:
    """The path as the recipe must write it, and whether it names a data set of the Hub rather than a file."""
    if path.startswith("~") or Path(path).is_absolute():
        return path, False
    candidates = [folder / path for folder in folders or job.folders]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None and (path.startswith(".") or ROWS_FILE.fullmatch(path)):
        found = candidates[0]  # where the tool would look; `check` will say that it is not there
    if found is not None:
        return _relative(found, job.out_folder), False
    return path, HUB_NAME.fullmatch(path) is not None


def put_model(job: Job, key: str) -> None:
    """A folder on disk, written so that it is read as one, or a model of the Hub."""
    model = job.get(key)
    if not isinstance(model, str):
        job.lost(key, "set model in the recipe.")
        return
    folder = next((folder / model for folder in job.folders if (folder / model).is_dir()), None)
    if folder is not None and not model.startswith(("/", "~")):
        near = _relative(folder, job.out_folder)
        model = near if near.startswith(".") else f"./{near}"
    job.move_top((key,), "model", model)


def _relative(found: Path, folder: Path) -> str:
    return Path(os.path.relpath(found.resolve(), folder.resolve())).as_posix()


def new_dataset(
    job: Job, at: KeyPath, name: str, *, held_out: bool = False, folders: tuple[Path, ...] | None = None
) -> dict[str, Item]:
    """Begin an entry of datasets or eval_datasets with the file or Hub data set that `at` names."""
    path, on_hub = place(job, name, folders)
    entry = {"path": Item(path, job.origin(at))}
    (job.draft.eval_datasets if held_out else job.draft.datasets).append(entry)
    if on_hub and not hub_is_read():
        job.ledger.lost(
            at, f"data sets of the Hub are not read: save {path} as .jsonl and write that file as the path."
        )
    else:
        job.ledger.carried(at, "eval_datasets.path" if held_out else "datasets.path", path)
    return entry


def is_file(entry: Mapping[str, Item]) -> bool:
    """A file on disk holds one set of rows: split, name and revision mean nothing for it."""
    path = str(entry["path"].value)
    return path.startswith((".", "/", "~")) or ROWS_FILE.fullmatch(path) is not None


def put_dataset(job: Job, entry: dict[str, Item], at: KeyPath, key: str, value: Any, remedy: str = "") -> bool:
    """Carry a key of a data set, or say why not."""
    if not dataset_fits(key, value):
        refusal = first_fitting(DatasetSettings, key, [value])[1]
        job.ledger.lost(at, remedy or f"data sets do not take it: {refusal}")
        return False
    entry[key] = Item(value, job.origin(at))
    job.ledger.carried(at, f"datasets.{key}", value)
    return True


def put_hub_key(job: Job, entry: dict[str, Item], at: KeyPath, key: str) -> None:
    """name, split or revision of a Hub data set."""
    value = job.get(*at)
    if not job.ledger.open(at) or value is None:
        return
    if is_file(entry):
        job.ledger.not_needed(at, "a file holds one set of rows")
        return
    sliced = SLICED.fullmatch(str(value)) if key == "split" else None
    if key == "split" and sliced is None:
        job.ledger.lost(at, f"{value}: name a whole split and set limit, or cut the file.")
    elif sliced and sliced.group(2):
        if put_dataset(job, entry, at, "limit", int(sliced.group(2))) and sliced.group(1) != "train":
            entry["split"] = Item(sliced.group(1), job.origin(at))
    else:
        put_dataset(job, entry, at, key, value, f"save that {key} of the data set as .jsonl and name the file.")


def put_columns(job: Job, entry: dict[str, Item], columns: Mapping[str, tuple[str, KeyPath]]) -> None:
    """`columns`: our name: (the file's column, the key that says so). Names that are equal need no entry."""
    written = {ours: theirs for ours, (theirs, _) in columns.items() if ours != theirs}
    for ours, (theirs, at) in columns.items():
        if at and ours == theirs:
            job.ledger.not_needed(at, f"{ours} is read from the column of that name")
        elif at:
            job.ledger.carried(at, f"datasets.columns.{ours}", theirs)
    if written:
        said = [job.origin(at) for ours, (theirs, at) in columns.items() if at and ours != theirs]
        entry["columns"] = Item(written, "; ".join(said) or "the columns of this format in the other tool")


def recipe_name(text: str) -> str:
    return NAME.sub("-", text).strip("-._") or "imported"
