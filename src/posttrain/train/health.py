"""Rules that watch a run and stop it, naming the cause and the one setting to change."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.errors import TrainingStopped
from posttrain.losses.terms import Mean

DEAD_STEPS = 5  # batches in a row without any spread in reward before the run is stopped


def after_dead_batch(n_dead: int, metrics: Mapping[str, Mean]) -> None:
    """Call with the number of batches in a row in which no group had any spread, this one included."""
    if n_dead < DEAD_STEPS:
        return
    reward, cut = metrics["reward"].value, metrics["cut_share"].value
    if cut > 0.5:
        cause, remedy = f"{cut:.0%} of the answers were cut before they ended", "Raise max_completion_length."
    elif reward > 0.99:
        cause, remedy = "every answer is already right", "Give harder prompts."
    elif reward < 0.01:
        cause = "no answer earned anything"
        remedy = "Run SFT on this format first, give easier prompts, or add a reward with partial credit."
    else:
        cause, remedy = "all answers of a group earn the same", "Raise temperature or num_generations."
    raise TrainingStopped(
        f"the reward signal is dead: for {n_dead} batches no group had two different rewards; {cause} "
        f"(mean reward {reward:.3g}).",
        remedy=remedy,
    )
