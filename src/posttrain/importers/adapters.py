"""Adapters: which one, on which base, and its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.importers import scoring
from posttrain.importers.draft import Item
from posttrain.importers.job import Job
from posttrain.importers.ledger import Added, is_on
from posttrain.recipe.yaml_lines import KeyPath

FULL = "all weights are trained, so there is no adapter"
PLAIN_BASE = (
    "the frozen base is not quantised to {bits} bits: it takes more memory, and learning is otherwise the same."
)
PEFT_CHOICE = (
    "{tool} leaves the adapted layers to peft, mostly q_proj and v_proj; here they are all linear layers. To keep its "
    "choice, set lora: {{target_modules: [q_proj, v_proj]}}."
)


def choose(
    job: Job,
    said: list[KeyPath],
    *,
    on: bool,
    four: list[KeyPath],
    eight: list[KeyPath],
    dora: str,
    qlora: bool = False,
) -> None:
    """`said`: keys that ask for an adapter. `four`, `eight`: keys that ask for a quantised base; `qlora`: the adapter's
    own name asks for one."""
    four_bit = qlora or any(is_on(job.get(*at)) or job.get(*at) in (4, "4") for at in four)
    eight_bit = any(is_on(job.get(*at)) or job.get(*at) in (8, "8") for at in eight)
    wants_dora = is_on(job.get(dora))
    if not on:
        if said:
            job.draft.put("adapter", "none", _origin(job, said))
        _settle(job, said, "none")
        job.not_needed([*four, *eight, (dora,)], FULL)
        return
    kind = "lora"
    if four_bit and not job.draft.fitting("adapter", "qlora")[1]:
        kind = "qlora"
    elif wants_dora and not four_bit and not job.draft.fitting("adapter", "dora")[1]:
        kind = "dora"
    job.draft.put("adapter", kind, _origin(job, said))
    _settle(job, said, kind)
    if not said:
        job.added.append(Added("adapter", kind, f"{job.tool}'s default"))
    if kind == "qlora":
        _settle(job, [at for at in four if job.ledger.says(*at)], kind)
    elif four_bit:
        job.lost(four, PLAIN_BASE.format(bits=4))
    if eight_bit:
        job.lost(eight, PLAIN_BASE.format(bits=8))
    job.not_needed([at for at in (*four, *eight) if job.ledger.says(*at)], "is off")
    if kind == "dora":
        _settle(job, [(dora,)], kind)
    elif wants_dora:
        job.lost(dora, "plain LoRA is trained: this version has no adapter that is both." if four_bit else "use LoRA.")


def _origin(job: Job, said: list[KeyPath]) -> str:
    return "; ".join(job.origin(at) for at in said) or f"{job.tool}'s default"


def _settle(job: Job, keys: list[KeyPath], kind: str) -> None:
    for at in keys:
        job.ledger.carried(at, "adapter", kind)


def quantisation(job: Job, kind: KeyPath, nested: KeyPath, others: list[KeyPath]) -> None:
    """How a 4-bit base is quantised: in NormalFloat, its constants once more."""
    said = [at for at in (kind, nested, *others) if job.ledger.says(*at)]
    if job.draft.value("adapter", "none") != "qlora":
        job.not_needed(said, "the base is not quantised to 4 bits")
        return
    if job.get(*kind) == "nf4":
        _settle(job, [kind], "qlora")
    elif job.ledger.says(*kind):
        job.lost([kind], "a 4-bit base is in NormalFloat, nf4: its rounding differs.")
    if is_on(job.get(*nested)):
        _settle(job, [nested], "qlora")
    elif job.ledger.says(*nested):
        job.not_needed([nested], "the constants are quantised as well, which takes less memory")
    job.not_needed([at for at in others if job.ledger.says(*at)], "dtype says what is computed in")


def keys(job: Job, names: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
    """`names`: their key: our key in `lora`. `defaults`: what the tool takes where the file is silent."""
    if job.draft.value("adapter", "none") == "none":
        job.not_needed([(key,) for key in names], FULL)
        return
    for theirs, ours in names.items():
        value = job.get(theirs)
        if isinstance(value, bool) and not value:
            job.not_needed(theirs, "is off")
        elif value is not None:
            value = scoring.without_heads(job, (theirs,), value) if ours == "modules_to_save" else value
            if value is not None and job.ledger.open((theirs,)):
                job.move((theirs,), f"lora.{ours}", value)
    for ours, value in defaults.items():
        job.add(f"lora.{ours}", value, f"{job.tool}'s default")


def targets(job: Job, at: KeyPath, everything: tuple[str, ...]) -> None:
    """Adapted layers: a list, a comma list, a word for all of them, or a regular expression for whole paths."""
    value = job.get(*at)
    alone = value[0] if isinstance(value, list) and len(value) == 1 else None
    if isinstance(alone, str) and (alone in everything or _is_expression(alone)):
        value = alone
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if job.draft.value("adapter", "none") == "none":
        job.not_needed([at], FULL)
    elif isinstance(value, str) and value in everything:
        job.move(at, "lora.target_modules", "all-linear")
    elif isinstance(value, str) and _is_expression(value):
        try:
            re.compile(value)
        except re.error as e:
            job.lost([at], f"it is no regular expression: {e}. List the layers' names.")
            return
        job.move(at, "lora.target_modules", value)
    elif names:
        job.move(at, "lora.target_modules", names)


def _is_expression(value: str) -> bool:
    return any(sign in value for sign in "*\\|^$([+?")


def loraplus(job: Job, key: str) -> None:
    """LoRA+ is a switch and a ratio here."""
    if job.draft.value("adapter", "none") == "none":
        job.not_needed(key, FULL)
    elif job.number(key) and job.move((key,), "lora.loraplus_lr_ratio", remedy="A and B learn at one rate."):
        job.draft.lora["loraplus"] = Item(True, job.origin((key,)))
