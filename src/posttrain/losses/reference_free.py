"""Preference losses that need no reference model. Axis: P pairs. `reference` is accepted and not looked at.

p̄ is the mean log-prob per token. The likelihood term is each chosen answer's mean negative log-prob per answer token,
summed over pairs; prompts carry no loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.divergence import MAX_EXPONENT
from posttrain.losses.pairs import PairLogps, pair_sum
from posttrain.losses.terms import LossSum


def sft(
    policy: PairLogps, _reference: PairLogps | None = None, *, beta: float = 1.0, weight_P: Tensor | None = None
) -> LossSum:
    """−p̄ of the chosen answer: the likelihood term of RPO (Pang et al. 2024) and CPO. β only scales the
    logged rewards."""
    mean = policy.per_token()
    return pair_sum(_nll(policy), beta * mean.chosen, beta * mean.rejected, weight_P)


def simpo(
    policy: PairLogps,
    _reference: PairLogps | None = None,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    weight_P: Tensor | None = None,
) -> LossSum:
    """−log σ(β (p̄_c − p̄_r) − γ), γ = gamma_beta_ratio · β (Meng et al. 2024); `cpo_alpha` adds likelihood."""
    mean = policy.per_token()
    return _anchored(policy, mean.chosen, mean.rejected, beta, gamma_beta_ratio, label_smoothing, cpo_alpha, weight_P)


def alphapo(
    policy: PairLogps,
    _reference: PairLogps | None = None,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    weight_P: Tensor | None = None,
) -> LossSum:
    """SimPO with the reward (1 − p^(−α)) / α in place of log p, p = exp(p̄) (Gupta et al. 2025, AlphaPO). α → 0 is
    SimPO."""
    mean = policy.per_token()
    chosen_P, rejected_P = (_alpha_reward(p, alpha) for p in (mean.chosen, mean.rejected))
    return _anchored(policy, chosen_P, rejected_P, beta, gamma_beta_ratio, label_smoothing, cpo_alpha, weight_P)


def cpo(
    policy: PairLogps,
    _reference: PairLogps | None = None,
    *,
    beta: float,
    cpo_alpha: float,
    label_smoothing: float = 0.0,
    weight_P: Tensor | None = None,
) -> LossSum:
    """−log σ(β (log π(c) − log π(r))) + cpo_alpha · likelihood (Xu et al. 2024, CPO). Sums, not means."""
    return _anchored(policy, policy.chosen, policy.rejected, beta, 0.0, label_smoothing, cpo_alpha, weight_P)


def orpo(
    policy: PairLogps, _reference: PairLogps | None = None, *, beta: float, weight_P: Tensor | None = None
) -> LossSum:
    """−p̄_c − β log σ(log odds(c) − log odds(r)), log odds = p̄ − log(1 − e^p̄) (Hong et al. 2024; β is its λ)."""
    mean = policy.per_token()
    odds_P = mean.chosen - mean.rejected - (log1mexp(mean.chosen) - log1mexp(mean.rejected))
    loss_P = _nll(policy) - beta * F.logsigmoid(odds_P)
    return pair_sum(loss_P, beta * mean.chosen, beta * mean.rejected, weight_P)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0 without cancellation (Mächler 2012). x is held a rounding step below 0, where the value
    would be −∞: a model that is certain of an answer is certain up to rounding."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2.0)
    # Each branch is fed values it can stand: a NaN in the one not taken would still reach the gradient.
    one = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    other = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, one, other)


def smoothed(x_P: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(x) − ε log σ(−x)."""
    return -(1.0 - label_smoothing) * F.logsigmoid(x_P) - label_smoothing * F.logsigmoid(-x_P)


def _anchored(
    policy: PairLogps,
    chosen_P: Tensor,
    rejected_P: Tensor,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float,
    cpo_alpha: float,
    weight_P: Tensor | None,
) -> LossSum:
    loss_P = smoothed(beta * (chosen_P - rejected_P) - gamma_beta_ratio * beta, label_smoothing)
    if cpo_alpha:
        loss_P = loss_P + cpo_alpha * _nll(policy)
    return pair_sum(loss_P, beta * chosen_P, beta * rejected_P, weight_P)


def _nll(policy: PairLogps) -> Tensor:
    """(P,) mean negative log-prob per token of the chosen answers."""
    whole_P = policy.chosen if policy.chosen_whole is None else policy.chosen_whole
    return -whole_P / policy.chosen_tokens


def _alpha_reward(p_P: Tensor, alpha: float) -> Tensor:
    if abs(alpha) < 1e-6:
        return p_P
    return -torch.expm1((-alpha * p_P).clamp(max=MAX_EXPONENT)) / alpha
