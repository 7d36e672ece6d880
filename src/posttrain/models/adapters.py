"""Low-rank adapters through peft: which layers they sit on, and a refusal when they would sit on none."""

from __future__ import annotations

import torch
from torch import nn

from posttrain.errors import ModelError
from posttrain.models.policy import Policy
from posttrain.settings import LoraSettings


def add_lora(policy: Policy, lora: LoraSettings, *, seed: int) -> None:
    """Freeze the model and put trainable adapters on it. The first forward pass is unchanged: B starts at zero."""
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(policy.model, lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.adapter = get_peft_model(policy.model, config)
    policy.model.train(policy.model.training)  # new layers are born in training mode, with dropout


def lora_targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """Full names of the layers to adapt. "all-linear" is every linear layer but the output head; a name in a list
    matches the end of a layer's path, as in peft, and each must match something."""
    linear = linear_layers(model)
    if wanted == "all-linear":
        return linear
    assert isinstance(wanted, list)
    unmatched = [w for w in wanted if not any(_ends_with(name, w) for name in linear)]
    if unmatched:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(
            f"lora.target_modules: {', '.join(unmatched)} matches no linear layer of this model.",
            remedy=f"Layers that exist: {', '.join(known)}; or use all-linear.",
        )
    return [name for name in linear if any(_ends_with(name, w) for w in wanted)]


def linear_layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)
