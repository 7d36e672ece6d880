"""From judged answers to what a policy loss needs of each token. Plain numbers and small tensors; no model.

Axes: K rewards, P prompts, G answers of a prompt's group, T scored tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import TrainingStopped
from posttrain.losses.advantage import (
    ADVANTAGES,
    Rewards,
    combine,
    group_std,
    has_spread,
    n_verdicts,
    points_the_wrong_way,
)
from posttrain.losses.kl import KL_ESTIMATORS
from posttrain.losses.policy import kl_figures
from posttrain.losses.terms import Mean
from posttrain.records import Branch, Completion, Status, Tree
from posttrain.rollout.collect import Judged, Rollout
from posttrain.settings import GRPOSettings
from posttrain.train.kl_control import refuse_impossible_kl

RIGHT, WRONG = 1.0 - 1e-9, 1e-9  # of rewards between 0 and 1

# Log-probs of the scored tokens of each tree, branch after branch.
TokenLogps = Callable[[Sequence[Tree]], list[tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with the answers that carry loss. One number per scored token, answer after answer."""

    tree: Tree
    advantages: tuple[float, ...]
    sampler_logps: tuple[float, ...]
    old_logps: tuple[float, ...] | None = None  # the trainer's when sampling ended, where the ratio is taken from them


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt's part of the round. `item` is None where nothing of it is worth a forward pass; the answers and tokens
    with a verdict are counted all the same."""

    item: Item | None
    n_answers: int
    n_tokens: int
    advantages: tuple[tuple[float, ...] | None, ...]  # by answer, one per scored token; None without a verdict


@dataclass(frozen=True, slots=True)
class Credited:
    groups: tuple[Group, ...]  # one per rollout, in order
    metrics: Mapping[str, Mean]

    @property
    def dead(self) -> bool:
        return not any(any(g.item.advantages) for g in self.groups if g.item is not None)


def credit(
    rollouts: Sequence[Rollout], s: GRPOSettings, weights: Mapping[str, float], reference: TokenLogps | None = None
) -> Credited:
    """Rewards, shaped and combined, to one advantage per token. `weights`: of each reward by its label; `reference`:
    where a KL belongs into the reward."""
    if not rollouts:
        return Credited((), {})
    reward_PG = combined_rewards(rollouts, s, weights)
    metrics: dict[str, Mean] = {}
    if s.overlong_buffer is not None:
        lost_PG = _grid(rollouts, lambda a: overlong(len(a.completion.token_ids), s))
        metrics["overlong_penalty"] = Mean(float(lost_PG[~reward_PG.isnan()].sum()), int((~reward_PG.isnan()).sum()))
        reward_PG = reward_PG + lost_PG
    mask_PGT = _scored(rollouts)
    penalty_PGT = None
    if reference is not None and s.beta > 0 and s.kl_in == "reward":
        sampled_PGT, reference_PGT = _log_probs(rollouts, reference, mask_PGT)
        penalty_PGT = s.beta * torch.where(mask_PGT, KL_ESTIMATORS[s.kl_estimator](sampled_PGT, reference_PGT), 0.0)
        metrics |= kl_figures(sampled_PGT[mask_PGT], reference_PGT[mask_PGT], s.kl_estimator)
    rewards = Rewards(reward_PG, mask_PGT, penalty_PGT, s.gamma)
    advantage_PGT = ADVANTAGES[s.advantage](rewards)
    if points_the_wrong_way(s.advantage, rewards, advantage_PGT):
        raise TrainingStopped(
            f"the advantages of `{s.advantage}` fall where rewards rise: training would make the better answers rarer.",
            remedy="This is a fault in the computation of advantages, not of the data. Use another `advantage`.",
        )
    # A KL or entropy term in the loss reaches tokens whose advantage is 0.
    everything = (s.beta > 0 and s.kl_in == "loss") or s.entropy_coef > 0
    groups = [
        _group(r, reward_G, advantage_GT, everything)
        for r, reward_G, advantage_GT in zip(rollouts, reward_PG, advantage_PGT, strict=True)
    ]
    return Credited(tuple(groups), metrics)


def combined_rewards(rollouts: Sequence[Rollout], s: GRPOSettings, weights: Mapping[str, float]) -> Tensor:
    """(P, G) float64, NaN where an answer has no verdict or is masked."""
    total_PG = _grid(rollouts, lambda a: _value(a, s, a.score.total.value))
    if s.reward_combination == "sum_then_normalize":
        return total_PG
    reward_KPG = torch.stack([_grid(rollouts, partial(_part, s=s, label=label)) for label in weights])
    weight_K = torch.tensor(list(weights.values()), dtype=torch.float64)
    return combine(reward_KPG, weight_K, normalise_first=True)


def learns(rollout: Rollout, s: GRPOSettings, weights: Mapping[str, float]) -> bool:
    """Whether the group has two answers that earned unlike rewards, combined as credit combines them, before any
    shaping: rewards that cancel when they are summed may not when each is normalised, and the other way round."""
    return bool(has_spread(combined_rewards([rollout], s, weights))[0])


def is_partial(rollout: Rollout, s: GRPOSettings) -> bool:
    """More answers lack a verdict, for a failed checker or engine, than the ceiling allows: what is left of the group
    is a biased sample of it."""
    failed = sum(a.score.total.value is None for a in rollout.answers)
    return failed > s.max_checker_failure_rate * len(rollout.answers)


def group_figures(rollouts: Sequence[Rollout], s: GRPOSettings, weights: Mapping[str, float]) -> dict[str, Mean]:
    """Shares are of all groups; `reward_std` is the mean of the groups' own, of those with two verdicts or more.
    Spread is of what credit is taken from, the others of the weighted sums."""
    reward_PG = _grid(rollouts, lambda a: _value(a, s, a.score.total.value))
    known_P = n_verdicts(reward_PG) > 0
    low_P = reward_PG.nan_to_num(nan=torch.inf).amin(1)
    high_P = reward_PG.nan_to_num(nan=-torch.inf).amax(1)
    several_P = n_verdicts(reward_PG) > 1
    n = len(rollouts)
    return {
        "zero_spread_share": Mean(float((~has_spread(combined_rewards(rollouts, s, weights))).sum()), n),
        "all_right_share": Mean(float((known_P & (low_P >= RIGHT)).sum()), n),
        "all_wrong_share": Mean(float((known_P & (high_P <= WRONG)).sum()), n),
        "reward_std": Mean(float(group_std(reward_PG)[several_P].sum()), int(several_P.sum())),
    }


def overlong(n_tokens: int, s: GRPOSettings) -> float:
    """min(−(n − (L − b)) / b · f, 0), L the longest answer, b the buffer, f the penalty (Yu et al. 2025, eq. 13)."""
    assert s.overlong_buffer is not None
    over = n_tokens - (s.max_completion_length - s.overlong_buffer)
    return min(-over / s.overlong_buffer * s.overlong_penalty, 0.0)


def item_state(item: Item) -> dict[str, Any]:
    """Plain values, for a checkpoint."""
    branches = [{"token_ids": b.token_ids, "scored": b.scored} for b in item.tree.branches]
    tree = {"id": item.tree.id, "trunk_ids": item.tree.trunk_ids, "branches": branches}
    return {
        "tree": tree,
        "advantages": item.advantages,
        "sampler_logps": item.sampler_logps,
        "old_logps": item.old_logps,
    }


def item_of(stored: Mapping[str, Any]) -> Item:
    tree = stored["tree"]
    branches = tuple(Branch(tuple(b["token_ids"]), tuple(b["scored"])) for b in tree["branches"])
    old = stored["old_logps"]
    return Item(
        Tree(tree["id"], tuple(tree["trunk_ids"]), branches),
        tuple(stored["advantages"]),
        tuple(stored["sampler_logps"]),
        None if old is None else tuple(old),
    )


def _value(answer: Judged, s: GRPOSettings, value: float | None) -> float | None:
    masked = s.mask_truncated_completions and answer.completion.status is Status.CUT
    return None if masked else value


def _part(answer: Judged, s: GRPOSettings, label: str) -> float | None:
    return _value(answer, s, answer.score.parts[label].value)


def _grid(rollouts: Sequence[Rollout], of: Callable[[Judged], float | None]) -> Tensor:
    """(P, G) float64; NaN for None, and where a group has fewer answers than the largest."""
    out_PG = torch.full((len(rollouts), max(len(r.answers) for r in rollouts)), torch.nan, dtype=torch.float64)
    for p, rollout in enumerate(rollouts):
        for g, answer in enumerate(rollout.answers):
            if (value := of(answer)) is not None:
                out_PG[p, g] = value
    return out_PG


def _scored(rollouts: Sequence[Rollout]) -> Tensor:
    """(P, G, T) bool: true for as many tokens as each answer has scored ones."""
    n_PG = _grid(rollouts, lambda a: float(sum(a.completion.branch.scored))).nan_to_num(nan=0.0).long()
    return torch.arange(max(1, int(n_PG.max()))) < n_PG[:, :, None]


def _log_probs(rollouts: Sequence[Rollout], reference: TokenLogps, mask_PGT: Tensor) -> tuple[Tensor, Tensor]:
    """(P, G, T) log-probs under the policy that sampled and under the reference, 0 outside the mask."""
    trees = [Tree(r.task.id, r.prompt_ids, tuple(a.completion.branch for a in r.answers)) for r in rollouts]
    found = reference(trees)
    sampled_PGT, reference_PGT = (torch.zeros(mask_PGT.shape, dtype=torch.float64) for _ in range(2))
    for p, (rollout, of_tree) in enumerate(zip(rollouts, found, strict=True)):
        start = 0
        for g, answer in enumerate(rollout.answers):
            own = answer.completion.sampled_logps
            sampled_PGT[p, g, : len(own)] = torch.tensor(own, dtype=torch.float64)
            there = of_tree[start : start + len(own)]
            reference_PGT[p, g, : len(own)] = torch.tensor(there, dtype=torch.float64)
            start += len(own)
    k1_n = KL_ESTIMATORS["k1"](sampled_PGT, reference_PGT)[mask_PGT]
    refuse_impossible_kl(float(k1_n.sum()), len(k1_n))
    return sampled_PGT, reference_PGT


def _group(rollout: Rollout, reward_G: Tensor, advantage_GT: Tensor, everything: bool) -> Group:
    live: list[tuple[Completion, list[float]]] = []
    all_advantages: list[tuple[float, ...] | None] = []
    n_answers = n_tokens = 0
    n_all = len(rollout.answers)  # fewer than G where another group has more
    for answer, reward, advantage_T in zip(rollout.answers, reward_G[:n_all], advantage_GT[:n_all], strict=True):
        if bool(reward.isnan()):
            all_advantages.append(None)
            continue
        n = sum(answer.completion.branch.scored)
        n_answers, n_tokens = n_answers + 1, n_tokens + n
        advantages = advantage_T[:n].tolist()
        all_advantages.append(tuple(advantages))
        if n and (everything or any(advantages)):
            live.append((answer.completion, advantages))
    item = Item(
        Tree(rollout.task.id, rollout.prompt_ids, tuple(c.branch for c, _ in live)),
        tuple(x for _, advantages in live for x in advantages),
        tuple(x for c, _ in live for x in c.sampled_logps),
    )
    return Group(item if live else None, n_answers, n_tokens, tuple(all_advantages))
