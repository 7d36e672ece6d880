"""Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, and likelihood.

    L = Σ_pairs [−log σ(β (log π(c|x) − log π(r|x))) + cpo_alpha · NLL(c)] / pairs

NLL is the mean over the chosen answer's tokens.
"""

from __future__ import annotations

from posttrain.losses.preference import Term
from posttrain.methods.pairs import PairLoss, run_pairs
from posttrain.methods.stage import Stage, StageResult
from posttrain.settings import CPOSettings


def run(stage: Stage, s: CPOSettings) -> StageResult:
    return run_pairs(stage, s, pair_loss(s))


def pair_loss(s: CPOSettings) -> PairLoss:
    params = {"beta": s.beta, "cpo_alpha": s.cpo_alpha, "label_smoothing": s.label_smoothing}
    return PairLoss((Term("cpo", params),))
