"""Groups of sampled and judged answers, and the figures everybody watches about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.errors import TrainingStopped
from posttrain.losses.terms import Mean
from posttrain.records import Completion, Outcome, Request, Sampling, Status, Task
from posttrain.rewards.mix import MixScore, RewardMix
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.judges import Judges
from posttrain.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Judged:
    """One sampled answer with what the rewards said of it."""

    completion: Completion
    score: MixScore


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt and its group of answers."""

    task: Task
    prompt_ids: tuple[int, ...]
    answers: tuple[Judged, ...]


def collect(
    engine: Engine,
    rewards: RewardMix | Judges,
    tasks: Sequence[Task],
    prompt_ids: Callable[[Task], tuple[int, ...]],
    sampling: Sampling,
    *,
    n_answers: int,
    seed: int,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Sample `n_answers` per task and judge them. Every answer's seed comes from `seed`, the task and its index."""
    requests = [
        Request(t.id, prompt_ids(t), tuple(derive_seed(seed, t.id, i) for i in range(n_answers))) for t in tasks
    ]
    groups = engine.generate(requests, sampling, progress)
    flat = [(c, t) for group, t in zip(groups, tasks, strict=True) for c in group]
    scores = iter(rewards.score([c for c, _ in flat], [t for _, t in flat]))
    return [
        Rollout(task, request.prompt_ids, tuple(Judged(c, next(scores)) for c in group))
        for task, request, group in zip(tasks, requests, groups, strict=True)
    ]


def figures(rollouts: Sequence[Rollout]) -> dict[str, Mean]:
    """Metrics of a batch of rollouts. Shares are of all answers; reward means are of the answers that have a score."""
    answers = [a for r in rollouts for a in r.answers]
    out = {
        "reward": _mean([a.score.total.value for a in answers]),
        "completion_tokens": _mean([float(len(a.completion.token_ids)) for a in answers]),
    }
    labels = dict.fromkeys(label for a in answers for label in a.score.parts)
    out |= {f"reward_{label}": _mean([a.score.parts[label].value for a in answers]) for label in labels}
    shares: dict[str, Callable[[Judged], bool]] = {
        "cut_share": lambda a: a.completion.status is Status.CUT,
        "engine_failed_share": lambda a: a.completion.status is Status.FAILED,
        "checker_failed_share": _checker_failed,
    }
    return out | {name: Mean(sum(map(holds, answers)), len(answers)) for name, holds in shares.items()}


def _mean(values: Sequence[float | None]) -> Mean:
    known = [v for v in values if v is not None]
    return Mean(sum(known), len(known))


def _checker_failed(a: Judged) -> bool:
    broken = a.score.total.outcome in (Outcome.CHECKER_FAILED, Outcome.TIMED_OUT)
    return broken and a.completion.status is not Status.FAILED


def refuse_failures(rollouts: Sequence[Rollout], ceiling: float) -> None:
    """Too many answers without a verdict: training on the rest would be training on a biased sample."""
    answers = [a for r in rollouts for a in r.answers]
    for what, failed in (
        ("the checker failed on", [a.score.total.detail for a in answers if _checker_failed(a)]),
        ("the engine failed on", [a.completion.detail for a in answers if a.completion.status is Status.FAILED]),
    ):
        if len(failed) > ceiling * len(answers):
            raise TrainingStopped(
                f"{what} {len(failed)} of {len(answers)} answers ({len(failed) / len(answers):.0%}), more than "
                f"max_checker_failure_rate {ceiling:.0%}. The first said: {failed[0]}.",
                remedy="Mend the reward or the rows it fails on. Failures are never counted as zeros.",
            )
