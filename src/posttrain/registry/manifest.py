"""What an artefact is made of. manifest.json pins it: base, data, recipe, template, versions, weights, verdict."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import posttrain
from posttrain.errors import ArtefactError
from posttrain.records import ArtefactRef, GateReport
from posttrain.registry.files import MANIFEST, write_json_atomic


@dataclass(frozen=True, slots=True)
class BaseRef:
    """A model posttrain did not make: how it was named, and the hash of its weights."""

    reference: str
    sha256: str

    def __str__(self) -> str:
        return self.reference


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file as it was read."""

    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What became of the rows of one source, which begins their ids; each of them is in rows.jsonl."""

    buckets: Mapping[str, int]
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything needed to say where a model came from, and to notice that something changed.

    The path of a parent artefact is relative to the artefact's own directory, so that a home can be moved.
    """

    name: str
    version: str
    stage: str
    method: str
    parent: ArtefactRef | BaseRef
    recipe_fingerprint: str
    stage_fingerprint: str
    settings: Mapping[str, Any]  # the stage's effective settings
    seed: int
    data: Mapping[str, DataFile]
    ledger: Mapping[str, int]  # training rows per bucket
    rows: Mapping[str, SourceRows]  # the same by source
    evaluated: Mapping[str, SourceRows]  # the rows of eval_datasets
    template_fingerprint: str
    stop_token_ids: tuple[int, ...]
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    created: str  # UTC, ISO 8601
    gate: GateReport | None = None
    weights_sha256: str = ""  # this and `files` are filled in when the artefact is saved
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of what the model means: not of names, paths, dates or library versions."""
        parent = self.parent.fingerprint if isinstance(self.parent, ArtefactRef) else self.parent.sha256
        meaning = {
            "parent": parent,
            "stage": self.stage_fingerprint,
            "data": sorted((file.sha256, file.rows) for file in self.data.values()),
            "template": self.template_fingerprint,
            "weights": self.weights_sha256,
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As JSON would read it back: tuples are lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def ref(self, directory: Path) -> ArtefactRef:
        return ArtefactRef(self.name, self.version, str(directory.resolve()), self.fingerprint)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_json_atomic(directory / MANIFEST, manifest.to_json())


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json strictly. Checksums are the business of `files.verify`."""
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return from_json(raw)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError(
            "has no manifest.json, so it is not an artefact.",
            where=str(directory),
            remedy="Name a registered model or a directory that posttrain wrote.",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"is not a readable manifest: {error}.",
            where=str(path),
            remedy="It was damaged, edited or written by another posttrain; restore it or run the stage again.",
        ) from error


def from_json(raw: Any) -> Manifest:
    """Build a manifest, refusing missing, unknown and ill-typed keys at every depth with a ValueError."""
    if isinstance(raw, dict) and isinstance(raw.get("gate"), dict):  # earlier versions knew no opinions
        raw = raw | {"gate": {"opinions": []} | raw["gate"]}
    try:
        manifest = TypeAdapter(Manifest).validate_python(raw)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError("; ".join(faults)) from error
    # Nested records do not refuse unknown keys by themselves; whatever does not survive the round trip was unknown,
    # missing or coerced.
    changed = _first_difference(raw, manifest.to_json())
    if changed:
        raise ValueError(f"{changed}: unknown, missing or of the wrong type")
    return manifest


def _first_difference(raw: Any, read: Any, where: str = "") -> str:
    if isinstance(raw, dict) and isinstance(read, dict):
        for key in raw.keys() ^ read.keys():
            return f"{where}.{key}".lstrip(".")
        return next((d for k in raw if (d := _first_difference(raw[k], read[k], f"{where}.{k}"))), "")
    return "" if raw == read else where.lstrip(".")


def now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def current_versions() -> dict[str, str]:
    """Versions of what shapes the numbers, read without importing any of it."""
    versions = {"posttrain": posttrain.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions
