"""Every key a recipe may hold, with its default and meaning. Torch-free: `check`, `explain` and `schema` are instant.

A key that is not here is refused. A key that is here is read by the code: `tests/unit/test_keys.py` proves it.
Names follow the Hugging Face trainers where they have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DatasetSettings(Section):
    """One source of rows."""

    path: str = Field(description="a .jsonl or .jsonl.gz file, relative to the recipe; or builtin:NAME")
    format: Literal["auto", "messages", "prompt_completion", "text", "preference", "task"] = "auto"
    columns: dict[str, str] = Field(
        default={}, description="our name: the file's column, e.g. {prompt: question, completion: answer}"
    )
    limit: Positive | None = Field(default=None, description="take the first N rows")


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021) through peft."""

    r: Positive = 32
    alpha: Positive = Field(default_factory=lambda known: 2 * known.get("r", 32), description="default 2r")
    dropout: Share = 0.05
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class Retry(Section):
    stage: str
    max: Positive = 1


class RetryPolicy(Section):
    retry: Retry


class GateSettings(Section):
    """Judgement after a stage: parent and child answer the same held-out items."""

    suite: str = Field(description="a suite file (.yaml), relative to the recipe; or builtin:suites/NAME")
    min_gain: float = Field(
        default=0.0, description="the lower bound of the 95 % interval of the gain must lie above this"
    )
    min_score: Share | None = Field(default=None, description="and the child's score must reach this")
    on_fail: Literal["stop", "keep_parent"] | RetryPolicy = "stop"


def _full_or_adapter(full: float, adapter: float) -> Callable[[dict[str, Any]], float]:
    """Adapters learn at about ten times the rate of full fine-tuning, so the default follows the `adapter` key."""
    return lambda known: full if known.get("adapter", "none") == "none" else adapter


class StageSettings(Section):
    """What every training stage understands."""

    datasets: list[DatasetSettings] = Field(min_length=1)
    eval_datasets: list[DatasetSettings] = Field(default=[], description="held-out rows measured during training")
    gate: GateSettings | None = Field(default=None, description="no gate, no promotion")

    adapter: Literal["none", "lora"] = "none"
    lora: LoraSettings = LoraSettings()

    max_length: Positive = Field(default=2048, description="tokens of prompt and answer together")
    on_overflow: Literal["error", "drop", "truncate"] = "error"
    max_drop_rate: Share = Field(default=0.05, description="more dropped rows than this share stop the stage")

    on_contamination: Literal["error", "drop"] = Field(
        default="error", description="training rows that share 13 words in a row with an item of the gate's suite"
    )

    learning_rate: float = Field(default_factory=_full_or_adapter(2e-5, 1e-4), gt=0, description="2e-5; adapters 1e-4")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Share = Field(default=0.0, description="cosine and linear end at this share of learning_rate")
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: Share | None = Field(
        default_factory=lambda known: 0.03 if known.get("warmup_steps") is None else None,
        description="share of the steps that warm up; default 0.03 unless warmup_steps is set",
    )
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)

    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: Positive | None = Field(default=None, description="overrides num_train_epochs")
    per_device_train_batch_size: Positive = Field(
        default=16, description="rows (SFT), pairs (DPO) or prompts (GRPO) per optimiser step"
    )
    micro_batch_tokens: Positive = Field(default=8192, description="token budget of one forward and backward pass")

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool = False
    forest: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="prompts computed once per group; auto falls back, aloud, where an architecture cannot",
    )

    logging_steps: Positive = 1
    eval_steps: Positive | None = Field(
        default=None, description="default: once, at the end, when eval_datasets is set"
    )
    save_steps: Positive = Field(default=50, description="a checkpoint every N steps")
    load_best_model_at_end: bool = Field(
        default=False, description="end with the checkpoint that did best on eval_datasets"
    )


class SFTSettings(StageSettings):
    """Next-token cross-entropy on the answers."""

    train_on: Literal["all", "last"] = Field(default="all", description="every assistant turn, or the last one only")
    num_train_epochs: float = Field(default=3.0, gt=0)


class DPOSettings(StageSettings):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7)."""

    beta: float = Field(default=0.1, gt=0)
    loss_type: Literal["sigmoid"] = "sigmoid"
    learning_rate: float = Field(default_factory=_full_or_adapter(5e-7, 5e-6), gt=0, description="5e-7; adapters 5e-6")
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")


class GRPOSettings(StageSettings):
    """Group relative policy optimisation (Shao et al. 2024, eq. 3)."""

    learning_rate: float = Field(default_factory=_full_or_adapter(1e-6, 1e-5), gt=0, description="1e-6; adapters 1e-5")
    rewards: list[str | dict[str, Any]] = Field(min_length=1, description="names or {name: {options, weight}}")
    num_generations: int = Field(default=8, description="answers per prompt; at least 2")
    num_iterations: Positive = Field(default=1, description="optimiser steps on each batch of rollouts")
    epsilon: float = Field(default=0.2, gt=0, description="ratio clip")
    beta: float = Field(default=0.0, ge=0, description="weight of the k3 KL to the stage's parent")
    temperature: float = Field(default=1.0, gt=0)
    max_completion_length: Positive = 256
    mask_truncated_completions: bool = Field(
        default=False, description="leave cut answers out of the loss instead of scoring them 0"
    )
    max_checker_failure_rate: Share = Field(
        default=0.1, description="more failed or timed-out checks than this in a step stop the run"
    )
    allow_without_sft: bool = Field(default=False, description="run on a model that never had SFT")


METHODS: dict[str, type[StageSettings]] = {"sft": SFTSettings, "dpo": DPOSettings, "grpo": GRPOSettings}


class RecipeSettings(Section):
    """The top of a recipe: one model's history. `stages` stands beside these keys, as a list of {method: settings}."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what this history is called")
    model: str = Field(min_length=1, description="the base: a folder, a Hub id, or builtin:NAME")
    seed: int = Field(default=0, ge=0)
    chat_template: str | None = Field(
        default=None, description="a .jinja file, relative to the recipe; default: the tokenizer's own"
    )
    register_as: str | None = Field(
        default=None,
        alias="register",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the registry name; default: `name`",
    )
