"""An adapter merged into its base, as an artefact of its own: written only when it is proved to be what it claims.

The proof: on held-out prompts and the adapter's own answers to them, the merged model as loaded from disk gives the
log-probs of the adapter on its base, does not give those of the base, and renders prompts to the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain import paths
from posttrain.data.render import PlainText, Renderer
from posttrain.errors import ArtefactError, DataError, ModelError
from posttrain.models.adapters import load_adapter
from posttrain.models.load import LoadOptions, load_policy, save_merged
from posttrain.models.merge import MERGE_BOUND, RoundTrip, refuse_unmergeable, round_trip
from posttrain.models.policy import Policy
from posttrain.pipeline.identity import base_hash, file_hash
from posttrain.recipe import fingerprint
from posttrain.records import ArtefactRef, Branch, Request, Sampling, Task, Tree
from posttrain.registry.artefact import ADAPTER_CONFIG, is_artefact, load_ref, save_artefact
from posttrain.registry.files import write_json_atomic
from posttrain.registry.manifest import BaseRef, Manifest, current_versions, now_utc, read_manifest
from posttrain.rollout.local import LocalEngine

REPORT = "merge.json"
NEW_TOKENS = 16  # of the adapter's answer to each prompt


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter and where it came from. `manifest` is None for one that posttrain did not make."""

    adapter: Path
    manifest: Manifest | None
    ref: ArtefactRef | None
    base: str  # what loads the base model
    parent: ArtefactRef | BaseRef


@dataclass(frozen=True, slots=True)
class Merged:
    ref: ArtefactRef
    base: str
    proof: RoundTrip
    n_prompts: int


def merge(source: Source, out: Path, prompts: Sequence[Task], dtype: str = "auto") -> Merged:
    """Write the merged model to `out`, or raise and leave nothing there."""
    if out.exists():
        remedy = "Choose a new folder with --out; nothing is merged in place."
        raise ArtefactError("exists already.", where=str(out), remedy=remedy)
    quantised = source.manifest is not None and source.manifest.settings.get("adapter") == "qlora"
    options = LoadOptions(dtype, frozen_base=True)
    policy = load_policy(source.base, replace(options, quantised=quantised))
    load_adapter(policy, source.adapter)
    refuse_unmergeable(policy, source.adapter)
    policy.tokenizer = _tokenizer(source, policy)
    writer = _writer(policy)
    _refuse_other_template(source, writer)
    trees = _answered(policy, writer, prompts)
    adapter_N = _logps(policy, trees)
    with policy.adapter_off():
        base_N = _logps(policy, trees)
    proofs: list[RoundTrip] = []

    def save(directory: Path) -> None:
        save_merged(policy, directory, stop_token_ids=writer.stop_token_ids)
        back = load_policy(str(directory), options)
        _refuse_other_tokens(policy, writer, back, prompts, out)
        bound = MERGE_BOUND[policy.autocast or policy.model.dtype]
        proof = round_trip(adapter_N, _logps(back, trees), base_N, bound)
        if why := proof.fault():
            raise ArtefactError(
                f"the merged model is not the adapter on {source.parent}: {why}.",
                where=str(out),
                remedy="Nothing was written. Use the adapter on its base, or merge with --dtype float32.",
            )
        proofs.append(proof)
        report = {"adapter": str(source.ref or source.adapter.name), "base": str(source.parent), **asdict(proof)}
        write_json_atomic(directory / REPORT, report | {"prompts": len(trees)})

    ref = save_artefact(out, _manifest(source, writer, out, dtype), save)
    return Merged(ref, str(source.parent), proofs[-1], len(trees))


# --- what is merged into what ------------------------------------------------------------------------------------


def find_source(folder: Path, base: str | None) -> Source:
    """The adapter in `folder`, an artefact or a folder that peft wrote, and the very base it was trained on."""
    if is_artefact(folder):
        if not (folder / "adapter" / ADAPTER_CONFIG).is_file():
            merged = read_manifest(folder).settings.get("adapter", "none") != "none"
            why = "its adapter is in its weights already" if merged else "all its weights were trained"
            raise ModelError(f"holds no adapter: {why}.", where=str(folder))
        ref, manifest = load_ref(folder), read_manifest(folder)
        return Source(folder / "adapter", manifest, ref, _trained_on(manifest, folder, base), manifest.parent)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"has no {ADAPTER_CONFIG}, so it is no adapter.",
            where=str(folder),
            remedy="Name an artefact of an adapter stage, or a folder that peft wrote.",
        )
    named = base or json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ModelError("does not say which model it belongs to.", where=str(folder), remedy="Name it with --base.")
    source = _loadable(named)
    return Source(folder, None, None, source, BaseRef(named, base_hash(source)))


def _trained_on(manifest: Manifest, folder: Path, base: str | None) -> str:
    """What loads the parent: it must be the very one, by its fingerprint, wherever it lies now."""
    parent = manifest.parent
    if isinstance(parent, ArtefactRef):
        wanted = parent.fingerprint
        source = base or str((folder / parent.path).resolve())
        found = load_ref(Path(source)).fingerprint if is_artefact(Path(source)) else ""
    else:
        wanted = parent.sha256
        source = _loadable(base or parent.reference)
        found = base_hash(source) if not Path(source).is_absolute() or Path(source).is_dir() else ""
    if found == wanted:
        return source
    what = "is not the model it was trained on" if found else "is not there"
    raise ModelError(
        f"the adapter belongs to {parent}; {source} {what}.", where=str(folder), remedy="Name that model with --base."
    )


def _loadable(name: str) -> str:
    """A packaged model or a folder as a path; any other name is the Hub's."""
    if name.startswith((paths.BUILTIN, ".", "/", "~")) or Path(name).is_dir():
        return str(paths.resolve(name, Path.cwd()))
    return name


def _tokenizer(source: Source, policy: Policy) -> Any:
    """The one the adapter was trained with: it holds the template."""
    from transformers import AutoTokenizer

    for folder in (source.adapter.parent if source.manifest else source.adapter,):
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(str(folder))
    return policy.tokenizer


def _writer(policy: Policy) -> Renderer | PlainText:
    if isinstance(policy.tokenizer.chat_template, str):
        return Renderer(policy.tokenizer)
    ends = policy.model.generation_config.eos_token_id
    return PlainText(policy.tokenizer, ends if isinstance(ends, list) else [ends])


def _refuse_other_template(source: Source, writer: Renderer | PlainText) -> None:
    found = writer.fingerprint if isinstance(writer, Renderer) else ""
    if source.manifest is not None and source.manifest.template_fingerprint != found:
        raise ArtefactError(
            f"its tokenizer's template (fingerprint {found[:12] or 'none'}…) is not the one it was trained with "
            f"({source.manifest.template_fingerprint[:12]}…).",
            where=str(source.adapter.parent),
            remedy="Restore the artefact, or run its stage again.",
        )


# --- the proof ---------------------------------------------------------------------------------------------------


def _answered(policy: Policy, writer: Renderer | PlainText, prompts: Sequence[Task]) -> list[Tree]:
    """Each prompt with the likeliest answer of the adapter on its base; every token but the first is scored."""
    asked = [Request(task.id, writer.prompt_ids(task.prompt, task.id), (0,)) for task in prompts]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0, stop_token_ids=writer.stop_token_ids)
    answers = [group[0] for group in LocalEngine(policy, writer.answer_text).generate(asked, sampling)]
    rows = [(r.id, (*r.prompt_ids, *a.token_ids)) for r, a in zip(asked, answers, strict=True) if not a.detail]
    if not rows:
        raise DataError(
            f"none of {len(asked)} prompts can be answered: {answers[0].detail if answers else 'there is none'}.",
            remedy="Give other ones with --prompts FILE.jsonl.",
        )
    return [Tree(id, ids[:1], (Branch(ids[1:], (True,) * (len(ids) - 1)),)) for id, ids in rows]


@torch.no_grad()
def _logps(policy: Policy, trees: Sequence[Tree]) -> Tensor:
    return torch.cat([policy.score([tree])[0].logp_N for tree in trees])


def _refuse_other_tokens(
    policy: Policy, writer: Renderer | PlainText, back: Policy, prompts: Sequence[Task], out: Path
) -> None:
    """The merged model must be asked as the adapter was: the same template, and the same tokens of every prompt."""
    same = policy.tokenizer.chat_template == back.tokenizer.chat_template
    if same:
        again = _writer(back)
        same = all(writer.prompt_ids(t.prompt, t.id) == again.prompt_ids(t.prompt, t.id) for t in prompts)
        same = same and set(writer.stop_token_ids) == set(again.stop_token_ids)
    if not same:
        raise ArtefactError(
            "the merged model's tokenizer writes prompts otherwise than the adapter's.",
            where=str(out),
            remedy="Nothing was written. Report this.",
        )


def _manifest(source: Source, writer: Renderer | PlainText, out: Path, dtype: str) -> Manifest:
    made_from = source.manifest
    meaning = {"merge": source.ref.fingerprint if source.ref else _adapter_hash(source.adapter), "dtype": dtype}
    return Manifest(
        name=made_from.name if made_from else out.name,
        version=f"{made_from.version}-merged" if made_from else "merged",
        stage="merge",
        method="merge",
        parent=source.ref or source.parent,
        recipe_fingerprint=made_from.recipe_fingerprint if made_from else "",
        stage_fingerprint=fingerprint(meaning),
        settings={"base": str(source.parent), "dtype": dtype},
        seed=0,
        data={},
        ledger={},
        rows={},
        evaluated={},
        template_fingerprint=writer.fingerprint if isinstance(writer, Renderer) else "",
        stop_token_ids=writer.stop_token_ids,
        versions=current_versions(),
        metrics={},
        created=now_utc(),
    )


def _adapter_hash(folder: Path) -> str:
    return "".join(file_hash(file) for file in sorted(folder.glob("adapter_*")))
