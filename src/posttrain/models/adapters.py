"""Low-rank adapters through peft: which layers they sit on, how they start, and refusals where they cannot.

    lora   y = W x + s · B A x             s = alpha / r, or alpha / √r with use_rslora
    dora   y = m · (W + s · B A) x / ‖W + s · B A‖      one m per output (Liu et al. 2024); the norm has no gradient
    qlora  lora on a base whose weights are frozen in 4 bits

All start as a no-op, which is measured on every model before the first step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.models.load import probe_logps
from posttrain.models.policy import Policy
from posttrain.models.quantised import full_weight, n_weights
from posttrain.settings import LoraSettings

# Largest log-probability difference on random tokens between a model and the same model with a new adapter on it.
NO_OP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Adapted:
    """What an adapter was put on. `left_out`: weight matrices that stay frozen though every linear layer was asked."""

    kind: str
    n_layers: int
    n_trained: int
    n_frozen: int
    left_out: tuple[tuple[str, int], ...]  # (name, numbers)

    def on(self, model: nn.Module) -> Adapted:
        """The same adapter counted anew, on a model that got a score in place of its output layer."""
        n_trained, n_frozen = _counts(model)
        return replace(self, n_trained=n_trained, n_frozen=n_frozen)

    def lines(self) -> list[str]:
        share = 100 * self.n_trained / (self.n_trained + self.n_frozen)
        said = [
            f"{self.kind} on {self.n_layers} layers: {self.n_trained:,} parameters train ({share:.2f} %), "
            f"{self.n_frozen:,} are frozen"
        ]
        if self.left_out:
            count = sum(n for _, n in self.left_out)
            said.append(
                f"all-linear leaves out {count:,} weights that are in no linear layer or that peft takes for "
                f"experts, e.g. {self.left_out[0][0]}: they stay as they are"
            )
        return said


def add_lora(policy: Policy, lora: LoraSettings, *, seed: int, kind: str = "lora") -> Adapted:
    """Freeze the model and put trainable adapters on it. Its log-probs stay what they were, or it is refused."""
    before = probe_logps(policy)
    adapted = put_on(policy, lora, seed=seed, kind=kind)
    if lora.init != "default":
        policy.adapter_start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    _refuse_changed(policy, before, kind, lora)
    return adapted


def put_on(policy: Policy, lora: LoraSettings, *, seed: int, kind: str) -> Adapted:
    """`add_lora` without asking the model anything, so that it also serves a model without weights."""
    from peft import LoraConfig, get_peft_model

    model = policy.model
    targets = _as_peft_reads(model, lora_targets(model, lora.target_modules), lora.target_modules)
    saved = saved_modules(model, lora.modules_to_save, targets)
    _refuse_init(lora, {name: model.get_submodule(name) for name in targets})
    others = _other_matrices(model, targets, saved) if lora.target_modules == "all-linear" else ()
    tied = _is_tied(model)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=kind == "dora",
        init_lora_weights=True if lora.init == "default" else lora.init,
        target_modules=targets,
        modules_to_save=saved or None,
        ensure_weight_tying=tied and _name_of(model, model.get_input_embeddings()) in saved,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), _without_pefts_asides():
        torch.manual_seed(seed)
        policy.adapter = get_peft_model(model, config)
    _refuse_otherwise(model, targets, tied)
    model.train(model.training)  # new layers are born in training mode, with dropout
    return Adapted(kind, len(targets), *_counts(model), others)


def _counts(model: nn.Module) -> tuple[int, int]:
    """Weights that train, and weights that are frozen."""
    frozen = sum(n_weights(p) for p in model.parameters() if not p.requires_grad)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), frozen


def _refuse_otherwise(model: Any, targets: Sequence[str], tied: bool) -> None:
    """What peft made must be what it was asked for."""
    if tied and not _is_tied(model):
        raise ModelError(
            f"lora.modules_to_save: peft cannot keep the embeddings of {model.config.model_type} and its head, which "
            "share their weights, one.",
            remedy="Leave modules_to_save out.",
        )
    made = {name for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    if odd := sorted(made ^ set(targets)):
        raise AssertionError(f"peft adapted {odd[0]} otherwise than asked")


def load_adapter(policy: Policy, directory: Path) -> None:
    """Put a stored LoRA or DoRA adapter, ours or another peft user's, on the model it was trained on."""
    from peft import LoraConfig, PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(directory))
        if not isinstance(config, LoraConfig):
            raise ModelError(
                f"is a {config.peft_type} adapter; only LoRA and DoRA can be opened.", where=str(directory)
            )
        with _without_pefts_asides():
            policy.adapter = PeftModel.from_pretrained(policy.model, str(directory))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
        raise ModelError(
            f"the adapter does not fit this model: {reason}.",
            where=str(directory),
            remedy="Name the model it was trained on with --base.",
        ) from e
    policy.model.eval()


@contextmanager
def _without_pefts_asides() -> Iterator[None]:
    """What peft says of its own doing and a recipe cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")  # it sets that itself, per layer
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # it asks under the old name
        yield


# --- where adapters sit ------------------------------------------------------------------------------------------


def lora_targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """Full names of the layers to adapt. "all-linear" is every linear layer but the output head; a name in a list
    matches the end of a layer's path, as in peft, and each must match something; other text is a regular expression
    for whole paths."""
    linear = linear_layers(model)
    if wanted == "all-linear":
        return linear
    if isinstance(wanted, str):
        found = [name for name in linear if re.fullmatch(wanted, name)]
        if not found:
            raise _no_layer(repr(wanted), "matches no whole path of a", linear)
        return found
    unmatched = [w for w in wanted if not any(_ends_with(name, w) for name in linear)]
    if unmatched or not wanted:
        raise _no_layer(", ".join(unmatched) or "the empty list", "matches no", linear)
    return [name for name in linear if any(_ends_with(name, w) for w in wanted)]


def _as_peft_reads(model: Any, targets: list[str], wanted: str | list[str]) -> list[str]:
    """Of a model with stacked experts peft takes some layer names for the experts' old ones, here and when the adapter
    is opened again. all-linear leaves those layers out; a recipe that names them is refused."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=set(targets))
    try:
        convert_peft_config_for_transformers(config, model, None)
        misread = set(targets) - set(config.target_modules or ())
    except ValueError:  # some of the names that belong together
        misread = set(targets)
    if not misread:
        return targets
    kept = [name for name in targets if name not in misread]
    if wanted != "all-linear" or not kept:
        raise ModelError(
            f"lora.target_modules: in {model.config.model_type} peft takes {min(misread)} for the stacked experts.",
            remedy="Name the attention's layers, or use all-linear.",
        )
    return kept


def _no_layer(asked: str, fails: str, linear: Sequence[str]) -> ModelError:
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    path = f" (whole paths look like {linear[0]})" if "path" in fails else ""
    return ModelError(
        f"lora.target_modules: {asked} {fails} linear layer of this model.",
        remedy=f"Layers that exist: {', '.join(known)}{path}; or use all-linear.",
    )


def linear_layers(model: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def saved_modules(model: nn.Module, wanted: list[str], targets: Sequence[str]) -> list[str]:
    """Full names of the modules trained in full. Each name must match, and none may hold an adapter as well."""
    modules = [name for name, m in model.named_modules() if name and any(True for _ in m.parameters(recurse=False))]
    found: list[str] = []
    for w in wanted:
        matching = [name for name in modules if _ends_with(name, w)]
        if not matching:
            adapted = set(targets)
            known = sorted({name.rsplit(".", 1)[-1] for name in modules if name not in adapted})
            raise ModelError(
                f"lora.modules_to_save: {w} matches no module of this model that has weights.",
                remedy=f"Modules beside the adapted layers: {', '.join(known)}.",
            )
        if both := [name for name in matching if name in targets]:
            raise ModelError(
                f"lora.modules_to_save: {both[0]} is also in target_modules: it would be trained in full and adapted.",
                remedy="Take it out of one of them.",
            )
        found += matching
    head = _name_of(model, model.get_output_embeddings())  # type: ignore[operator]
    embedding = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    if _is_tied(model) and head in found and embedding not in found:
        raise ModelError(
            f"lora.modules_to_save: {head} shares its weights with {embedding} in this model.",
            remedy=f"Name {embedding.rsplit('.', 1)[-1]}; the head then trains with it.",
        )
    if _is_tied(model) and embedding in found:
        found.append(head)  # peft ties the head to the copy that trains when it sees its name
    return sorted(set(found))


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _other_matrices(model: Any, targets: Sequence[str], saved: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Matrices that stay frozen beside embeddings and head: a mixture's experts, for one, are stacked in one tensor."""
    known = [model.get_output_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
    known += [model.get_submodule(name) for name in (*targets, *saved)]
    seen = {id(p) for module in known for p in module.parameters()}
    return tuple((name, n_weights(p)) for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in seen)


# --- how they start ----------------------------------------------------------------------------------------------


def _refuse_init(lora: LoraSettings, layers: dict[str, nn.Module]) -> None:
    """What peft would turn into a wrong start, or into one of lower rank than asked."""
    from transformers.pytorch_utils import Conv1D

    if lora.init == "default":
        return
    for name, layer in layers.items():
        if lora.init == "olora" and isinstance(layer, Conv1D):
            raise ModelError(
                f"lora.init: olora cannot start {name}: it is a Conv1D layer, whose weights lie transposed.",
                remedy="Use pissa or default.",
            )
        smaller = min(full_weight(layer).shape)
        if lora.r > smaller:
            raise ModelError(
                f"lora.r = {lora.r} is more than the {smaller} directions that lora.init: {lora.init} finds in {name}.",
                remedy=f"Use r of at most {smaller}, or init: default.",
            )


def _refuse_changed(policy: Policy, before: Tensor, kind: str, lora: LoraSettings) -> None:
    """A new adapter must not change the model: its reference and its first step rest on that."""
    gap = float((probe_logps(policy) - before).abs().max())
    with policy.adapter_off():
        gap = max(gap, float((probe_logps(policy) - before).abs().max()))
    if not gap <= NO_OP_TOLERANCE[policy.autocast or policy.model.dtype]:
        start = "" if lora.init == "default" else f" with init: {lora.init}"
        raise ModelError(
            f"a new {kind} adapter{start} changes the model's log-probs by {gap:.2g} before any training.",
            remedy="Use adapter: lora with init: default, or dtype: float32.",
        )
