"""Best-of-N: of several answers to a prompt the one that a reward model likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from posttrain.cli.open_model import locate
from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.records import Completion, Message
    from posttrain.rollout.scorer import Verdict


@dataclass(frozen=True, slots=True)
class BestOf:
    """What --best-of and --reward ask for."""

    n: int
    reward: str
    aggregate: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """All answers to one prompt with what the reward model said of each; `best` is the place of the chosen one."""

    completions: Sequence[Completion]
    verdicts: Sequence[Verdict]
    best: int

    def told(self, reward: str) -> str:
        found = self.verdicts[self.best]
        n_scored = sum(v.value is not None for v in self.verdicts)
        unread = len(self.verdicts) - n_scored
        left_out = f", {unread} not whole or not readable" if unread else ""
        return f"best of {len(self.verdicts)} by {reward}: {found.value:.3f}{left_out}"

    def fields(self, sample: int) -> dict[str, Any]:
        verdict = self.verdicts[sample]
        return {"value": verdict.value, "scores": list(verdict.scores), "best": sample == self.best}


def best_of_option(n: int | None, reward: str | None, aggregate: str, samples: int) -> BestOf | None:
    """None where neither was asked for."""
    if n is None and reward is None:
        return None
    if n is None or reward is None:
        missing = "--reward NAME" if reward is None else "--best-of N"
        raise RecipeError("--best-of and --reward go together.", remedy=f"Add {missing}.")
    if samples > 1:
        raise RecipeError("--samples and --best-of both say how many answers to sample.", remedy="Remove --samples.")
    from posttrain.losses.reward import STEP_AGGREGATES

    if aggregate not in STEP_AGGREGATES:
        known = ", ".join(STEP_AGGREGATES)
        raise RecipeError(f"--aggregate {aggregate} is unknown.", remedy=f"There are: {known}.")
    return BestOf(n, reward, aggregate)


def rank(
    asked: BestOf, prompts: Sequence[tuple[Message, ...]], answers: Sequence[Sequence[Completion]], home: Path
) -> list[Ranked]:
    """Only whole answers are ranked: the score of a cut one is of something else."""
    from posttrain.records import Status
    from posttrain.rollout.scorer import Answer, Verdict, open_scorer

    found = locate(asked.reward, home)
    scorer = open_scorer(found.source, found.label, aggregate=asked.aggregate)
    for note in scorer.model.notes:
        typer.echo(f"note: {note}", err=True)
    ranked = []
    for messages, completions in zip(prompts, answers, strict=True):
        whole = [i for i, c in enumerate(completions) if c.status is Status.FINISHED]
        verdicts = [Verdict(None, detail=c.status.value) for c in completions]
        for i, verdict in zip(
            whole, scorer.answers([Answer(messages, completions[i].text) for i in whole]), strict=True
        ):
            verdicts[i] = verdict
        scored = [i for i, v in enumerate(verdicts) if v.value is not None]
        if not scored:
            raise DataError(
                f"none of {len(completions)} answers could be ranked: {verdicts[0].detail}.",
                where=messages[-1].content[:60],
                remedy="Raise --max-new-tokens, so that answers end.",
            )
        ranked.append(Ranked(completions, verdicts, max(scored, key=lambda i: _order(verdicts[i]))))
    return ranked


def _order(verdict: Verdict) -> tuple[float, float]:
    """By value; where that is the same number to the last bit (σ of a large score), by the scores themselves."""
    return (verdict.value if verdict.value is not None else -1.0, sum(verdict.scores) / len(verdict.scores))
