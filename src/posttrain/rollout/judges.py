"""Checkers and reward models as one reward: the weighted mean of what they say, and penalties on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from posttrain.records import Completion, Outcome, Score, Status, Task
from posttrain.rewards import mix
from posttrain.rewards.mix import MixScore, RewardMix, Weighted, total
from posttrain.rewards.proof import prove, unproven
from posttrain.rewards.sandbox.level import Level
from posttrain.rollout.scorer import Answer, Scorer, Verdict
from posttrain.settings import ScorerSettings
from posttrain.settings.reward import REWARD_MODEL, Entries, checkers_of, scorers_of

OpenScorer = Callable[[ScorerSettings], Scorer]


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One reward model as the recipe wants it."""

    label: str  # "reward_model", or "reward_model-2" for the second
    scorer: Scorer
    weight: float


@dataclass(frozen=True)
class Judges:
    """`checkers` is None where only models judge."""

    checkers: RewardMix | None
    models: tuple[ModelPart, ...] = ()

    def score(
        self, completions: Sequence[Completion], tasks: Sequence[Task], *, score_cut: bool = False
    ) -> list[MixScore]:
        """As `RewardMix.score`: a cut answer is worth the least there is, one that could not be judged has no value."""
        if self.checkers is not None:
            checked = self.checkers.score(completions, tasks, score_cut=score_cut)
            if not self.models:
                return checked
        else:
            checked = [_unchecked(c, score_cut) for c in completions]
        open_places = [i for i, found in enumerate(checked) if found.total.outcome is Outcome.SCORED]
        asked = [Answer(tasks[i].prompt, completions[i].text) for i in open_places]
        columns = {
            part.label: dict(zip(open_places, map(_score_of, part.scorer.answers(asked)), strict=True))
            for part in self.models
        }
        return [self._total(found, {name: c.get(i) for name, c in columns.items()}) for i, found in enumerate(checked)]

    def _total(self, checked: MixScore, opinions: Mapping[str, Score | None]) -> MixScore:
        """A reward model pays 0 to 1, so that a cut answer gets 0 of it."""
        rest = Score(0.0, Outcome.CUT) if checked.total.outcome is Outcome.CUT else checked.total
        said = {label: score or rest for label, score in opinions.items()}
        parts = {**checked.parts, **said}
        if checked.total.value is None:
            return MixScore(checked.total, parts, checked.seconds)
        of_checkers = [] if self.checkers is None else self.checkers.weighted(checked.parts)
        of_models = [Weighted(part.label, part.weight, False, said[part.label]) for part in self.models]
        return MixScore(total([*of_checkers, *of_models]), parts, checked.seconds)

    @property
    def weights(self) -> dict[str, float]:
        """What each reward counts, by its label; a rubric counts as one."""
        checked = {} if self.checkers is None else self.checkers.weights
        return checked | {part.label: part.weight for part in self.models}

    @property
    def penalties(self) -> frozenset[str]:
        """The labels of rewards that can only take away: 0 is the best they give."""
        parts = () if self.checkers is None else self.checkers.parts
        return frozenset(part.label for part in parts if part.is_penalty)

    def doubts(self, tasks: Sequence[Task]) -> list[str]:
        """Checkers prove themselves on these rows, or DataError; what nothing proves is said."""
        said = [] if self.checkers is None else unproven(self.checkers, prove(self.checkers, tasks))
        opinions = [
            f"the reward {part.label} is the opinion of {part.scorer.label}: no gold answer proves it, and a policy "
            "that is trained against it finds its mistakes. Judge the result by a suite that it has no part in."
            for part in self.models
        ]
        return said + opinions

    @property
    def sandboxes(self) -> list[Level]:
        """How the programs of a model are contained, for the rewards that run some."""
        return [] if self.checkers is None else self.checkers.sandboxes

    def close(self) -> None:
        if self.checkers is not None:
            self.checkers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_judges(rewards: Entries, open_scorer: OpenScorer | None) -> Judges:
    """The rewards of a recipe; `open_scorer` loads the reward models among them."""
    models: list[ModelPart] = []
    for settings in scorers_of(rewards):
        assert open_scorer is not None, "nobody said where reward models are"
        label = REWARD_MODEL if not models else f"{REWARD_MODEL}-{len(models) + 1}"
        models.append(ModelPart(label, open_scorer(settings), settings.weight))
    checkers = checkers_of(rewards)
    return Judges(mix.build(checkers, alone=not models) if checkers or not models else None, tuple(models))


def _unchecked(completion: Completion, score_cut: bool) -> MixScore:
    if completion.status is Status.FAILED:
        return MixScore(Score(None, Outcome.CHECKER_FAILED, f"nothing to check: {completion.detail}"), {})
    if completion.status is Status.CUT and not score_cut:
        return MixScore(Score(0.0, Outcome.CUT), {})
    return MixScore(Score(0.0, Outcome.SCORED), {})


def _score_of(verdict: Verdict) -> Score:
    if verdict.value is None:
        return Score(None, Outcome.CHECKER_FAILED, verdict.detail)
    return Score(verdict.value, Outcome.SCORED)
