"""`key.sub=value` on the command line, written over the recipe before anything is checked."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.recipe.faults import Fault, show
from posttrain.recipe.yaml_lines import Document, KeyPath, read_value, value_at, with_value, without
from posttrain.settings import RecipeSettings

# Of these pairs a recipe may set one. An override of one therefore takes the place of the other.
EXCLUSIVE = (("num_train_epochs", "max_steps"), ("warmup_ratio", "warmup_steps"))


class _Unknown(Exception):
    """The target of an override cannot be found; the message says what is there."""


@dataclass(frozen=True)
class Overridden:
    """The recipe after its overrides: where each override landed, and what could not be applied or was displaced."""

    document: Document
    texts: dict[KeyPath, str]
    faults: tuple[Fault, ...] = ()
    warnings: tuple[str, ...] = ()

    def text_of(self, path: KeyPath) -> str | None:
        """The override that wrote `path` or a section around it, if any."""
        inside = [text for at, text in self.texts.items() if path[: len(at)] == at]
        return inside[-1] if inside else None


def apply_overrides(document: Document, overrides: Sequence[str]) -> Overridden:
    """Apply `overrides` in order; a later one wins over an earlier one."""
    texts: dict[KeyPath, str] = {}
    faults: list[Fault] = []
    warnings: list[str] = []
    for text in overrides:
        target, equals, value_text = text.partition("=")
        try:
            if not equals:
                raise _Unknown("an override is written key=value.")
            path = _locate(target.strip(), document.data)
            value = read_value(value_text)
        except (_Unknown, ValueError) as problem:
            faults.append(Fault(f"override {text}", float("inf"), str(problem)))
            continue
        document = with_value(document, path, value)
        texts = {at: old for at, old in texts.items() if at[: len(path)] != path} | {path: text}
        document, displaced = _displace(document, path, texts) if value is not None else (document, [])
        warnings += [f"override {text} takes the place of {name}" for name in displaced]
    return Overridden(document, texts, tuple(faults), tuple(warnings))


def stage_methods(data: Any) -> list[str | None]:
    """The method of each stage of raw recipe data; None where a stage is not written as {method: settings}."""
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, list):
        return []
    return [next(iter(stage)) if isinstance(stage, dict) and len(stage) == 1 else None for stage in stages]


def stage_label(position: int, methods: Sequence[str | None]) -> str:
    """What a stage is called in messages: its method when no other stage has the same, else its key."""
    method = methods[position]
    return method if method and methods.count(method) == 1 else f"{position + 1}-{method}"


def _locate(target: str, data: Any) -> KeyPath:
    """The key path meant by `sft.beta`, `2-dpo.beta`, `stages.2.beta` or `seed`."""
    words = target.split(".")
    methods = stage_methods(data)
    if words[0] == "stages" and len(words) > 1:
        if not words[1].isdigit() or not 1 <= int(words[1]) <= len(methods):
            raise _Unknown(f"there is no stage {words[1]}; stages are counted from 1 to {len(methods)}.")
        head, rest = _stage_path(int(words[1]) - 1, methods), words[2:]
    elif (position := _stage_called(words[0], methods)) is not None:
        head, rest = _stage_path(position, methods), words[1:]
    elif words[0] in _top_keys() and words[0] != "stages":
        head, rest = (words[0],), words[1:]
    else:
        raise _Unknown(_suggest(words[0], methods))
    return _descend(head, rest, data)


def _stage_called(word: str, methods: Sequence[str | None]) -> int | None:
    keys = [f"{index}-{method}" for index, method in enumerate(methods, start=1)]
    if word in keys:
        return keys.index(word)
    if methods.count(word) > 1:
        named = [key for key, method in zip(keys, methods, strict=True) if method == word]
        raise _Unknown(f"several stages are {word}; write {' or '.join(named)}.")
    return methods.index(word) if word in methods else None


def _stage_path(position: int, methods: Sequence[str | None]) -> KeyPath:
    method = methods[position]
    if method is None:
        raise _Unknown(f"stage {position + 1} is not written as one method with its settings.")
    return ("stages", position, method)


def _descend(head: KeyPath, rest: Sequence[str], data: Any) -> KeyPath:
    """Check that every step but the last leads into a section or a list that is there, or can be made."""
    if len(rest) == 0 and head[0] == "stages":
        raise _Unknown("a whole stage cannot be overridden; name one of its keys.")
    path, inside = head, value_at(data, head)
    for word in rest:
        if isinstance(inside, list):
            if not word.isdigit() or not 1 <= int(word) <= len(inside):
                raise _Unknown(f"{path[-1]} has entries 1 to {len(inside)}, not {word}.")
            path, inside = (*path, int(word) - 1), inside[int(word) - 1]
        elif inside is None or isinstance(inside, dict):
            path, inside = (*path, word), (inside or {}).get(word)
        else:
            raise _Unknown(f"{path[-1]} = {show(inside)} is not a section, so {word} cannot be set in it.")
    return path


def _displace(document: Document, path: KeyPath, texts: dict[KeyPath, str]) -> tuple[Document, list[str]]:
    """Take away the recipe's own key that the override excludes; one given as an override too stays, and is a fault."""
    displaced = []
    for pair in EXCLUSIVE:
        if path[0] != "stages" or len(path) != 4 or path[3] not in pair:
            continue
        other = pair[1] if path[3] == pair[0] else pair[0]
        other_path = (*path[:3], other)
        if other_path in document.lines and other_path not in texts:
            displaced.append(f"{other} on line {document.lines[other_path]}")
            document = without(document, other_path)
    return document, displaced


def _top_keys() -> list[str]:
    return [field.alias or name for name, field in RecipeSettings.model_fields.items()] + ["stages"]


def _suggest(word: str, methods: Sequence[str | None]) -> str:
    keys = [f"{index}-{method}" for index, method in enumerate(methods, start=1) if method]
    named = [method for method in dict.fromkeys(methods) if method]
    close = difflib.get_close_matches(word, [*_top_keys(), *named, *keys], n=1)
    remedy = f"Did you mean {close[0]}?" if close else f"Start with a stage ({', '.join(keys)}) or {_top_list()}."
    return f"there is no stage or key {word}. {remedy}"


def _top_list() -> str:
    return ", ".join(key for key in _top_keys() if key != "stages")
