"""Keys of preference optimisation: pairs (dpo, simpo, cpo, orpo) and thumbs (kto)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from posttrain.settings.base import Positive, Share
from posttrain.settings.health import PreferenceHealthSettings
from posttrain.settings.stage import StageSettings, full_or_adapter

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "aot", "aot_unpaired", "sft",
]  # fmt: skip
# Where a paper's constant is not DPO's 0.1: length-normalised DPO as in Tülu 3, SPPO's η = 1000, DiscoPOP's 0.05.
BETA = {"sigmoid_norm": 5.0, "sppo_hard": 1e-3, "discopop": 0.05}
SMOOTHED = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
DIVERGING = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"})
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}


def loss_names(loss_type: str | Sequence[str]) -> list[str]:
    """The losses a recipe adds up, whether it names one or several."""
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def _of_first_loss(constants: dict[str, float], otherwise: float) -> Any:
    def default(known: dict[str, Any]) -> float:
        names = loss_names(known.get("loss_type", []))
        return next((constants[name] for name in names if name in constants), otherwise)

    return default


class PreferenceSettings(StageSettings):
    """What every preference stage understands."""

    learning_rate: float = Field(default_factory=full_or_adapter(5e-7, 5e-6), gt=0, description="5e-7; adapters 5e-6")


class ReferenceSettings(PreferenceSettings):
    """Keys of methods that measure against a frozen reference."""

    reference: str = Field(
        default="sft",
        min_length=1,
        description="the frozen model ratios are measured against. sft: the last SFT model of this history, in every "
        "round; parent: the model the stage starts from; or a registered NAME@VERSION, or a folder",
    )
    precompute_ref_log_probs: bool = Field(
        default=True, description="ask the reference once and keep its answers on disk; false: ask it at every step"
    )
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")
    health: PreferenceHealthSettings = PreferenceHealthSettings()


class DPOSettings(ReferenceSettings):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) and its family."""

    loss_type: DPOLoss | list[DPOLoss] = Field(
        default="sigmoid", description="one loss, or several that are added; sft is the likelihood of the chosen answer"
    )
    loss_weights: list[float] | None = Field(default=None, description="a coefficient per loss_type; default 1 each")
    beta: float = Field(
        default_factory=_of_first_loss(BETA, 0.1),
        gt=0,
        description="0.1; sigmoid_norm 5, discopop 0.05, sppo_hard 0.001. How strongly the reference holds the policy",
    )
    label_smoothing: float = Field(
        default_factory=_of_first_loss(SMOOTHING, 0.0),
        ge=0,
        lt=0.5,
        description="share of pairs taken to be labelled wrong: 0; robust 0.1, exo_pair 0.001. With sigmoid it is cDPO",
    )
    length_normalized: bool = Field(default=False, description="ipo over token means, not sums as in its paper")
    discopop_tau: float = Field(default=0.05, gt=0, description="temperature of discopop's blend")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="the divergence from the reference that is kept small"
    )
    f_alpha_divergence_coef: float = Field(
        default=0.5, description="alpha_divergence: 1 is reverse_kl, 0 forward_kl (1 − the α of the paper)"
    )
    ld_alpha: Share | None = Field(
        default=None, description="LD-DPO: weight of tokens beyond the shorter answer's length; 1 is DPO"
    )
    use_weighting: bool = Field(
        default=False, description="WPO: a pair counts as much as the policy would write its answers itself"
    )
    sync_ref_model: bool = Field(
        default=False, description="TR-DPO: move the reference towards the policy; its answers are then not kept"
    )
    ref_model_mixup_alpha: float = Field(
        default=0.6, gt=0, le=1, description="reference = (1 − α) reference + α policy; 1 replaces it"
    )
    ref_model_sync_steps: Positive = Field(default=512, description="steps between two moves of the reference")


class KTOSettings(ReferenceSettings):
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024): answers with a thumb up or down."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = Field(default=0.1, gt=0, description="how strongly the reference holds the policy")
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="weight of good answers; with neither set, good over bad is brought into [1, 4/3]",
    )
    undesirable_weight: float | None = Field(default=None, gt=0, description="weight of bad answers")
    per_device_train_batch_size: Positive = Field(default=32, description="rated answers per optimiser step")


class SimPOSettings(PreferenceSettings):
    """Simple preference optimisation (Meng et al. 2024): token means, a margin, no reference."""

    learning_rate: float = Field(default_factory=full_or_adapter(1e-6, 1e-5), gt=0, description="1e-6; adapters 1e-5")
    beta: float = Field(default=2.0, gt=0)
    gamma_beta_ratio: float = Field(default=0.5, ge=0, description="target margin γ, as a share of beta")
    alpha: float = Field(default=0.0, description="AlphaPO: the reward is (1 − p^(−alpha)) / alpha; 0 is SimPO")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled wrong")
    cpo_alpha: float = Field(default=0.0, ge=0, description="weight of the chosen answer's likelihood; SimPO has none")
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")


class CPOSettings(PreferenceSettings):
    """Contrastive preference optimisation (Xu et al. 2024): DPO without a reference, with likelihood."""

    learning_rate: float = Field(default_factory=full_or_adapter(1e-6, 1e-5), gt=0, description="1e-6; adapters 1e-5")
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled wrong")
    cpo_alpha: float = Field(default=1.0, ge=0, description="weight of the chosen answer's likelihood")
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")


class ORPOSettings(PreferenceSettings):
    """Odds-ratio preference optimisation (Hong et al. 2024): SFT and preference in one stage, also on a base model."""

    learning_rate: float = Field(default_factory=full_or_adapter(8e-6, 5e-5), gt=0, description="8e-6; adapters 5e-5")
    beta: float = Field(default=0.1, gt=0, description="weight of the odds-ratio term (λ in the paper)")
