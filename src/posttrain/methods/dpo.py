"""Direct preference optimisation (Rafailov et al. 2023) and the losses that share its form.

    L = Σ_pairs −log σ(β [(log π(c|x) − log π_ref(c|x)) − (log π(r|x) − log π_ref(r|x))]) / pairs

`loss_type` names another loss of `losses/preference.py`, or several that are added with `loss_weights`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from posttrain.losses import divergence
from posttrain.losses.preference import Term
from posttrain.methods.pairs import PairLoss, run_pairs
from posttrain.methods.stage import Stage, StageResult
from posttrain.settings import DPOSettings
from posttrain.settings.preference import DIVERGING, SMOOTHED, loss_names


def run(stage: Stage, s: DPOSettings) -> StageResult:
    return run_pairs(stage, s, pair_loss(s))


def pair_loss(s: DPOSettings) -> PairLoss:
    names = loss_names(s.loss_type)
    weights = s.loss_weights or [1.0] * len(names)
    terms = tuple(Term(name, _params(name, s), weight) for name, weight in zip(names, weights, strict=True))
    advice = "Raise beta." if "sft" in names else f"Add the SFT term: loss_type: [{', '.join(names)}, sft]."
    return PairLoss(terms, s.ld_alpha, s.use_weighting, advice)


def _params(name: str, s: DPOSettings) -> dict[str, Any]:
    """The keys that this loss reads."""
    return {
        "beta": s.beta,
        **({"label_smoothing": s.label_smoothing} if name in SMOOTHED else {}),
        **({"divergence": _divergence(s)} if name in DIVERGING else {}),
        **({"length_normalized": s.length_normalized} if name == "ipo" else {}),
        **({"discopop_tau": s.discopop_tau} if name == "discopop" else {}),
    }


def _divergence(s: DPOSettings) -> divergence.Divergence:
    if s.f_divergence_type == "alpha_divergence":
        return partial(divergence.alpha_divergence, alpha=s.f_alpha_divergence_coef)
    return DIVERGENCES[s.f_divergence_type]


DIVERGENCES: dict[str, divergence.Divergence] = {
    "reverse_kl": divergence.reverse_kl,
    "forward_kl": divergence.forward_kl,
    "js_divergence": divergence.js_divergence,
}
