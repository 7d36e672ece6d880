"""Odds-ratio preference optimisation (Hong et al. 2024): SFT and preference in one stage.

    L = Σ_pairs [NLL(c) − β log σ(log odds(c) − log odds(r))] / pairs      log odds = p̄ − log(1 − e^p̄)

NLL is the mean over the chosen answer's tokens; prompts carry no loss. p̄ is the mean log-prob per token.
"""

from __future__ import annotations

from posttrain.losses.preference import Term
from posttrain.methods.pairs import PairLoss, run_pairs
from posttrain.methods.stage import Stage, StageResult
from posttrain.settings import ORPOSettings


def run(stage: Stage, s: ORPOSettings) -> StageResult:
    return run_pairs(stage, s, pair_loss(s))


def pair_loss(s: ORPOSettings) -> PairLoss:
    return PairLoss((Term("orpo", {"beta": s.beta}),))
