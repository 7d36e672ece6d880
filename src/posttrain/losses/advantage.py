"""Credit: how much better an answer, or a token of it, is than was to be expected. No gradients.

Axes: P prompts, G answers of a prompt's group, T scored tokens of an answer.

Rewards are (P, G); NaN marks an answer without a verdict (its checker failed, or it is masked). Such an answer takes no
part in any mean and gets NaN. Where a baseline needs others and there are none (a group of one, or only one verdict),
the advantage is 0: nothing can be said of the answer. A group without spread gets zeros exactly, never 0/1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.losses.gae import returns_to_go, whiten

EPSILON = 1e-6
# A group whose rewards differ by no more than this teaches nothing: every advantage is 0.
ZERO_SPREAD = 1e-9


def group(reward_PG: Tensor) -> Tensor:
    """(r − mean) / (std + 1e-6), sample std (n − 1) (Shao et al. 2024, §4.1.2)."""
    return mean(reward_PG) / (group_std(reward_PG)[:, None] + EPSILON)


def _standardised(reward_PG: Tensor) -> Tensor:
    """(r − mean) / std, sample std; zeros where the group has no spread."""
    std_P1 = group_std(reward_PG)[:, None]
    return mean(reward_PG) / torch.where(std_P1 > 0, std_P1, 1.0)


def mean(reward_PG: Tensor) -> Tensor:
    """r − mean (Liu et al. 2025, Dr. GRPO)."""
    centred_PG = reward_PG - reward_PG.nanmean(1, keepdim=True)
    # Rounding leaves dust where all rewards are equal, and a division by a std of dust would make it a lesson.
    return torch.where(has_spread(reward_PG)[:, None], centred_PG, centred_PG.new_zeros(()) * reward_PG)


def leave_one_out(reward_PG: Tensor) -> Tensor:
    """r − mean of the others = n/(n − 1) · (r − mean) (Ahmadian et al. 2024, RLOO)."""
    n_P1 = n_verdicts(reward_PG)[:, None].to(reward_PG.dtype)
    return mean(reward_PG) * (n_P1 / (n_P1 - 1).clamp(min=1))


def batch(reward_PG: Tensor) -> Tensor:
    """(r − the group's mean) / (std of all rewards of the batch + 1e-6), sample std."""
    known = reward_PG[~reward_PG.isnan()]
    std = known.std() if known.numel() > 1 else known.new_zeros(())
    return mean(reward_PG) / (std + EPSILON)


def n_verdicts(reward_PG: Tensor) -> Tensor:
    """(P,)"""
    return (~reward_PG.isnan()).sum(1)


def group_std(reward_PG: Tensor) -> Tensor:
    """(P,) sample std of the rewards that are known; 0 where there are fewer than two."""
    square_P = (reward_PG - reward_PG.nanmean(1, keepdim=True)).square().nansum(1)
    return (square_P / (n_verdicts(reward_PG) - 1).clamp(min=1)).sqrt()


def has_spread(reward_PG: Tensor) -> Tensor:
    """(P,) bool: two answers of the group differ in reward."""
    unknown_PG = reward_PG.isnan()
    most_P = reward_PG.masked_fill(unknown_PG, -torch.inf).amax(1)
    least_P = reward_PG.masked_fill(unknown_PG, torch.inf).amin(1)
    return most_P - least_P > ZERO_SPREAD


def combine(reward_KPG: Tensor, weight_K: Tensor, *, normalise_first: bool) -> Tensor:
    """(P, G) one reward out of K: their weighted mean, or that of each after (r − mean) / std in its group.

    An answer that lacks one of its K verdicts has none. The std stands alone: where rewards cancel, the trace that an
    epsilon leaves of the larger one would be all the group differs by, and so be blown up to a whole lesson.
    """
    if normalise_first:
        reward_KPG = torch.stack([_standardised(reward_PG) for reward_PG in reward_KPG])
    return (weight_K[:, None, None] * reward_KPG).sum(0) / weight_K.sum()


@dataclass(frozen=True, slots=True)
class Rewards:
    """What a batch of rollouts earned. `mask_PGT`: the scored tokens of each answer, in order, from the left.
    `penalty_PGT`: what each token costs (β · KL), or None; `gamma` discounts in REINFORCE++ only."""

    reward_PG: Tensor
    mask_PGT: Tensor
    penalty_PGT: Tensor | None = None
    gamma: float = 1.0

    @property
    def net_PG(self) -> Tensor:
        """Rewards less what the answer's tokens cost together: the penalty enters the baseline as well."""
        if self.penalty_PGT is None:
            return self.reward_PG
        return self.reward_PG - (self.penalty_PGT * self.mask_PGT).sum(2)

    @property
    def taking_part_PGT(self) -> Tensor:
        return self.mask_PGT & ~self.reward_PG.isnan()[:, :, None]


Advantage = Callable[[Rewards], Tensor]


def _alike(per_answer: Callable[[Tensor], Tensor]) -> Advantage:
    """Every token of an answer gets the answer's advantage."""

    def advantage_PGT(rewards: Rewards) -> Tensor:
        taking_part_PGT = rewards.taking_part_PGT
        return torch.where(taking_part_PGT, per_answer(rewards.net_PG)[:, :, None], 0.0)

    return advantage_PGT


def reinforce(rewards: Rewards) -> Tensor:
    """Returns-to-go of reward at the last token and −penalty at each, whitened over all tokens of the batch (Hu 2025,
    REINFORCE++). No baseline of the group: a group without spread has advantages too."""
    return _whitened(reinforce_returns(rewards), rewards.taking_part_PGT)


def reinforce_returns(rewards: Rewards) -> Tensor:
    """(P, G, T)"""
    mask_PGT = rewards.taking_part_PGT
    penalty_PGT = torch.zeros(mask_PGT.shape, dtype=rewards.reward_PG.dtype)
    if rewards.penalty_PGT is not None:
        penalty_PGT = rewards.penalty_PGT
    earned_PGT = torch.where(mask_PGT, -penalty_PGT, 0.0)
    last_PGT = mask_PGT & (mask_PGT.cumsum(2) == mask_PGT.sum(2, keepdim=True))
    earned_PGT = earned_PGT + torch.where(last_PGT, rewards.reward_PG[:, :, None], 0.0)
    returns_BT = returns_to_go(earned_PGT.flatten(0, 1), mask_PGT.flatten(0, 1), rewards.gamma)
    return returns_BT.view_as(earned_PGT)


def reinforce_baseline(rewards: Rewards) -> Tensor:
    """r − the group's mean for each token, whitened over all tokens of the batch (Hu 2025, REINFORCE++-baseline)."""
    return _whitened(_alike(mean)(rewards), rewards.taking_part_PGT)


def _whitened(x_PGT: Tensor, mask_PGT: Tensor) -> Tensor:
    if not mask_PGT.any():
        return torch.zeros_like(x_PGT)
    known = x_PGT[mask_PGT]
    if float(known.max() - known.min()) <= ZERO_SPREAD:
        return torch.zeros_like(x_PGT)
    whitened = whiten(x_PGT.flatten(0, 1), mask_PGT.flatten(0, 1), shift_mean=True).view_as(x_PGT)
    return torch.where(mask_PGT, whitened, 0.0)


# By the name a recipe uses. Each takes a batch's rewards and gives (P, G, T), 0 at tokens that take no part.
ADVANTAGES: dict[str, Advantage] = {
    "group": _alike(group),
    "mean": _alike(mean),
    "leave_one_out": _alike(leave_one_out),
    "batch": _alike(batch),
    "reinforce++": reinforce,
    "reinforce++-baseline": reinforce_baseline,
}


def expected_of(name: str, rewards: Rewards) -> Tensor:
    """(P, G, T) what the advantage of that name should rise with: each token's return less its baseline, unscaled."""
    if name == "reinforce++":
        returns_PGT = reinforce_returns(rewards)
        mask_PGT = rewards.taking_part_PGT
        return torch.where(mask_PGT, returns_PGT - returns_PGT[mask_PGT].mean(), 0.0)
    net_PG = rewards.net_PG
    return torch.where(rewards.taking_part_PGT, (net_PG - net_PG.nanmean(1, keepdim=True))[:, :, None], 0.0)


def points_the_wrong_way(name: str, rewards: Rewards, advantage_PGT: Tensor) -> bool:
    """Whether answers that earned more than their baseline would be made less likely: Σ advantage · (return − baseline)
    is positive for every way of giving credit as soon as anything differs, so a sign that was flipped shows."""
    agreement = float((advantage_PGT * expected_of(name, rewards)).sum())
    return agreement < 0
