"""Rules across the keys of preference stages. `rules.py` says what a rule is and asks these with all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from posttrain.recipe.faults import show
from posttrain.settings.preference import BETA, DIVERGING, SMOOTHED, SMOOTHING, DPOLoss, loss_names

if TYPE_CHECKING:
    from posttrain.recipe.rules import StageView


def _losses(stage: StageView) -> list[str]:
    return loss_names(getattr(stage.settings, "loss_type", []))


def _unread_by_losses(key: str, readers: frozenset[str]) -> Callable[[StageView], str | None]:
    """A key that only some preference losses read."""

    def broken_by(stage: StageView) -> str | None:
        if stage.method != "dpo" or not stage.says(key) or readers & set(_losses(stage)):
            return None
        return f" is set but never read: loss_type is {', '.join(_losses(stage))}. It is a key of {_and(readers)}."

    return broken_by


def _and(names: Iterable[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}" if others else last


def _unread_without(key: str, other: str, wanted: Any) -> Callable[[StageView], str | None]:
    """A key that is read only while another one has a certain value."""

    def broken_by(stage: StageView) -> str | None:
        if not stage.says(key) or getattr(stage.settings, other, wanted) == wanted:
            return None
        return f" is set but never read: {other} is not {show(wanted)}. Set it, or remove {key}."

    return broken_by


def _one_for_several(
    key: str, constants: Mapping[str, float], usual: float, readers: frozenset[str]
) -> Callable[[StageView], str | None]:
    """A key without a value, which several losses read and whose papers give it different ones."""

    def broken_by(stage: StageView) -> str | None:
        own = {name: constants.get(name, usual) for name in _losses(stage) if name in readers}
        if stage.method != "dpo" or stage.says(key) or len(set(own.values())) < 2:
            return None
        values = ", ".join(f"{value:g} for {name}" for name, value in own.items())
        return f" is one number for all losses, and each has its own: {values}. Set it."

    return broken_by


def _losses_and_weights(stage: StageView) -> str | None:
    names, weights = _losses(stage), getattr(stage.settings, "loss_weights", None)
    if weights is not None and len(weights) != len(names):
        return f" has {len(weights)} numbers for {len(names)} losses. Give one for each."
    return None


def _unlikely_losses(stage: StageView) -> str | None:
    names = _losses(stage)
    if stage.method == "dpo" and names == ["sft"]:
        return " = sft learns nothing from rejected answers. Use an sft stage, or add a loss: [sigmoid, sft]."
    if not names and stage.method == "dpo":
        return " names no loss. Name one, such as sigmoid."
    if len(set(names)) != len(names):
        return " names a loss twice. Name it once and give it a weight in loss_weights."
    return None


def _unsmoothed_exo(stage: StageView) -> str | None:
    if getattr(stage.settings, "label_smoothing", 1.0) == 0.0 and "exo_pair" in _losses(stage):
        return " = 0 makes exo_pair infinite. Its paper takes 0.001."
    return None


def _unsortable_weights(stage: StageView) -> str | None:
    sorting = {"aot", "aot_unpaired"} & set(_losses(stage))
    if getattr(stage.settings, "use_weighting", False) and sorting:
        return f" weighs pairs, but {_and(sorting)} sorts the batch and has none. Use another loss, or remove it."
    return None


def _immovable(stage: StageView) -> str | None:
    if not getattr(stage.settings, "sync_ref_model", False):
        return None
    if stage.settings.adapter != "none":
        return (
            " moves the reference's weights, but with an adapter those are the frozen base, and a mixture of two "
            "adapters' factors is no mixture of their weights. Use adapter: none."
        )
    if stage.settings.load_best_model_at_end:
        return (
            " moves what eval_datasets are measured against, so evaluations before and after a move cannot be "
            "compared. Remove load_best_model_at_end."
        )
    if stage.says("precompute_ref_log_probs") and getattr(stage.settings, "precompute_ref_log_probs", False):
        return " changes the reference's answers, so they cannot be precomputed. Remove precompute_ref_log_probs."
    return None


PREFERENCE_RULES: tuple[tuple[str, tuple[str, ...], Callable[[StageView], str | None]], ...] = (
    ("loss_type", (), _unlikely_losses),
    ("loss_weights", ("loss_type",), _losses_and_weights),
    ("beta", ("loss_type",), _one_for_several("beta", BETA, 0.1, frozenset(get_args(DPOLoss)) - {"sft"})),
    ("label_smoothing", ("loss_type",), _one_for_several("label_smoothing", SMOOTHING, 0.0, SMOOTHED)),
    ("label_smoothing", ("loss_type",), _unread_by_losses("label_smoothing", SMOOTHED)),
    ("label_smoothing", ("loss_type",), _unsmoothed_exo),
    ("length_normalized", ("loss_type",), _unread_by_losses("length_normalized", frozenset({"ipo"}))),
    ("discopop_tau", ("loss_type",), _unread_by_losses("discopop_tau", frozenset({"discopop"}))),
    ("f_divergence_type", ("loss_type",), _unread_by_losses("f_divergence_type", DIVERGING)),
    (
        "f_alpha_divergence_coef",
        ("f_divergence_type",),
        _unread_without("f_alpha_divergence_coef", "f_divergence_type", "alpha_divergence"),
    ),
    ("use_weighting", ("loss_type",), _unsortable_weights),
    ("sync_ref_model", ("adapter", "load_best_model_at_end", "precompute_ref_log_probs"), _immovable),
    ("ref_model_mixup_alpha", ("sync_ref_model",), _unread_without("ref_model_mixup_alpha", "sync_ref_model", True)),
    ("ref_model_sync_steps", ("sync_ref_model",), _unread_without("ref_model_sync_steps", "sync_ref_model", True)),
)
