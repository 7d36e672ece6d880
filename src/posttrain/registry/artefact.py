"""An artefact: a directory that any Hugging Face loader opens, plus manifest.json, metrics.jsonl and a model card."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from posttrain.errors import ArtefactError
from posttrain.records import ArtefactRef, GateReport
from posttrain.registry.card import render_card
from posttrain.registry.files import CARD, MANIFEST, checksums, staged, verify, write_directory, write_text_atomic
from posttrain.registry.manifest import Manifest, read_manifest, write_manifest

ADAPTER_CONFIG = "adapter_config.json"
METRICS = "metrics.jsonl"


def save_artefact(
    final: Path, manifest: Manifest, save_model: Callable[[Path], None], metrics: Path | None = None
) -> ArtefactRef:
    """Write the model with `save_model` and everything beside it; all or nothing.

    Saving the same thing twice is fine (a resumed run does); another thing under the same name and version is not.
    """
    if not final.exists():
        write_directory(final, lambda directory: _fill(directory, final, manifest, save_model, metrics))
        return read_manifest(final).ref(final)
    there = load_ref(final)
    with staged(final) as scratch:
        _fill(scratch, final, manifest, save_model, metrics)
        again = read_manifest(scratch).ref(final)
    if again != there:
        raise ArtefactError(
            f"holds {there} with fingerprint {there.fingerprint[:12]}…, but this run made {again} with "
            f"{again.fingerprint[:12]}…. A name and version mean one model for ever.",
            where=str(final),
            remedy="Give the new one another version, or delete the old directory if nobody needs it.",
        )
    return there


def refuse_other_template(directory: Path, fingerprint: str) -> None:
    """An artefact answers through the template it was trained with, or not at all. `fingerprint` is of the template
    about to be used; a model that posttrain did not make has none to compare with."""
    if not is_artefact(directory):
        return
    manifest = read_manifest(directory)
    if manifest.template_fingerprint != fingerprint:
        raise ArtefactError(
            f"{manifest.ref(directory)} was trained with another chat template, or other special tokens, than it would "
            f"be asked with (fingerprint {manifest.template_fingerprint[:12]}…, now {fingerprint[:12]}…).",
            where=str(directory),
            remedy="It would answer prompts it never saw the like of. Restore the artefact's tokenizer and template "
            "files, or run its stage again.",
        )


def _fill(
    directory: Path, final: Path, manifest: Manifest, save_model: Callable[[Path], None], metrics: Path | None
) -> None:
    save_model(directory)
    if metrics is not None:
        shutil.copyfile(metrics, directory / METRICS)
    files = checksums(directory)
    is_adapter = ADAPTER_CONFIG in files
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    if not weights or not (is_adapter or "config.json" in files):
        raise ArtefactError(
            f"the model wrote {', '.join(files) or 'nothing'}; an artefact needs config.json or {ADAPTER_CONFIG}, "
            "and weights as .safetensors.",
            where=str(final),
            remedy="Save it with save_pretrained.",
        )
    parent = manifest.parent
    if isinstance(parent, ArtefactRef):
        parent = replace(parent, path=os.path.relpath(parent.path, final.resolve()))
    complete = replace(manifest, parent=parent, files=files, weights_sha256=_weights_hash(weights))
    write_manifest(directory, complete)
    write_text_atomic(directory / CARD, render_card(complete, is_adapter=is_adapter))


def _weights_hash(weights: dict[str, str]) -> str:
    """The file's own sha256 when there is one file, so that anybody can check it with sha256sum."""
    if len(weights) == 1:
        return next(iter(weights.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(weights.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_ref(directory: Path) -> ArtefactRef:
    """The artefact in `directory`, after every checksum was compared."""
    manifest = read_manifest(directory)
    verify(directory)
    return manifest.ref(directory)


def attach_gate(directory: Path, report: GateReport) -> None:
    """Add the verdict after evaluation. The report must be about this very artefact."""
    manifest = read_manifest(directory)
    ref = manifest.ref(directory)
    if report.child_version not in {ref.version, str(ref), ref.fingerprint}:
        raise ArtefactError(
            f"is {ref}, but the gate report judged {report.child_version!r}.",
            where=str(directory),
            remedy="Evaluate this artefact and attach that report.",
        )
    judged = replace(manifest, gate=report)
    # The manifest decides, so it comes last: should we die in between, the verdict is still missing there, and
    # attaching it again renews the card. The other way round the card would say "not judged" for ever.
    write_text_atomic(directory / CARD, render_card(judged, is_adapter=(directory / ADAPTER_CONFIG).exists()))
    write_manifest(directory, judged)


def is_artefact(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()
