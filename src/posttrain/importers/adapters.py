"""Adapters: which one, on which base, and its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def choose(job: Job, said: list[KeyPath], *, on: bool, four: list[KeyPath], eight: list[KeyPath], dora: str) -> None:
    """`said`: keys that ask for an adapter. `four`, `eight`: keys that ask for a quantised base."""
    four_bit = any(is_on(job.get(*at)) or job.get(*at) in (4, "4") for at in four)
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
            job.move((theirs,), f"lora.{ours}", value)
    for ours, value in defaults.items():
        job.add(f"lora.{ours}", value, f"{job.tool}'s default")


def targets(job: Job, at: KeyPath, everything: tuple[str, ...]) -> None:
    """Adapted layers: a list, a comma list, or a word for all of them."""
    value = job.get(*at)
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if job.draft.value("adapter", "none") == "none":
        job.not_needed([at], FULL)
    elif isinstance(value, str) and value in everything:
        job.move(at, "lora.target_modules", "all-linear")
    elif isinstance(value, str) and any(sign in value for sign in "*\\|^$("):
        job.move(at, "lora.target_modules", value, remedy="list the layers' names: regular expressions are not read.")
    elif names:
        job.move(at, "lora.target_modules", names)


def loraplus(job: Job, key: str) -> None:
    """LoRA+ is a switch and a ratio here."""
    if job.draft.value("adapter", "none") == "none":
        job.not_needed(key, FULL)
    elif job.number(key) and job.move((key,), "lora.loraplus_lr_ratio", remedy="A and B learn at one rate."):
        job.draft.lora["loraplus"] = Item(True, job.origin((key,)))
