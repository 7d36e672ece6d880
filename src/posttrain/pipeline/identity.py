"""What a run starts from and what a stage means, as hashes of content: names and places do not count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import paths
from posttrain.data.sources import content_hash
from posttrain.errors import DataError, PosttrainError, RecipeError
from posttrain.gate.suites import Suite, is_suite, load_suite
from posttrain.models.hub import reach
from posttrain.recipe import Recipe, Stage, fingerprint
from posttrain.records import ArtefactRef
from posttrain.registry.artefact import is_artefact, load_ref
from posttrain.registry.manifest import BaseRef
from posttrain.registry.store import ModelStore, lineage_of
from posttrain.rewards import user
from posttrain.seeds import derive_seed
from posttrain.settings import TEACHES_ANSWERS, StageSettings
from posttrain.settings.environment import chosen

# Files of a base model that decide what it says: weights, shape, tokenizer and template.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer*", "special_tokens_map.json", "*.jinja", "vocab*",
               "merges.txt")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parent:
    """The model a stage starts from. `source` is what loads it; `sft` the last model of its history that came out of
    SFT, None where that is this one (or the base, where the recipe says that it needs none)."""

    source: str
    ref: ArtefactRef | BaseRef
    had_sft: bool
    sft: Parent | None = None

    @property
    def fingerprint(self) -> str:
        return self.ref.fingerprint if isinstance(self.ref, ArtefactRef) else self.ref.sha256


def base_parent(recipe: Recipe, home: Path) -> Parent:
    """The recipe's own model. One that posttrain made keeps its history: its template, and whether it had SFT.

    Of another model the first stage says it, with allow_without_sft; the stages after it need not say it again.
    """
    declared = getattr(recipe.stages[0].settings, "allow_without_sft", False)
    source = model_source(recipe.model, recipe, home)
    if not is_artefact(Path(source)):
        return Parent(source, BaseRef(recipe.model, base_hash(source)), had_sft=declared)
    lineage = lineage_of(Path(source))
    taught = next((ancestor for ancestor in lineage if ancestor.method in TEACHES_ANSWERS), None)
    earlier = taught is not None and taught is not lineage[0]
    sft = Parent(taught.path, load_ref(Path(taught.path)), had_sft=True) if taught and earlier else None
    return Parent(source, load_ref(Path(source)), declared or taught is not None, sft)


def reference_of(recipe: Recipe, stage: Stage, parent: Parent, home: Path) -> Parent:
    """The model this stage measures against: its parent, unless it is a preference stage and its recipe or history
    says otherwise, or a student with a teacher."""
    s = stage.settings
    key = "teacher" if hasattr(s, "teacher") else "reference"
    name = getattr(s, key, "parent")
    if name == "parent":
        return parent
    if name == "sft":
        return parent.sft or parent
    try:
        source = model_source(name, recipe, home)
        ref = load_ref(Path(source)) if is_artefact(Path(source)) else BaseRef(name, base_hash(source))
    except PosttrainError as e:
        e.locate(f"{recipe.path}: {stage.key}.{key}")
        raise
    found = Parent(source, ref, had_sft=True)
    return parent if found.fingerprint == parent.fingerprint else found


def model_source(name: str, recipe: Recipe, home: Path) -> str:
    """What loads the model `name`: a packaged folder, a folder beside the recipe, a registered name, a Hub name."""
    if name.startswith(paths.BUILTIN):
        return str(recipe.resolve(name))
    if name.startswith(("/", ".", "~")) or (recipe.path.parent / name).is_dir():
        return str(recipe.resolve(name))
    if "@" in name:
        return str(ModelStore(home).find(name))
    return name


def base_hash(source: str) -> str:
    """Identity of a model posttrain did not make: its files' hash, or the commit a Hub name stands for."""
    folder = Path(source)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file in sorted({found for pattern in MODEL_FILES for found in folder.glob(pattern)}):
            digest.update(file.name.encode())
            digest.update(file_hash(file).encode())
        return digest.hexdigest()
    from transformers import AutoConfig

    reach(source)
    try:
        commit = getattr(AutoConfig.from_pretrained(source), "_commit_hash", None)
    except (OSError, ValueError) as e:
        raise RecipeError(
            f"model {source!r} is neither a folder nor a model of the Hub that can be reached.",
            remedy="Correct `model`: a folder relative to the recipe, a Hub name, or builtin:tiny-base.",
        ) from e
    return hashlib.sha256(f"{source}@{commit}".encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def with_files(s: StageSettings, recipe: Recipe) -> StageSettings:
    """The user's own rewards by absolute paths: a method does not know where the recipe lies."""
    rewards = getattr(s, "rewards", [])
    found = user.located(rewards, recipe.resolve)
    return s if found == rewards else s.model_copy(update={"rewards": found})


def template_of(recipe: Recipe) -> str | None:
    """The recipe's chat template as Jinja text; None: the tokenizer's own."""
    if recipe.chat_template is None:
        return None
    path = recipe.resolve(recipe.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"byte {e.start} of the chat template is not UTF-8 text.", where=str(path)) from e


def stage_seed(recipe: Recipe, stage: Stage, attempt: int) -> int:
    return derive_seed(recipe.seed, stage.key, attempt)


def stage_fingerprint(
    recipe: Recipe,
    stage: Stage,
    parent: Parent,
    suite: Suite | None,
    template: str | None,
    seed: int,
    reference: Parent | None = None,
    scorers: Sequence[str] = (),
) -> str:
    """What the stage makes. What its gate asks of the result is not part of it; the gate's items are, because
    training rows are compared with them. `scorers`: fingerprints of the reward models among its rewards."""
    s = stage.settings
    another: dict[str, Any] = {} if reference in (None, parent) else {"reference": reference.fingerprint}
    another |= {"scorers": list(scorers)} if scorers else {}
    own_rewards = user.hashes(getattr(s, "rewards", []), recipe.resolve)
    another |= {"rewards": own_rewards} if own_rewards else {}
    world = chosen(getattr(s, "environment", None))
    another |= {"environment": file_hash(recipe.resolve(world.name))} if world is not None and world.is_file else {}
    return fingerprint(
        another
        | {
            "method": stage.method,
            "settings": {key: value for key, value in stage.as_dict().items() if key != "gate"},
            "parent": parent.fingerprint,
            "data": [content_hash(d, recipe.resolve) for d in [*s.datasets, *getattr(s, "eval_datasets", ())]],
            "against": [_evaluation_hash(recipe, name) for name in s.decontaminate.against],
            "suite": suite.fingerprint if suite else None,
            "template": template,
            "seed": seed,
        }
    )


def _evaluation_hash(recipe: Recipe, name: str) -> str:
    """A suite by its meaning, since its file only names the items; any other evaluation set by its bytes."""
    path = recipe.resolve(name)
    return load_suite(path, recipe.resolve).fingerprint if is_suite(path) else file_hash(path)
