"""One round of rollouts: which prompts are asked, how often, and what is thrown away before anything is learned from.

Nothing here has a history of its own but the pass rates of `prompt_order: difficulty`: prompts and seeds follow from
the round's number, so that a run that was killed in the middle of a round asks the same again.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.losses.terms import Mean
from posttrain.methods.group_credit import group_figures, is_partial, learns
from posttrain.records import Completion, Sampling, Task
from posttrain.reporting import Reporter
from posttrain.rewards.mix import MixScore
from posttrain.rollout.collect import Rollout, collect, figures, refuse_failures
from posttrain.rollout.engine import Engine
from posttrain.rollout.judges import Judges
from posttrain.rollout.trust import refuse_lost_ends, refuse_misaligned, refuse_stale
from posttrain.seeds import derive_seed
from posttrain.settings import GRPOSettings

NEW_RATE_SHARE = 0.5  # of the running pass rate is this round's: the policy that earned the old ones is gone
LEAST_WEIGHT = 0.01  # a prompt that is always solved, or never, comes back now and then
LEAST_YIELD = 0.25  # of the prompts asked again; what fewer yield is asked for in the next round


@dataclass(frozen=True, slots=True)
class Round:
    """`rollouts` are whole groups to learn from; `metrics` speak of all that were sampled, dropped ones included."""

    rollouts: tuple[Rollout, ...]
    dropped: tuple[Rollout, ...]  # sampled, and not learned from
    metrics: dict[str, Mean]
    n_sampled: int  # times prompts were asked for, the first included


@dataclass
class Rounds:
    engine: Engine
    rewards: Judges
    tasks: Sequence[Task]
    prompt_ids: Callable[[Task], tuple[int, ...]]
    planned: Sequence[tuple[int, ...]]  # task indices of each round, as shuffled
    settings: GRPOSettings
    sampling: Sampling
    seed: int
    label: str
    reporter: Reporter
    pass_rates: dict[int, float] = field(default_factory=dict)  # running mean reward by task, of those asked so far

    def sample(self, number: int, version: int) -> Round:
        """Round `number` (from 0), by the weights of `version`."""
        s = self.settings
        wanted = self._first(number)
        judges = Timed(self.rewards)
        asked: list[int] = list(wanted)
        sampled = self._ask(wanted, judges, number, 0, version)
        kept = [r for r in sampled if self._keeps(r)]
        n_times = 1
        while s.dynamic_sampling and len(kept) < len(wanted) and n_times < s.max_sampling_rounds:
            missing = len(wanted) - len(kept)
            n = min(len(wanted), math.ceil(missing / max(len(kept) / len(sampled), LEAST_YIELD)))
            further = self._further(number, n_times, asked, n)
            if not further:
                break
            asked += further
            more = self._ask(further, judges, number, n_times, version, before=sampled)
            sampled += more
            kept += [r for r in more if self._keeps(r)]
            n_times += 1
        kept = kept[: len(wanted)]
        self._say_unfilled(number, len(kept), len(wanted), len(sampled))
        metrics = figures(sampled) | group_figures(sampled, s, self.rewards.weights)
        metrics |= {
            "reward_seconds": Mean(judges.seconds, 1),
            "dropped_groups": Mean(len(sampled) - len(kept), 1),
            "resampled_groups": Mean(len(sampled) - len(wanted), 1),
        }
        learned_from = {id(r) for r in kept}
        dropped = tuple(r for r in sampled if id(r) not in learned_from)
        return Round(tuple(kept), dropped, metrics, n_times)

    def state(self) -> dict[str, Any]:
        return {"pass_rates": dict(self.pass_rates)}

    def restore(self, state: dict[str, Any]) -> None:
        self.pass_rates = dict(state["pass_rates"])

    def _ask(
        self,
        indices: Sequence[int],
        judges: Timed,
        number: int,
        again: int,
        version: int,
        before: Sequence[Rollout] = (),
    ) -> list[Rollout]:
        parts = ("rollout", number) if not again else ("rollout", number, again)
        rollouts = collect(
            self.engine,
            judges,  # type: ignore[arg-type]
            [self.tasks[i] for i in indices],
            self.prompt_ids,
            self.sampling,
            n_answers=self.settings.num_generations,
            seed=derive_seed(self.seed, *parts),
        )
        refuse_failures([*before, *rollouts], self.settings.max_checker_failure_rate)
        completions = [a.completion for r in rollouts for a in r.answers]
        refuse_stale(completions, version)
        refuse_misaligned(completions)
        refuse_lost_ends(completions, self.sampling.stop_token_ids)
        if self.settings.prompt_order == "difficulty":
            for i, rollout in zip(indices, rollouts, strict=True):
                self._note(i, rollout)
        return rollouts

    def _keeps(self, rollout: Rollout) -> bool:
        if is_partial(rollout, self.settings):
            return False
        return not self.settings.dynamic_sampling or learns(rollout, self.settings, self.rewards.weights)

    def _first(self, number: int) -> Sequence[int]:
        planned = self.planned[number]
        if self.settings.prompt_order == "shuffled":
            return planned
        return self._by_difficulty(range(len(self.tasks)), len(planned), number, 0)

    def _further(self, number: int, again: int, asked: Sequence[int], n: int) -> Sequence[int]:
        """Prompts that this round has not asked yet; none when all were."""
        rest = sorted(set(range(len(self.tasks))) - set(asked))
        if self.settings.prompt_order == "difficulty":
            return self._by_difficulty(rest, min(n, len(rest)), number, again)
        return random.Random(derive_seed(self.seed, "further", number, again)).sample(rest, min(n, len(rest)))

    def _by_difficulty(self, among: Sequence[int], n: int, number: int, again: int) -> list[int]:
        """A draw without replacement, each prompt weighted by p(1 − p) of its pass rate p; a prompt nobody asked yet
        counts as ½. Keys u^(1/w) as in Efraimidis and Spirakis 2006."""
        rng = random.Random(derive_seed(self.seed, "difficulty", number, again))
        keys = {}
        for i in among:
            rate = self.pass_rates.get(i, 0.5)
            keys[i] = rng.random() ** (1.0 / max(rate * (1.0 - rate), LEAST_WEIGHT))
        return sorted(among, key=keys.__getitem__, reverse=True)[:n]

    def _note(self, index: int, rollout: Rollout) -> None:
        values = [a.score.total.value for a in rollout.answers]
        known = [v for v in values if v is not None]
        if not known:
            return
        now = sum(known) / len(known)
        before = self.pass_rates.get(index, now)
        self.pass_rates[index] = before + NEW_RATE_SHARE * (now - before)

    def _say_unfilled(self, number: int, n_kept: int, n_wanted: int, n_sampled: int) -> None:
        if self.settings.dynamic_sampling and n_kept < n_wanted:
            self.reporter.line(
                f"{self.label}: warning: in round {number + 1}, {n_kept} of {n_wanted} groups have two different "
                f"rewards, after {n_sampled} were sampled; the step learns from these. Give prompts that are neither "
                "too easy nor too hard, or raise num_generations or max_sampling_rounds."
            )


class Timed:
    """The rewards, with a clock."""

    def __init__(self, rewards: Judges) -> None:
        self._rewards, self.seconds = rewards, 0.0

    def score(self, completions: Sequence[Completion], tasks: Sequence[Task]) -> list[MixScore]:
        began = time.monotonic()
        try:
            return self._rewards.score(completions, tasks)
        finally:
            self.seconds += time.monotonic() - began
