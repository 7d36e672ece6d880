"""Models in and out: load a base model or an artefact, prove the forest on it, save what any loader opens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import DoesNotFit, ModelError
from posttrain.models import hub
from posttrain.models.attention import IMPLEMENTATION, ForestUnsupported
from posttrain.models.memory import hold_freed_memory, is_out_of_memory, must_fit
from posttrain.models.merge import MERGE_BOUND, merged_state, save_adapter
from posttrain.models.native import kernels
from posttrain.models.padded import build_padded
from posttrain.models.policy import Policy, stock_attention
from posttrain.models.quantised import hold_still, quantisation, refuse_misread, refuse_unquantised, shell
from posttrain.models.varlen import HALF, kernel_fault
from posttrain.records import Branch, Tree

# Largest log-probability difference between forest and padded rows on random tokens that passes the probe.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    dtype: str = "auto"  # auto | float32 | bfloat16
    forest: str = "auto"  # auto | on | off
    frozen_base: bool = False  # an adapter trains, or nothing does: the base may live in the compute type
    quantised: bool = False  # linear layers in 4 bits, frozen
    gradient_checkpointing: bool = False


SMALLER_MODEL = "Use a smaller model, or adapter: qlora."

DEFAULT_OPTIONS = LoadOptions()


def load_policy(source: str, options: LoadOptions = DEFAULT_OPTIONS) -> Policy:
    """Load weights and tokenizer from a directory or a Hub name. Trained weights are kept in float32."""
    from transformers import AutoModelForCausalLM

    policy = read_model(source, options, AutoModelForCausalLM)
    choose_layout(policy, options.forest)
    if options.gradient_checkpointing:
        if not policy.model.supports_gradient_checkpointing:
            raise ModelError(
                f"gradient_checkpointing: true, but {policy.model.config.model_type} cannot.",
                remedy="Remove it; a smaller micro_batch_tokens also saves memory.",
            )
        checkpoint_activations(policy.model)
    return policy


def read_model(source: str, options: LoadOptions, loader: Any) -> Policy:
    """Weights and tokenizer through a transformers loader class; the layout of its batches is not chosen yet."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = _compute_type(options.dtype, device)
    kept = compute if options.frozen_base else torch.float32
    if device.type == "cpu":
        hold_freed_memory()
    _refuse_missing(source)
    quantised = {"quantization_config": quantisation(compute)} if options.quantised else {}
    hub.reach(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, found = loader.from_pretrained(
            source, dtype=kept, output_loading_info=True, ignore_mismatched_sizes=True, **quantised
        )
        model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as e:
        if is_out_of_memory(e):
            raise DoesNotFit(f"{source} does not fit into this device's memory.", remedy=SMALLER_MODEL) from e
        raise ModelError(
            f"model {source!r} cannot be loaded: {_first_line(e).rstrip('.')}.",
            remedy="Give a model folder, a Hub name you have access to, or builtin:tiny-base.",
        ) from e
    if loader is AutoModelForCausalLM and is_scorer(model.config):
        raise ModelError(
            f"{source} is a reward model: it scores answers and writes none.",
            remedy="Name a language model here. Reward models belong into rewards, into suites, or behind --reward.",
        )
    _refuse_invented_weights(source, found)
    if options.quantised:
        refuse_unquantised(model)
        hold_still(model)
        refuse_misread(model)
    model.config.use_cache = False
    policy = Policy(model, tokenizer, autocast=compute if compute != kept else None)
    if unused := sorted(found["unexpected_keys"]):
        policy.notes.append(f"{source} holds weights without a place in this model: {len(unused)}, e.g. {unused[0]}")
    return policy


def is_scorer(config: Any) -> bool:
    """Whether a saved model has a score in place of its output layer."""
    return any("SequenceClassification" in name for name in getattr(config, "architectures", None) or ())


def checkpoint_activations(model: Any) -> None:
    """transformers 6 keeps only the newer name."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _compute_type(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _refuse_missing(source: str) -> None:
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(
            f"model directory {source} has no config.json.", remedy="Point `model` at a Hugging Face model directory."
        )
    if looks_local and not path.is_dir():
        raise ModelError(
            f"model directory {source} does not exist.", remedy="Correct `model`, relative to the recipe's folder."
        )


def _refuse_invented_weights(source: str, found: Mapping[str, Any]) -> None:
    """transformers fills what a file lacks, or holds in another shape, with random numbers and goes on."""
    remedy = "Download or save it again; its config.json may also describe another model."
    if missing := found["missing_keys"]:
        raise ModelError(f"model {source!r} lacks {len(missing)} of its weights, e.g. {min(missing)}.", remedy=remedy)
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"model {source!r}: {name} has shape {tuple(there)}, but config.json describes {tuple(wanted)}.",
            remedy=remedy,
        )


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def choose_layout(policy: Policy, forest: str) -> None:
    """Decide between forest and padded rows by a parity probe; a fallback is noted on the policy, never silent."""
    refuse_other_head(policy)
    stock = policy.model.config._attn_implementation
    if forest == "off":
        policy.layout = "padded"
        return
    with must_fit("comparing forest and padded rows", SMALLER_MODEL):
        reason = probe_forest(policy)
    if reason is None:
        policy.layout = "forest"
        _note_slow_attention(policy)
        return
    if forest == "on":
        raise ModelError(
            f"forest: on, but {policy.model.config.model_type} cannot: {reason}.",
            remedy="Use forest: auto, which falls back to padded rows.",
        )
    policy.model.set_attn_implementation(stock)
    policy.layout = "padded"
    policy.notes.append(
        f"forest off for {policy.model.config.model_type} ({reason}); prompts are recomputed per answer"
    )


def _note_slow_attention(policy: Policy) -> None:
    on_gpu = policy.device.type == "cuda" and (policy.autocast or policy.model.dtype) in HALF
    if on_gpu and (fault := kernel_fault(policy.device)):
        policy.notes.append(f"attention goes group by group, with masks, which is slower: {fault}")
    on_cpu = policy.device.type == "cpu" and (policy.autocast or policy.model.dtype) == torch.float32
    if on_cpu and (why := kernels.fault()):
        policy.notes.append(f"the kernels for CPUs are not in use, which is slower: {why}")


@torch.no_grad()
def refuse_other_head(policy: Policy) -> None:
    """Both layouts compute log-probs with our own output layer, so a model that does more in its own is caught here."""
    batch = build_padded(_probe_trees(policy.model.config.vocab_size), policy.device)
    real = batch.mask_BL.flatten().bool()
    with policy.compute(), stock_attention(policy.model):
        stock = policy.model(input_ids=batch.token_ids_BL, attention_mask=batch.mask_BL).logits.flatten(0, 1)[real]
    ours = policy.head.logits(policy.hidden(batch)[real])
    gap = float((ours.log_softmax(-1) - stock.float().log_softmax(-1)).abs().max())
    if gap > PROBE_TOLERANCE[policy.autocast or policy.model.dtype]:
        raise ModelError(
            f"{policy.model.config.model_type} makes its logits in a way this version does not know: "
            f"log-probs differ by {gap:.2g} from the model's own.",
            remedy="Use a model of another architecture.",
        )


@torch.no_grad()
def probe_forest(policy: Policy) -> str | None:
    """None when forest and padded rows agree on random tokens; else why not. Leaves the forest attention on."""
    # Chunks longer than the probe would not show in it.
    if chunk := getattr(policy.model.config.get_text_config(), "attention_chunk_size", None):
        return f"it attends in chunks of {chunk} tokens"
    trees = _probe_trees(policy.model.config.vocab_size)
    try:
        policy.model.set_attn_implementation(IMPLEMENTATION)
        policy.layout = "forest"
        forest, _ = policy.score(trees)
    except (ForestUnsupported, ValueError, TypeError, AttributeError, RuntimeError, LookupError) as e:
        if is_out_of_memory(e):
            raise
        return _first_line(e)
    policy.layout = "padded"
    with stock_attention(policy.model):
        padded, _ = policy.score(trees)
    compute = policy.autocast or policy.model.dtype
    gap = float((forest.logp_N - padded.logp_N).abs().max())
    return None if gap <= PROBE_TOLERANCE[compute] else f"log-probs differ from padded rows by {gap:.2g}"


def _probe_trees(vocabulary: int) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    def branches(*lengths: int) -> tuple[Branch, ...]:
        return tuple(Branch(ids(n), (True,) * n) for n in lengths)

    return [Tree("probe-group", ids(9), branches(5, 3, 7)), Tree("probe-single", ids(4), branches(6))]


@torch.no_grad()
def probe_logps(policy: Policy) -> torch.Tensor:
    """Log-probs of random tokens: the same ones for every model of the same vocabulary."""
    return policy.score(_probe_trees(policy.model.config.vocab_size))[0].logp_N


def save_policy(policy: Policy, directory: Path, *, stop_token_ids: tuple[int, ...], base: str = "") -> None:
    """Write weights, config, tokenizer and template. An adapter is written merged at the root and alone in adapter/,
    where `base` names the model it belongs to."""
    save_merged(policy, directory, stop_token_ids=stop_token_ids)
    if policy.adapter is not None:
        save_adapter(policy, directory / "adapter", base)


def save_merged(policy: Policy, directory: Path, *, stop_token_ids: tuple[int, ...]) -> None:
    """The model as any loader opens it; an adapter is in its weights."""
    model = policy.model
    state = merged_state(policy)
    model.generation_config.eos_token_id = list(stop_token_ids)
    model.generation_config.pad_token_id = model.generation_config.pad_token_id or policy.tokenizer.pad_token_id
    model.config.use_cache = True
    shell(model).save_pretrained(directory, state_dict=state)
    model.config.use_cache = False
    policy.tokenizer.save_pretrained(directory)


@torch.no_grad()
def saved_differs(policy: Policy, directory: Path, dtype: str = "auto") -> str | None:
    """None when the model in `directory` gives the trained one's log-probs on random tokens; else how far off.

    `dtype` is the recipe's: both must compute in the same type.
    """
    options = LoadOptions(dtype, forest="off", frozen_base=policy.model.dtype != torch.float32)
    saved = load_policy(str(directory), options)
    gap = float((probe_logps(policy) - probe_logps(saved)).abs().max())
    tolerance = MERGE_BOUND[policy.autocast or policy.model.dtype]
    return None if gap <= tolerance else f"its log-probs differ by {gap:.2g}, more than {tolerance:g}"


def weights_fingerprint(policy: Policy, *, frozen_only: bool = False, merged: bool = False) -> str:
    """sha256 over names and bytes of the weights; `frozen_only` leaves out those that train, `merged` has the adapter
    in its layers."""
    digest = hashlib.sha256()
    trained = set(policy.trainable()) if frozen_only else set()
    for name, tensor in sorted((merged_state(policy) if merged else policy.model.state_dict()).items()):
        if name in trained:
            continue
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        )  # a scalar has no bytes view
    return digest.hexdigest()
