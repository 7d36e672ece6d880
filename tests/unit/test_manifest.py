"""The manifest survives the disk unchanged and nothing else passes for one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from registry_samples import a_manifest, a_report

from posttrain.errors import ArtefactError
from posttrain.records import ArtefactRef
from posttrain.registry.manifest import (
    BaseRef,
    DataFile,
    current_versions,
    from_json,
    now_utc,
    read_manifest,
    write_manifest,
)


@pytest.mark.parametrize(
    "manifest",
    [
        a_manifest(),
        a_manifest(gate=a_report(), files={"model.safetensors": "ab" * 32}, weights_sha256="ab" * 32),
        a_manifest(parent=ArtefactRef("helper-sft", "1", "../sft", "f00d" * 16)),
    ],
)
def test_round_trip_is_exact(tmp_path: Path, manifest) -> None:
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: m.pop("seed"), "seed"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m.update(sead=1), "sead"),
        (lambda m: m["gate"].update(verdict="yes"), "gate.verdict"),
        (lambda m: m["gate"].pop("counts"), "gate.counts"),
        (lambda m: m["data"]["data/train.jsonl"].update(bytes=3), "data.data/train.jsonl.bytes"),
        (lambda m: m.update(seed="7"), "seed"),
        (lambda m: m["parent"].update(fingerprint="x"), "parent"),
        (lambda m: m.update(stop_token_ids=["a"]), "stop_token_ids"),
    ],
)
def test_unknown_missing_and_ill_typed_keys_are_named(tmp_path: Path, damage, said: str) -> None:
    raw = a_manifest(gate=a_report()).to_json()
    damage(raw)
    with pytest.raises(ValueError, match=said):
        from_json(raw)
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match=said) as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / "manifest.json")


def test_no_manifest_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not an artefact"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "cut of')
    with pytest.raises(ArtefactError, match="not a readable manifest"):
        read_manifest(tmp_path)


def test_fingerprint_is_of_meaning() -> None:
    manifest = a_manifest(weights_sha256="ab" * 32)
    same = [
        replace(manifest, name="other", version="9", created="2030-01-01T00:00:00+00:00"),
        replace(manifest, versions={}, metrics={}, gate=a_report()),
        replace(manifest, data={"moved/train.jsonl": DataFile("da7a" * 16, 120)}),
        replace(manifest, parent=BaseRef("/copy/of/tiny-base", "ba5e" * 16)),
    ]
    assert {m.fingerprint for m in same} == {manifest.fingerprint}
    different = [
        replace(manifest, parent=BaseRef("acme/tiny-base", "ba5f" * 16)),
        replace(manifest, data={"data/train.jsonl": DataFile("da7b" * 16, 120)}),
        replace(manifest, stage_fingerprint="0" * 64),
        replace(manifest, template_fingerprint="0" * 64),
        replace(manifest, weights_sha256="0" * 64),
    ]
    assert len({m.fingerprint for m in [manifest, *different]}) == 1 + len(different)


def test_versions_and_time_are_filled_without_importing_torch() -> None:
    assert set(current_versions()) == {"posttrain", "python", "torch", "transformers", "peft"}
    assert now_utc().endswith("+00:00")
