"""Preference losses, each a sum over pairs. Axis: P pairs.

c and r are log π/π_ref of chosen and rejected, summed over the answer's tokens; d = f'(c) − f'(r), with f' the identity
unless another divergence is asked for. Logged rewards are β c and β r, as they stand before f', and per
token where the loss compares token means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.divergence import Divergence, reverse_kl
from posttrain.losses.pairs import PairLogps, log_ratios, pair_sum
from posttrain.losses.reference_free import alphapo, cpo, orpo, sft, simpo, smoothed
from posttrain.losses.terms import LossSum, Mean


def sigmoid(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """−log σ(β d) (Rafailov et al. 2023, eq. 7). Label smoothing ε makes it cDPO: −(1 − ε) log σ(βd) − ε log σ(−βd)."""
    c_P, r_P = log_ratios(policy, reference)
    x_P = beta * (divergence(c_P) - divergence(r_P))
    return pair_sum(smoothed(x_P, label_smoothing), beta * c_P, beta * r_P, weight_P)


def sigmoid_norm(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """Length-normalised DPO: −log σ(β (f'(c)/|c| − f'(r)/|r|)). β is per token: Tülu 3 takes 5."""
    c_P, r_P = log_ratios(policy, reference)
    x_P = beta * (divergence(c_P) / policy.chosen_tokens - divergence(r_P) / policy.rejected_tokens)
    return pair_sum(smoothed(x_P, label_smoothing), *_per_token(beta, c_P, r_P, policy), weight_P)


def hinge(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """max(0, 1 − β d) (SLiC, Zhao et al. 2023, with DPO's reward)."""
    c_P, r_P = log_ratios(policy, reference)
    loss_P = F.relu(1.0 - beta * (divergence(c_P) - divergence(r_P)))
    return pair_sum(loss_P, beta * c_P, beta * r_P, weight_P)


def ipo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    length_normalized: bool = False,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """(d − 1/(2β))² (Azar et al. 2023, eq. 17; β is its τ); `length_normalized`: d = f'(c)/|c| − f'(r)/|r|."""
    c_P, r_P = log_ratios(policy, reference)
    chosen_P, rejected_P = divergence(c_P), divergence(r_P)
    rewards = beta * c_P, beta * r_P
    if length_normalized:
        chosen_P, rejected_P = chosen_P / policy.chosen_tokens, rejected_P / policy.rejected_tokens
        rewards = _per_token(beta, c_P, r_P, policy)
    loss_P = (chosen_P - rejected_P - 0.5 / beta) ** 2
    return pair_sum(loss_P, *rewards, weight_P)


def robust(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """[−(1 − ε) log σ(βd) + ε log σ(−βd)] / (1 − 2ε): unbiased when a share ε < ½ of the labels is flipped
    (Chowdhury et al. 2024, rDPO)."""
    c_P, r_P = log_ratios(policy, reference)
    x_P = beta * (divergence(c_P) - divergence(r_P))
    clean_P = -(1.0 - label_smoothing) * F.logsigmoid(x_P) + label_smoothing * F.logsigmoid(-x_P)
    return pair_sum(clean_P / (1.0 - 2.0 * label_smoothing), beta * c_P, beta * r_P, weight_P)


def exo_pair(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """KL(q ‖ (1 − ε, ε)) of the pair's two shares, q = σ(βd) (Ji et al. 2024, EXO, eq. 16). ε > 0."""
    c_P, r_P = log_ratios(policy, reference)
    x_P = beta * (divergence(c_P) - divergence(r_P))
    log_share = torch.log1p(-x_P.new_tensor(label_smoothing)), x_P.new_tensor(label_smoothing).log()
    loss_P = torch.sigmoid(x_P) * (F.logsigmoid(x_P) - log_share[0])
    loss_P = loss_P + torch.sigmoid(-x_P) * (F.logsigmoid(-x_P) - log_share[1])
    return pair_sum(loss_P, beta * c_P, beta * r_P, weight_P)


def discopop(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    divergence: Divergence = reverse_kl,
    weight_P: Tensor | None = None,
) -> LossSum:
    """(1 − s)(−log σ(x)) + s e^(−x), x = βd, s = σ(x/τ) (Lu et al. 2024, eq. 5)."""
    c_P, r_P = log_ratios(policy, reference)
    x_P = beta * (divergence(c_P) - divergence(r_P))
    # s e^(−x) as one exponent: its factors alone are 0 and ∞ for a pair ranked very wrong.
    loss_P = torch.sigmoid(-x_P / discopop_tau) * -F.logsigmoid(x_P) + torch.exp(F.logsigmoid(x_P / discopop_tau) - x_P)
    return pair_sum(loss_P, beta * c_P, beta * r_P, weight_P)


def nca_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float, weight_P: Tensor | None = None) -> LossSum:
    """−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr) (Chen et al. 2024, NCA, for pairs)."""
    c_P, r_P = (beta * x for x in log_ratios(policy, reference))
    loss_P = -F.logsigmoid(c_P) - 0.5 * F.logsigmoid(-c_P) - 0.5 * F.logsigmoid(-r_P)
    return pair_sum(loss_P, c_P, r_P, weight_P)


def bco_pair(policy: PairLogps, reference: PairLogps | None, *, beta: float, weight_P: Tensor | None = None) -> LossSum:
    """−log σ(βc) − log σ(−βr) (Jung et al. 2024, BCO, without its running shift of the reward)."""
    c_P, r_P = (beta * x for x in log_ratios(policy, reference))
    return pair_sum(-F.logsigmoid(c_P) - F.logsigmoid(-r_P), c_P, r_P, weight_P)


def sppo_hard(
    policy: PairLogps, reference: PairLogps | None, *, beta: float, weight_P: Tensor | None = None
) -> LossSum:
    """(c − 1/(2β))² + (r + 1/(2β))² (Wu et al. 2024, SPPO, with win probabilities 1 and 0)."""
    c_P, r_P = log_ratios(policy, reference)
    loss_P = (c_P - 0.5 / beta) ** 2 + (r_P + 0.5 / beta) ** 2
    return pair_sum(loss_P, beta * c_P, beta * r_P, weight_P)


def apo_zero(policy: PairLogps, reference: PairLogps | None, *, beta: float, weight_P: Tensor | None = None) -> LossSum:
    """1 − σ(βc) + σ(βr): chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7)."""
    c_P, r_P = (beta * x for x in log_ratios(policy, reference))
    return pair_sum(torch.sigmoid(-c_P) + torch.sigmoid(r_P), c_P, r_P, weight_P)


def apo_down(policy: PairLogps, reference: PairLogps | None, *, beta: float, weight_P: Tensor | None = None) -> LossSum:
    """σ(βc) + 1 − σ(β(c − r)): both down, rejected further, where the model is better than its data
    (D'Oosterlinck et al. 2024, eq. 8)."""
    c_P, r_P = (beta * x for x in log_ratios(policy, reference))
    return pair_sum(torch.sigmoid(c_P) + torch.sigmoid(r_P - c_P), c_P, r_P, weight_P)


def aot(policy: PairLogps, reference: PairLogps | None, *, beta: float, label_smoothing: float = 0.0) -> LossSum:
    """Smoothed −log σ(βδ), δ = the sorted log π(c)/π(r) less the sorted log π_ref(c)/π_ref(r) (Melnyk et al. 2024, AOT
    for pairs). The sort runs over all pairs given: give it the whole batch."""
    assert reference is not None
    sorted_P = torch.sort(policy.chosen - policy.rejected).values
    delta_P = sorted_P - torch.sort(reference.chosen - reference.rejected).values
    c_P, r_P = log_ratios(policy, reference)
    return pair_sum(smoothed(beta * delta_P, label_smoothing), beta * c_P, beta * r_P)


def aot_unpaired(
    policy: PairLogps, reference: PairLogps | None, *, beta: float, label_smoothing: float = 0.0
) -> LossSum:
    """Smoothed −log σ(βδ), δ = the sorted c less the sorted r (Melnyk et al. 2024, AOT unpaired). Whole batch."""
    c_P, r_P = log_ratios(policy, reference)
    delta_P = torch.sort(c_P).values - torch.sort(r_P).values
    return pair_sum(smoothed(beta * delta_P, label_smoothing), beta * c_P, beta * r_P)


def _per_token(beta: float, c_P: Tensor, r_P: Tensor, policy: PairLogps) -> tuple[Tensor, Tensor]:
    """Rewards of a loss that compares token means: by sums the longer answer would lead where the loss sees none."""
    return beta * c_P / policy.chosen_tokens, beta * r_P / policy.rejected_tokens


PREFERENCE_LOSSES: dict[str, Callable[..., LossSum]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "sft": sft,
    "simpo": simpo,
    "alphapo": alphapo,
    "cpo": cpo,
    "orpo": orpo,
}
# Their value is no sum over pairs taken one by one: they must see the whole batch at once.
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})


@dataclass(frozen=True, slots=True)
class Term:
    """One loss of a sum: its name in PREFERENCE_LOSSES, its coefficient, its parameters."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    coefficient: float = 1.0


def combined(
    policy: PairLogps, reference: PairLogps | None, terms: Sequence[Term], weight_P: Tensor | None = None
) -> LossSum:
    """Σ coefficient · loss. Rewards are those of the first term; with several, each one's loss is logged too."""
    weighting = {} if weight_P is None else {"weight_P": weight_P}
    parts = [PREFERENCE_LOSSES[term.name](policy, reference, **term.params, **weighting) for term in terms]
    if len(parts) == 1 and terms[0].coefficient == 1.0:
        return parts[0]
    scaled = [term.coefficient * part.total for term, part in zip(terms, parts, strict=True)]
    total = torch.stack(scaled).sum()
    metrics = {
        **parts[0].metrics,
        **{f"loss_{term.name}": part.metrics["pair_loss"] for term, part in zip(terms, parts, strict=True)},
        "pair_loss": Mean(float(total.detach()), policy.n),
    }
    return LossSum(total, policy.n, metrics)
