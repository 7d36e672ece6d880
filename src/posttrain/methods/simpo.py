"""Simple preference optimisation (Meng et al. 2024), and AlphaPO (Gupta et al. 2025) with `alpha`.

    L = Σ_pairs −log σ(β (p̄_c − p̄_r) − γ) / pairs            p̄: mean log-prob per token of the answer

No reference: half the memory of a copy, and nothing that holds the model where it was but a small learning rate.
"""

from __future__ import annotations

from posttrain.losses.preference import Term
from posttrain.methods.pairs import PairLoss, run_pairs
from posttrain.methods.stage import Stage, StageResult
from posttrain.settings import SimPOSettings


def run(stage: Stage, s: SimPOSettings) -> StageResult:
    return run_pairs(stage, s, pair_loss(s))


def pair_loss(s: SimPOSettings) -> PairLoss:
    params = {
        "beta": s.beta,
        "gamma_beta_ratio": s.gamma_beta_ratio,
        "label_smoothing": s.label_smoothing,
        "cpo_alpha": s.cpo_alpha,
    }
    if s.alpha:
        return PairLoss((Term("alphapo", params | {"alpha": s.alpha}),))
    return PairLoss((Term("simpo", params),))
