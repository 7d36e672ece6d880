"""The model store: versions, aliases, promotion and lineage, kept in MLflow's model registry.

MLflow holds names, versions and aliases; what a version *is* stays in the manifest of its directory. Paths inside the
home are recorded relative to it, so that a home can be moved.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import paths
from posttrain.errors import ArtefactError, GateRefused, ModelError
from posttrain.records import ArtefactRef, GateReport
from posttrain.registry import tracking
from posttrain.registry.artefact import ADAPTER_CONFIG, is_artefact
from posttrain.registry.card import verdict
from posttrain.registry.files import verify
from posttrain.registry.manifest import BaseRef, DataFile, Manifest, read_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CANDIDATE = "candidate"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

# Tags on a version, and on a name the versions that were champion before the present one, oldest first.
FINGERPRINT, PATH, ARTEFACT = "posttrain.fingerprint", "posttrain.path", "posttrain.artefact"
GATE, FORCED = "posttrain.gate", "posttrain.promoted_without_gate_because"
FORMER = "posttrain.former_champions"


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered version. `gate` is the verdict in one line, read from the manifest."""

    name: str
    version: int
    aliases: tuple[str, ...]
    path: str
    fingerprint: str
    gate: str
    created: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One step of a lineage, youngest first. `kind` is artefact, base, or missing: recorded but not on this disk."""

    kind: str
    label: str
    fingerprint: str
    path: str = ""
    method: str = ""
    data: Mapping[str, DataFile] = field(default_factory=dict)
    gate: GateReport | None = None


class ModelStore:
    """Everything below raises ArtefactError for names, versions and directories that are not there."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()

    @cached_property
    def _client(self) -> MlflowClient:
        return tracking.open_client(self.home)

    # -- writing

    def log_run(
        self,
        experiment: str,
        run_name: str,
        *,
        key: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | tracking.Series],
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log a finished stage and return its run id; `key` (the stage's fingerprint) makes a repetition harmless."""
        artifacts = str(self.home / "mlflow-artifacts") if tracking.own_database(self.home) else None
        client = self._client
        with tracking.faults(self.home):
            return tracking.log_run(
                client,
                experiment,
                run_name,
                key=key,
                params=params,
                metrics=metrics,
                tags=tags or {},
                artifacts=artifacts,
            )

    def register(
        self, name: str, ref: ArtefactRef, run_id: str | None = None, tags: Mapping[str, str] | None = None
    ) -> int:
        """Add a version for this artefact, or return the one it has already."""
        if not NAME.fullmatch(name):
            raise ArtefactError(
                f"{name!r} cannot name a model.",
                remedy="Use letters, digits, '-', '_' and '.', starting with a letter or digit.",
            )
        manifest = read_manifest(Path(ref.path))
        if manifest.fingerprint != ref.fingerprint:
            raise ArtefactError(
                f"holds {manifest.name}@{manifest.version} with fingerprint {manifest.fingerprint[:12]}…, not {ref} "
                f"with {ref.fingerprint[:12]}….",
                where=ref.path,
                remedy="Load the reference again, then register.",
            )
        client = self._client
        with tracking.faults(self.home):
            if name not in self._names():
                client.create_registered_model(name)
            same = [v for v in self._versions(name) if v.tags.get(FINGERPRINT) == ref.fingerprint]
            if same:
                version = int(same[0].version)
                client.set_model_version_tag(name, str(version), PATH, self._relative(ref.path))
                client.set_model_version_tag(name, str(version), GATE, verdict(manifest.gate))
                return version
            ours = {FINGERPRINT: ref.fingerprint, PATH: self._relative(ref.path), ARTEFACT: str(ref)}
            made = client.create_model_version(
                name,
                source=self._source(ref.path),
                run_id=run_id,
                tags={**(tags or {}), **ours, GATE: verdict(manifest.gate)},
            )
            return int(made.version)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point any alias but `champion` at a version; champions are made by `promote`, which asks the gate."""
        if alias == CHAMPION:
            raise ModelError(f"the alias {CHAMPION!r} is not set by hand.", where=name, remedy="Use promote.")
        entry = self.get(name, version)
        with tracking.faults(self.home):
            self._client.set_registered_model_alias(name, alias, str(entry.version))

    def promote(self, name: str, selector: str | int, to: str = CHAMPION, *, force_because: str = "") -> Entry:
        """Point `to` at a version that passed its gate and whose files are intact.

        `force_because` overrides a missing or negative verdict; the reason is kept as a tag.
        """
        entry = self.get(name, selector)
        verify(Path(entry.path))
        gate = read_manifest(Path(entry.path)).gate
        if (gate is None or not gate.passed) and not force_because:
            why = "was never judged" if gate is None else f"was refused: {'; '.join(gate.reasons) or verdict(gate)}"
            raise GateRefused(
                f"{entry} {why}.",
                where=entry.path,
                remedy="Run its gate, promote another version, or force this one and say why.",
            )
        displaced = self._aliases(name).get(to)
        version = str(entry.version)
        with tracking.faults(self.home):
            self._client.set_model_version_tag(name, version, GATE, verdict(gate))
            if force_because:
                self._client.set_model_version_tag(name, version, FORCED, force_because)
            # Remember first, point second: a kill in between leaves a memory that `rollback` recognises as stale.
            if to == CHAMPION and displaced is not None and displaced != entry.version:
                former = self._former(name)
                self._remember(name, former if former[-1:] == [displaced] else [*former, displaced])
            self._client.set_registered_model_alias(name, to, version)
        return self.get(name, entry.version)

    def rollback(self, name: str) -> Entry:
        """Make the previous champion champion again."""
        current = self._aliases(name).get(CHAMPION)
        former = self._former(name)
        while former and former[-1] == current:
            former.pop()
        if current is None or not former:
            raise ArtefactError(
                "has no earlier champion to go back to.",
                where=name,
                remedy=f"Promote one of its versions: {self._describe(name)}.",
            )
        entry = self.get(name, former[-1])
        verify(Path(entry.path))
        with tracking.faults(self.home):
            self._client.set_registered_model_alias(name, CHAMPION, str(entry.version))
            self._remember(name, former[:-1])
        return self.get(name, entry.version)

    # -- reading

    def entries(self) -> list[Entry]:
        """Every version of every name, newest first within a name. Empty, and nothing created, on a fresh home."""
        found: list[Entry] = []
        for name, aliases in sorted(self._models().items()):
            versions = sorted(self._versions(name), key=lambda v: -int(v.version))
            found.extend(self._entry(version, aliases) for version in versions)
        return found

    def get(self, name: str, selector: str | int = CHAMPION) -> Entry:
        """The version with this alias or number."""
        aliases = self._aliases(name)
        wanted = int(selector) if str(selector).isdigit() else aliases.get(str(selector))
        for version in self._versions(name):
            if int(version.version) == wanted:
                return self._entry(version, aliases)
        raise ModelError(
            f"has no version or alias {str(selector)!r}.", where=name, remedy=f"It has {self._describe(name)}."
        )

    def find(self, ref: str) -> Path:
        """The directory that `name`, `name@alias`, `name@version` or a path means. A bare name is its champion."""
        path = paths.expanded(ref)
        if is_artefact(path) or any((path / config).is_file() for config in ("config.json", ADAPTER_CONFIG)):
            return path.resolve()
        name, _, selector = ref.partition("@")
        if not NAME.fullmatch(name):
            fault = (
                "holds no model: no manifest.json, config.json or adapter_config.json"
                if path.is_dir()
                else "no such directory"
            )
            raise ModelError(f"{fault}.", where=ref, remedy="Give a model directory, or name@alias or name@version.")
        entry = self.get(name, selector or CHAMPION)
        if not Path(entry.path).is_dir():
            raise ArtefactError(
                f"is registered, but its directory {entry.path} is not there.",
                where=str(entry),
                remedy="Bring the directory back, or run the stage again.",
            )
        return Path(entry.path)

    def lineage(self, name: str, selector: str | int = CHAMPION) -> list[Ancestor]:
        """The version, its parents and at the end the base model, from the manifests."""
        return lineage_of(Path(self.get(name, selector).path))

    # -- the registry's own tables

    def _models(self) -> dict[str, dict[str, int]]:
        """Aliases by name. Only our own store in the home may not exist yet."""
        database = tracking.own_database(self.home)
        if database is not None and not database.exists():
            return {}
        client = self._client
        with tracking.faults(self.home):
            models, token = [], None
            while True:
                page = client.search_registered_models(page_token=token)
                models.extend(page)
                token = page.token
                if not token:
                    break
        # A shared server holds other people's models too; names we could not have given are theirs.
        return {m.name: {a: int(v) for a, v in m.aliases.items()} for m in models if NAME.fullmatch(m.name)}

    def _names(self) -> list[str]:
        return sorted(self._models())

    def _aliases(self, name: str) -> dict[str, int]:
        models = self._models()
        if name in models:
            return models[name]
        close = difflib.get_close_matches(name, models, n=1)
        there = (
            f"There are: {', '.join(sorted(models))}." if models else "Nothing is registered yet; run a recipe first."
        )
        raise ModelError(
            f"no model {name!r} is registered in {self.home}.",
            remedy=f"Did you mean {close[0]!r}? {there}" if close else there,
        )

    def _versions(self, name: str) -> list[Any]:
        with tracking.faults(self.home):
            versions = self._client.search_model_versions(f"name='{name}'")
        return [version for version in versions if FINGERPRINT in version.tags]

    def _entry(self, version: Any, aliases: Mapping[str, int]) -> Entry:
        number = int(version.version)
        path = self.home / version.tags.get(PATH, "")
        return Entry(
            name=version.name,
            version=number,
            aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
            path=str(path),
            fingerprint=version.tags.get(FINGERPRINT, ""),
            gate=_verdict_at(path),
            created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        )

    def _describe(self, name: str) -> str:
        aliases = self._aliases(name)
        versions = ", ".join(sorted((str(v.version) for v in self._versions(name)), key=int)) or "none"
        named = ", ".join(f"{alias} = {version}" for alias, version in sorted(aliases.items())) or "none"
        return f"versions {versions}; aliases {named}"

    def _former(self, name: str) -> list[int]:
        with tracking.faults(self.home):
            tags = self._client.get_registered_model(name).tags
        return [int(version) for version in json.loads(tags.get(FORMER, "[]"))]

    def _remember(self, name: str, former: list[int]) -> None:
        self._client.set_registered_model_tag(name, FORMER, json.dumps(former))

    def _relative(self, path: str) -> str:
        absolute = Path(path).resolve()
        return str(absolute.relative_to(self.home) if absolute.is_relative_to(self.home) else absolute)

    def _source(self, path: str) -> str:
        """Servers refuse a bare local path, which they could not read anyway; the scheme says whose disk it is on."""
        absolute = str(Path(path).resolve())
        return f"posttrain:{absolute}" if tracking.tracking_uri(self.home).startswith("http") else absolute


def _verdict_at(path: Path) -> str:
    """One bad directory must not hide the others from a listing; whoever uses it hears the whole story."""
    if not is_artefact(path):
        return "directory missing"
    try:
        return verdict(read_manifest(path).gate)
    except ArtefactError:
        return "manifest unreadable"


def lineage_of(directory: Path) -> list[Ancestor]:
    """The artefact in `directory`, its parents and at the end the base model. A parent that is gone is said so."""
    steps: list[Ancestor] = []
    while True:
        manifest = read_manifest(directory)
        steps.append(_ancestor(manifest, directory))
        parent = manifest.parent
        if isinstance(parent, BaseRef):
            return [*steps, Ancestor("base", parent.reference, parent.sha256)]
        directory = (directory / parent.path).resolve()
        if not is_artefact(directory) or read_manifest(directory).fingerprint != parent.fingerprint:
            return [*steps, Ancestor("missing", str(parent), parent.fingerprint, str(directory))]


def _ancestor(manifest: Manifest, directory: Path) -> Ancestor:
    return Ancestor(
        kind="artefact",
        label=f"{manifest.name}@{manifest.version}",
        fingerprint=manifest.fingerprint,
        path=str(directory),
        method=manifest.method,
        data=manifest.data,
        gate=manifest.gate,
    )
