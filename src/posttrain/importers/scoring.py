"""Stages that make a reward model, as far as the tools share them."""

from __future__ import annotations

from typing import Any

from posttrain.importers.job import Job
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe.rules_adapter import OUTPUT_LAYERS
from posttrain.recipe.yaml_lines import KeyPath
from posttrain.settings import SCORES_ANSWERS

HEADS = OUTPUT_LAYERS | {"score", "v_head", "value_head", "classifier"}
TRAINS_ANYWAY = "the score trains in full anyway, and there is no other output layer"
NEVER_CUT = "a score is read at the end of an answer, so a longer one is dropped, not cut"
MARGINS = "TRL subtracts a column `margin` where the rows have one; here margin: column asks for it."
STEP_END = "steps are lines of their own"
LAST_ONLY = "the label of every step is learnt; leave the others out of the rows."


def makes_scores(job: Job) -> bool:
    return job.draft.method in SCORES_ANSWERS


def overflow(job: Job, value: str, why: str) -> None:
    """What happens to rows that are too long, where the file does not say it."""
    if makes_scores(job):
        job.add("on_overflow", "drop", NEVER_CUT)
    else:
        job.add("on_overflow", value, why)


def without_heads(job: Job, at: KeyPath, names: Any) -> Any:
    """The modules that train in full, without the score; None where nothing else is left, and `at` is settled."""
    listed = names if isinstance(names, list) else [name.strip() for name in str(names).split(",")]
    kept = [name for name in listed if not (isinstance(name, str) and name.rpartition(".")[2] in HEADS)]
    if not makes_scores(job) or len(kept) == len(listed):
        return names
    if not kept:
        job.not_needed([at], TRAINS_ANYWAY)
        return None
    job.note(f"{', '.join(str(name) for name in listed if name not in kept)} left out: {TRAINS_ANYWAY}.")
    return kept


def steps(job: Job, separator: KeyPath, last_only: KeyPath) -> None:
    """How a process reward model's rows are read."""
    said = job.get(*separator)
    if said == "\n":
        job.not_needed([separator], STEP_END)
    elif said is not None:
        job.lost([separator], f"{STEP_END}; no other text can end them.")
    if job.ledger.says(*last_only):
        if is_off(job.get(*last_only)) or not is_on(job.get(*last_only)):
            job.not_needed([last_only], "is off")
        job.lost([last_only], LAST_ONLY)
