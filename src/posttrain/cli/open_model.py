"""From what a person types for a model to a model that answers.

A name is looked for in this order: packaged (builtin:…), a model folder, the registry of the home, the Hub.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from posttrain import paths
from posttrain.errors import ArtefactError, ModelError

if TYPE_CHECKING:
    from posttrain.data.render import PlainText, Renderer
    from posttrain.models.policy import Policy
    from posttrain.records import Sampling
    from posttrain.rollout.local import LocalEngine

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """The sampling options of a command line; max_new_tokens None leaves the length to the model's room."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class Located:
    """`source` is what loads the model, `label` what people call it: "support@3" for a registered one."""

    label: str
    source: str

    @property
    def fingerprint(self) -> str:
        """An artefact's fingerprint, which covers how it was made; the hash of any other model's weights."""
        from posttrain.pipeline import base_hash
        from posttrain.registry.artefact import is_artefact
        from posttrain.registry.manifest import read_manifest

        folder = Path(self.source)
        return read_manifest(folder).fingerprint if is_artefact(folder) else base_hash(self.source)


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A model ready to answer, or with PlainText as its `writer` to continue text."""

    label: str
    policy: Policy
    writer: Renderer | PlainText
    engine: LocalEngine

    def sampling(self, asked: Asked, longest_prompt: int) -> Sampling:
        """As it was asked; unless a length was asked, as long as the default and the model's positions allow."""
        from posttrain.records import Sampling

        positions = getattr(self.policy.model.config, "max_position_embeddings", None)
        room = DEFAULT_NEW_TOKENS if positions is None else min(DEFAULT_NEW_TOKENS, positions - longest_prompt)
        return Sampling(
            max_new_tokens=asked.max_new_tokens or max(1, room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            stop_token_ids=self.writer.stop_token_ids,
        )


def locate(name: str, home: Path) -> Located:
    """Find a model without loading it. An artefact's checksums are compared: what answers is what was saved."""
    if name.startswith(paths.BUILTIN):
        folder = paths.resolve(name, Path.cwd())
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} is not a model.", remedy=f"The package carries {_builtin_models()}.")
        return Located(name, str(folder))
    folder = paths.expanded(name)
    if (folder / "config.json").is_file():
        return _intact(name, folder)
    if name.startswith((".", "/", "~")):
        raise _no_folder(name, folder)
    return _registered(name, home) or _on_the_hub(name, home)


def _intact(label: str, folder: Path) -> Located:
    from posttrain.registry.artefact import is_artefact, load_ref

    if is_artefact(folder):
        load_ref(folder)
    return Located(label, str(folder))


def _no_folder(name: str, folder: Path) -> ModelError:
    if (folder / "adapter_config.json").is_file():
        base = "It holds an adapter alone. Open the merged model in the folder above it, or merge it into its base."
        return ModelError("no config.json in this folder.", where=name, remedy=base)
    what = "no config.json in this folder." if folder.is_dir() else "no such model folder."
    return ModelError(what, where=name, remedy="Give a folder that save_pretrained or posttrain wrote.")


def _registered(name: str, home: Path) -> Located | None:
    from posttrain.registry.store import CHAMPION, ModelStore

    store = ModelStore(home)
    base, _, selector = name.partition("@")
    if base not in {entry.name for entry in store.entries()}:
        return None
    try:
        entry = store.get(base, selector or CHAMPION)
    except ArtefactError as missing:
        raise ModelError(missing.what, where=missing.where, remedy=missing.remedy) from missing
    return _intact(str(entry), Path(entry.path))


def _on_the_hub(name: str, home: Path) -> Located:
    if name.count("/") == 1 and "@" not in name:
        return Located(name, name)
    from posttrain.registry.store import ModelStore

    registered = sorted({entry.name for entry in ModelStore(home).entries()})
    close = difflib.get_close_matches(name.partition("@")[0], [*registered, "builtin:tiny-base"], n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    listed = f"Registered in {home}: {', '.join(registered) or 'none yet'}."
    raise ModelError(
        f"there is no model {name!r}.",
        remedy=f"{meant}{listed} Or give a model folder, {_builtin_models()} or a Hub name (OWNER/NAME).",
    )


def _builtin_models() -> str:
    return " or ".join(name for name in paths.builtins() if "/" not in name) or "no model"


def open_model(found: Located) -> OpenModel:
    """Load a model to answer through its chat template."""
    from posttrain.data.render import Renderer
    from posttrain.registry.artefact import refuse_other_template

    policy = _load(found)
    if not isinstance(policy.tokenizer.chat_template, str):
        raise ModelError(
            f"{found.label} has no chat template: it can continue text, not answer.",
            remedy=f"See what it writes: posttrain generate {found.label} --raw --prompt 'Once upon'. To make it "
            "answer, train it with chat_template: builtin:templates/plain.jinja in the recipe.",
        )
    renderer = Renderer(policy.tokenizer)
    refuse_other_template(Path(found.source), renderer.fingerprint)
    return _ready(found, policy, renderer)


def open_plain(found: Located) -> OpenModel:
    """Load a model to continue plain text; it needs no chat template."""
    from posttrain.data.render import PlainText

    policy = _load(found)
    ends = policy.model.generation_config.eos_token_id
    return _ready(found, policy, PlainText(policy.tokenizer, ends if isinstance(ends, list) else [ends]))


def _load(found: Located) -> Policy:
    from posttrain.models.load import LoadOptions, load_policy

    policy = load_policy(found.source, LoadOptions(frozen_base=True))
    for note in policy.notes:
        typer.echo(f"note: {note}", err=True)
    return policy


def _ready(found: Located, policy: Policy, writer: Renderer | PlainText) -> OpenModel:
    from posttrain.rollout.local import LocalEngine

    return OpenModel(found.label, policy, writer, LocalEngine(policy, writer.answer_text))
