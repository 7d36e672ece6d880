"""The recipe being written: values with their origin, tried against the settings before they are taken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from posttrain.recipe.faults import violations
from posttrain.recipe.yaml_lines import key_name, read_yaml
from posttrain.settings import METHODS, DatasetSettings, LoraSettings, RecipeSettings, Section

STAND_INS = {"datasets": [{"path": "x"}], "rewards": ["x"], "name": "x", "model": "x", "path": "x"}
PLAIN = re.compile(r"[A-Za-z0-9_./~][\w./@:~+-]*")


@dataclass(frozen=True)
class Item:
    value: Any
    origin: str  # what the comment beside it says


@dataclass
class Draft:
    """One recipe with one stage."""

    method: str
    top: dict[str, Item] = field(default_factory=dict)
    stage: dict[str, Item] = field(default_factory=dict)
    lora: dict[str, Item] = field(default_factory=dict)
    datasets: list[dict[str, Item]] = field(default_factory=list)
    eval_datasets: list[dict[str, Item]] = field(default_factory=list)

    def fitting(self, key: str, value: Any) -> tuple[Any, str]:
        """The value as a stage key takes it, or None and why it does not. `lora.r` names a key of the section."""
        section, _, inner = key.rpartition(".")
        if section:
            return first_fitting(METHODS[self.method], section, [{inner: v} for v in _spellings(value)], inner)
        return first_fitting(METHODS[self.method], key, _spellings(value))

    def put(self, key: str, value: Any, origin: str) -> None:
        if key.startswith("lora."):
            self.lora[key.removeprefix("lora.")] = Item(value, origin)
        else:
            self.stage[key] = Item(value, origin)

    def has(self, key: str) -> bool:
        return key in self.stage or key.removeprefix("lora.") in self.lora

    def value(self, key: str, default: Any = None) -> Any:
        item = self.lora.get(key.removeprefix("lora.")) if key.startswith("lora.") else self.stage.get(key)
        return item.value if item else default


def dataset_fits(key: str, value: Any) -> bool:
    """Whether a data set may hold this key with this value."""
    return first_fitting(DatasetSettings, key, [value])[1] == ""


def top_fits(key: str, value: Any) -> bool:
    return first_fitting(RecipeSettings, key, [value])[1] == ""


def first_fitting(model: type[Section], key: str, values: list[Any], inner: str = "") -> tuple[Any, str]:
    """The first of the values that the settings take, and why the first is refused when none is."""
    refusal = ""
    for value in values:
        said = [message for path, message in _faults(model, {key: value}) if path[0] == key]
        if not said:
            return (value[inner] if inner else value), ""
        refusal = refusal or said[0]
    return None, refusal


def _faults(model: type[Section], data: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    needed = {key: value for key, value in STAND_INS.items() if key in model.model_fields}
    full = {**needed, **data}
    try:
        model.model_validate(full, strict=True)
    except ValidationError as error:
        yield from ((path, f"{key_name(path)}{message}") for path, message in violations(error, full, model))


def _spellings(value: Any) -> list[Any]:
    """The value, then what other readers of YAML make of it: "1e-4" as a number, 3.0 as 3, yes as true."""
    spellings = [value]
    if isinstance(value, str):
        try:
            spellings.append(float(value))
        except ValueError:
            words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
            spellings += [words[value.lower()]] if value.lower() in words else []
    number = spellings[-1]
    if isinstance(number, float) and number.is_integer():
        spellings.append(int(number))
    return spellings


def _sorted(items: Mapping[str, Item], model: type[Section]) -> dict[str, Item]:
    """In the order of the settings, which is the order recipes are read in."""
    order = list(model.model_fields)
    return dict(sorted(items.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def text_of(draft: Draft, head: str, foot: str) -> str:
    """The recipe as YAML; a comment beside each value says where it came from."""
    lines = [*_comment(head), *_keys(draft.top, ""), "stages:", f"  - {draft.method}:"]
    indent = " " * 6
    for name, entries in (("datasets", draft.datasets), ("eval_datasets", draft.eval_datasets)):
        if entries:
            lines.append(f"{indent}{name}:")
        for entry in entries:
            first, *others = _keys(_sorted(entry, DatasetSettings), "")
            lines += [f"{indent}  - {first}", *(f"{indent}    {line}" for line in others)]
    for key, item in _sorted(draft.stage, METHODS[draft.method]).items():
        lines += _keys({key: item}, indent)
        if key == "adapter" and draft.lora:
            lines += [f"{indent}lora:", *_keys(_sorted(draft.lora, LoraSettings), indent + "  ")]
    return "\n".join([*lines, *_comment(foot)]) + "\n"


def _keys(items: Mapping[str, Item], indent: str) -> list[str]:
    return [f"{indent}{key}: {_written(item.value)}  # {_one_line(item.origin)}" for key, item in items.items()]


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str) and PLAIN.fullmatch(value) and not value.endswith(":") and read_yaml(value).data == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> list[str]:
    return [f"# {line}".rstrip() for line in text.splitlines()]


def _one_line(text: str) -> str:
    return " ".join(text.split())
