"""What preference losses are given and what they hand back. Axes: P pairs, N scored tokens, B answers.

Answers of a batch lie chosen, rejected, chosen, rejected, …, so B = 2P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.losses.terms import LossSum, Mean
from posttrain.losses.tokens import per_branch_mean

# A chosen answer has fallen when it lost more than this against the reference (nats); less is rounding.
FALLEN = 0.01


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities summed over each answer's scored tokens (nats), and how many tokens those are. All (P,).

    Where LD-DPO counts tail tokens less, `chosen` and `rejected` are the weighted sums, and `chosen_whole` and
    `rejected_whole` the plain ones, which the SFT term and the figures need; otherwise those are None.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_whole: Tensor | None = None
    rejected_whole: Tensor | None = None

    @classmethod
    def of(cls, logp_B: Tensor, tokens_B: Tensor, whole_B: Tensor | None = None) -> PairLogps:
        """From answers laid chosen, rejected, chosen, rejected, …"""
        wholes = whole_B.view(-1, 2).unbind(1) if whole_B is not None else ()
        (chosen, rejected), (chosen_tokens, rejected_tokens) = (x.view(-1, 2).unbind(1) for x in (logp_B, tokens_B))
        return cls(chosen, rejected, chosen_tokens, rejected_tokens, *wholes)

    @property
    def n(self) -> int:
        return self.chosen.numel()

    def per_token(self) -> PairLogps:
        """The same with token means in place of sums."""
        return replace(self, chosen=self.chosen / self.chosen_tokens, rejected=self.rejected / self.rejected_tokens)


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """log π/π_ref of chosen and rejected, (P,) each."""
    assert reference is not None, "this loss measures against a reference"
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def pair_sum(
    loss_P: Tensor, reward_chosen_P: Tensor, reward_rejected_P: Tensor, weight_P: Tensor | None = None
) -> LossSum:
    """The sum over pairs, each times its weight, with the figures every preference loss has."""
    weighted_P = loss_P if weight_P is None else loss_P * weight_P
    margin_P = reward_chosen_P - reward_rejected_P
    metrics = {
        "pair_loss": Mean.of(weighted_P),
        "reward_margin": Mean.of(margin_P),
        "reward_chosen": Mean.of(reward_chosen_P),
        "reward_rejected": Mean.of(reward_rejected_P),
        "reward_accuracy": Mean.of((margin_P > 0).float()),
    }
    return LossSum(weighted_P.sum(), loss_P.numel(), metrics)


def figures(policy: PairLogps, reference: PairLogps | None) -> dict[str, Mean]:
    """Metrics that do not depend on the loss: log-probs and lengths per answer, and how far both went from the
    reference.

    `kl_k1_reference_to_policy` is the mean over answers of log π_ref − log π (nats per answer): KL(π_ref ‖ π) without
    bias where the answers were sampled from the reference, an indication elsewhere. Under LD-DPO it and the share of
    fallen answers count tail tokens less, as the loss does.
    """
    found = {
        "logp_chosen": Mean.of(policy.chosen if policy.chosen_whole is None else policy.chosen_whole),
        "logp_rejected": Mean.of(policy.rejected if policy.rejected_whole is None else policy.rejected_whole),
        "tokens_chosen": Mean.of(policy.chosen_tokens),
        "tokens_rejected": Mean.of(policy.rejected_tokens),
    }
    if reference is None:
        return found
    chosen_P, rejected_P = log_ratios(policy, reference)
    return found | {
        "kl_k1_reference_to_policy": Mean.of(-torch.cat((chosen_P, rejected_P))),
        "chosen_fallen_share": Mean.of((chosen_P < -FALLEN).float()),
    }


def wpo_weight(logp_N: Tensor, log_collision_N: Tensor, branch_N: Tensor, n_branches: int) -> Tensor:
    """(P,) weights of Zhou et al. 2024 (WPO, eq. 2), without gradient: Π over both answers of
    exp(mean over tokens of log p − log Σ_v p_v²). An answer the policy would write itself weighs about 1."""
    excess_B = per_branch_mean((logp_N - log_collision_N).detach(), branch_N, n_branches)
    return excess_B.view(-1, 2).sum(1).exp()


def tail_weighted(logp_N: Tensor, branch_N: Tensor, n_branches: int, alpha: float) -> Tensor:
    """(N,) log-probs times the weights of Liu et al. 2024 (LD-DPO): 1 up to the length of the pair's shorter answer,
    `alpha` beyond."""
    tokens_B = torch.bincount(branch_N, minlength=n_branches)
    first_B = tokens_B.cumsum(0) - tokens_B
    shared_B = tokens_B.view(-1, 2).amin(1).repeat_interleave(2)
    place_N = torch.arange(branch_N.numel(), device=branch_N.device) - first_B[branch_N]
    return torch.where(place_N < shared_B[branch_N], logp_N, alpha * logp_N)
