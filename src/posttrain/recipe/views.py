"""Ways to look at a recipe: explained key by key, as a fingerprint of its meaning, as a difference, as a schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from posttrain.recipe.faults import show
from posttrain.recipe.model import Recipe
from posttrain.recipe.yaml_lines import KeyPath, key_name
from posttrain.settings import METHODS, PUBLISHED, RecipeSettings
from posttrain.settings.rl import Preset

# Keys that change how a run is carried out or watched, not what it produces. Two recipes that differ only in these
# have one fingerprint, so a run may be continued after changing them.
NOT_MEANING = frozenset(
    {
        "save_steps",
        "logging_steps",
        "micro_batch_tokens",  # the loss is a sum with one global divisor: cutting it differently changes nothing
        "gradient_checkpointing",
        "forest",  # the same log-probs, computed once or several times
        "max_drop_rate",  # limits that stop a run; a run that went on is the same run
        "max_checker_failure_rate",
        "dataset_num_proc",
        "keep_rollouts",
        "register",
        "register_as",
    }
)
# What these files hold is pinned by hashes of their content; where they lie differs from machine to machine.
FILE_KEYS = frozenset({"path", "suite", "chat_template", "against"})


@dataclass(frozen=True)
class ExplainLine:
    key: str
    value: Any
    origin: str


def explain(recipe: Recipe) -> list[ExplainLine]:
    """Every effective value of the recipe, with where it came from."""
    lines = [(key_name(path), value) for path, value in leaves(recipe.as_dict())]
    papers, chosen = dict(_papers(recipe)), dict(_chosen(recipe))
    found = []
    for key, value in lines:
        origin = recipe.origins.get(key, "default")
        own = chosen.get(key, origin) if origin == "default" else origin
        found.append(ExplainLine(key, value, _origin(own, papers.get(key))))
    return found


def _papers(recipe: Recipe) -> Iterator[tuple[str, tuple[Preset, str]]]:
    """Keys whose value a published method fixes: the method, and its value."""
    for stage in recipe.stages:
        preset = PUBLISHED.get(stage.method)
        for key in type(stage.settings).model_fields if preset else ():
            if preset and (value := preset.says(key)) is not None:
                yield f"{stage.key}.{key}", (preset, value)


def _chosen(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that a stage kind sets beside what its paper fixes, and why."""
    for stage in recipe.stages:
        preset = PUBLISHED.get(stage.method)
        for key, (_, why) in preset.chosen.items() if preset else ():
            yield f"{stage.key}.{key}", f"default of {stage.method}: {why}"


def _origin(origin: str, paper: tuple[Preset, str] | None) -> str:
    """Where a value came from; with what the paper has, when the recipe says otherwise."""
    if paper is None:
        return origin
    preset, value = paper
    cited = f"{preset.title} ({preset.paper})"
    return cited if origin == "default" else f"{origin}; {cited}: {value}"


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two recipes given by `as_dict`: "2-dpo.beta: 0.1 → 0.2". A stage that only one of them has
    is one line."""
    before = {key_name(path): value for path, value in leaves(old)}
    after = {key_name(path): value for path, value in leaves(new)}
    changed = [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    stages = [_stage_keys(recipe) for recipe in (old, new)]
    alone = {key: i for i in (0, 1) for key in stages[i] - stages[1 - i]}
    lines = [f"{key}: only {('before', 'now')[i]}" for key, i in sorted(alone.items())]
    return lines + [
        f"{key}: {_side(before, key)} → {_side(after, key)}"
        for key in changed
        if not any(key.startswith(f"{stage}.") for stage in alone)
    ]


def _stage_keys(recipe: Mapping[str, Any]) -> set[str]:
    return {key_name(("stages", i, name)) for i, stage in enumerate(recipe["stages"]) for name in stage}


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is not itself a section, nor a list of sections, with its key path."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def canonical_json(value: Any) -> str:
    """The one spelling of plain data: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """16 hex digits of the meaning of settings or of a recipe, from its `as_dict`."""
    return hashlib.sha256(canonical_json(_meaning(value)).encode()).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors that complete and underline."""
    template = "#/$defs/{model}"
    schema = RecipeSettings.model_json_schema(ref_template=template)
    definitions: dict[str, Any] = schema.pop("$defs", {})
    choices = []
    for method, settings in METHODS.items():
        stage = settings.model_json_schema(ref_template=template)
        definitions |= stage.pop("$defs", {})
        definitions[settings.__name__] = stage
        reference = {"$ref": template.format(model=settings.__name__)}
        one_key = {"type": "object", "properties": {method: reference}, "required": [method]}
        choices.append(one_key | {"additionalProperties": False})
    schema["properties"]["stages"] = {"type": "array", "minItems": 1, "items": {"oneOf": choices}}
    schema["required"] = [*schema["required"], "stages"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _meaning(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _file_name(key, _meaning(inner)) for key, inner in value.items() if key not in NOT_MEANING}
    return [_meaning(item) for item in value] if isinstance(value, list | tuple) else value


def _file_name(key: str, value: Any) -> Any:
    """A file's own name. A model may also be a Hub id ("Qwen/Qwen3-8B"), which is kept whole."""
    if isinstance(value, list) and key in FILE_KEYS:
        return [_file_name(key, item) for item in value]
    if not isinstance(value, str) or value.startswith("builtin:"):
        return value
    is_model_folder = key == "model" and value.startswith((".", "/", "~"))
    return PurePath(value).name if key in FILE_KEYS or is_model_folder else value


def _side(values: Mapping[str, Any], key: str) -> str:
    return show(values[key]) if key in values else "(not set)"


_ABSENT = object()
