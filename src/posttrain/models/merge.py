"""Adapters out of a model: merged into a copy of its weights, or stored alone as any peft user opens them; and the
proof that a merged model is the adapter on its base.

Nothing is merged in place: the policy that trains, and the base on disk, stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.models.policy import Policy
from posttrain.models.quantised import full_weight, is_quantised

ADAPTER = "default"  # peft's name for the only adapter there is

# Merging adds the adapter's product to the weights, which rounds: largest difference of a log-prob that is allowed.
MERGE_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


def merged_state(policy: Policy) -> dict[str, Tensor]:
    """Weights under their stock names; adapters are merged into a float32 copy, 4-bit weights written out in full."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if policy.adapter is None and not any(is_quantised(m) for m in policy.model.modules()):
        return dict(policy.model.state_dict())
    full: dict[str, Tensor] = {}
    for name, module in policy.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            full[f"{name}.base_layer.weight"] = _merged_weight(module).to(policy.model.dtype)
        elif is_quantised(module) and not name.endswith(".base_layer"):
            full[f"{name}.weight"] = full_weight(module).to(policy.model.dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in policy.model.state_dict().items():
        if ".lora_" in name or ".original_module." in name or any(name.startswith(f"{key}.") for key in full):
            continue
        stock = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        state[stock] = full.get(name, tensor)
    return state


def _merged_weight(layer: Any) -> Tensor:
    """In float32. DoRA's norm runs over a row of the weight as (out, in), which a Conv1D layer stores transposed."""
    merged = full_weight(layer.get_base_layer()).float() + layer.get_delta_weight(ADAPTER).detach().float()
    if layer.use_dora[ADAPTER]:
        across = 0 if layer.fan_in_fan_out else 1
        length = torch.linalg.vector_norm(merged, dim=across)
        factor = layer.lora_magnitude_vector[ADAPTER].weight.detach().float() / length
        merged = merged * factor.unsqueeze(across)
    return merged


# --- the adapter alone -------------------------------------------------------------------------------------------


def save_adapter(policy: Policy, directory: Path, base: str) -> None:
    """adapter_config.json and weights for peft. `base` is a name, never a place: the folder may be moved.

    An adapter that took its start out of the base weights is written as the plain one it amounts to, for the base as
    it was: B A − B₀ A₀ has twice the rank.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = copy.deepcopy(policy.adapter.peft_config[ADAPTER])
    state = get_peft_model_state_dict(policy.adapter, save_embedding_layers=False)
    if policy.adapter_start:
        with policy.adapter_off():
            start = get_peft_model_state_dict(policy.adapter, save_embedding_layers=False)
            began = {name: tensor.clone() for name, tensor in start.items()}
        state = {name: _less_its_start(name, tensor, began[name]) for name, tensor in state.items()}
        # The scale stays: alpha/r when both double, alpha/√r when alpha grows by √2.
        if config.use_rslora:
            config.lora_alpha *= math.sqrt(2)
        else:
            config.lora_alpha *= 2
        config.r *= 2
        config.init_lora_weights = True
    config.base_model_name_or_path = base
    config.inference_mode = True
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    whole = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in state.items()}
    save_file(whole, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _less_its_start(name: str, now: Tensor, began: Tensor) -> Tensor:
    if ".lora_A." in name:
        return torch.cat([now, began], dim=0)
    if ".lora_B." in name:
        return torch.cat([now, -began], dim=1)
    return now


# --- the proof ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Log-probs (nats) of the same tokens under the adapter on its base, the merged model and the base alone."""

    n_tokens: int
    error_max: float  # merged against adapter on base
    error_mean: float
    moved_max: float  # merged against base
    moved_mean: float
    bound: float

    def fault(self) -> str | None:
        """None when the merged model is the adapter on its base and is not the base."""
        if not self.error_max <= self.bound:
            return (
                f"its log-probs differ from the adapter's on the base by up to {self.error_max:.2g}, more than "
                f"{self.bound:g}"
            )
        if not self.moved_mean > 2 * self.error_mean:
            return (
                f"it cannot be told from the base: it differs from it by {self.moved_mean:.2g} on average, and from "
                f"the adapter on the base by {self.error_mean:.2g}"
            )
        return None


def round_trip(adapter_N: Tensor, merged_N: Tensor, base_N: Tensor, bound: float) -> RoundTrip:
    """Compare log-probs of the same N tokens."""
    if not adapter_N.shape == merged_N.shape == base_N.shape or not len(adapter_N):
        raise AssertionError("a proof compares the same tokens, and needs some")
    error_N, moved_N = (merged_N - adapter_N).abs(), (merged_N - base_N).abs()
    return RoundTrip(
        n_tokens=len(adapter_N),
        error_max=float(error_N.max()),
        error_mean=float(error_N.mean()),
        moved_max=float(moved_N.max()),
        moved_mean=float(moved_N.mean()),
        bound=bound,
    )


def refuse_unmergeable(policy: Policy, where: Path) -> None:
    """Adapters of other makers may train what the sum of two matrices does not hold."""
    config = policy.adapter.peft_config[ADAPTER]
    odd: Mapping[str, Any] = {
        "bias": config.bias != "none",
        "lora_bias": config.lora_bias,
        "target_parameters": config.target_parameters,
        "trainable_token_indices": config.trainable_token_indices,
        "layer_replication": config.layer_replication,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    if used := [name for name, on in odd.items() if on]:
        raise ModelError(f"the adapter uses {', '.join(used)}, which this version cannot merge.", where=str(where))
    if unknown := [m for m in policy.model.modules() if _is_other_layer(m)]:
        kind = type(unknown[0]).__name__
        raise ModelError(f"the adapter sits on a {kind}, which this version cannot merge.", where=str(where))


def _is_other_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer) and not getattr(module, "lora_A", None)
