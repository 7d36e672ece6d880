"""Rules across the keys of adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from posttrain.recipe.faults import show
from posttrain.settings import SCORES_ANSWERS

if TYPE_CHECKING:
    from posttrain.recipe.rules import StageView

OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "output_layer"})  # as transformers' decoders call it


def _unread_lora(stage: StageView) -> str | None:
    if stage.says("lora") and stage.settings.adapter == "none":
        return " is set but never read: adapter is none. Set adapter: lora, dora or qlora, or remove lora."
    if stage.says("lora") and "loraplus_lr_ratio" in stage.raw["lora"] and not stage.settings.lora.loraplus:
        return ".loraplus_lr_ratio is set but never read: loraplus is false. Set loraplus: true, or remove it."
    return None


def _impossible_lora(stage: StageView) -> str | None:
    lora = stage.settings.lora
    if stage.settings.adapter == "qlora" and lora.init != "default":
        return (
            f".init = {lora.init} takes its start out of the base weights, which qlora freezes in 4 bits. "
            "Use init: default, or adapter: lora."
        )
    if isinstance(lora.target_modules, str) and lora.target_modules != "all-linear":
        try:
            re.compile(lora.target_modules)
        except re.error as e:
            wrong = f".target_modules = {show(lora.target_modules)} is no regular expression: {e}."
            return f"{wrong} Correct it, or give a list of names."
    return None


def _head_of_a_scorer(stage: StageView) -> str | None:
    """The score is new and trains in full; the output layer it takes the place of is not there any more."""
    if stage.method not in SCORES_ANSWERS:
        return None
    for name in stage.settings.lora.modules_to_save:
        last = name.rpartition(".")[2]
        if last == "score":
            return ".modules_to_save names score, which trains in full anyway. Remove it."
        if last in OUTPUT_LAYERS:
            return (
                f".modules_to_save names {name}, the output layer, which gives way to the score: what it learnt would "
                "be thrown away. Remove it."
            )
    return None


ADAPTER_RULES: tuple[tuple[str, tuple[str, ...], Callable[[StageView], str | None]], ...] = (
    ("lora", ("adapter",), _unread_lora),
    ("lora", ("adapter",), _impossible_lora),
    ("lora", ("adapter",), _head_of_a_scorer),
)
