"""A frozen base in 4 bits (NF4, double quantisation; Dettmers et al. 2023) through bitsandbytes; 8-bit optimisers.

bitsandbytes computes 4-bit layers and 8-bit optimiser states on a CPU too. What it cannot do here is refused; its own
fallback for paged optimisers, a warning, is not used.
"""

from __future__ import annotations

import copy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import DoesNotFit, ModelError

QLORA, NOT_QLORA = "adapter: qlora", "use adapter: lora, which keeps the base in 16 or 32 bits"
SAME_READING = 0.01  # of the largest weight: bfloat16 rounds by 0.4 %
OLDEST = (0, 50)  # the first whose CPU side was tried


def bitsandbytes(asked: str, instead: str) -> Any:
    """The package, or exit code 5. `asked` is the recipe's words for what needs it, `instead` what does without it."""
    remedy = f"Install it: pip install 'posttrain[quant]'. Or {instead}."
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError as e:
        raise DoesNotFit(f"{asked} needs bitsandbytes, which is not installed.", remedy=remedy) from e
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DoesNotFit(f"{asked} needs bitsandbytes {oldest} or newer; {found} is installed.", remedy=remedy)
    try:
        import bitsandbytes as package
    except (ImportError, OSError, RuntimeError) as e:
        raise DoesNotFit(f"{asked} needs bitsandbytes, which does not load here: {e}.", remedy=remedy) from e
    return package


def quantisation(compute: torch.dtype) -> Any:
    """What transformers' loader is told: weights of linear layers in NF4, products in `compute`."""
    bitsandbytes(QLORA, NOT_QLORA)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def is_quantised(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def hold_still(model: nn.Module) -> None:
    """On some CPUs a 4-bit layer rewrites its weights for another kernel when it is first asked without gradients, with
    coarser scales: the sampler and the reference would then be another model than the one that trains."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def refuse_unquantised(model: Any) -> None:
    """A loader may leave layers as they are, and never touches stacked experts; then the memory that was promised would
    not be saved."""
    from transformers.pytorch_utils import Conv1D

    name = model.config.model_type
    if any(isinstance(m, Conv1D) for m in shell(model).modules()):
        raise ModelError(f"adapter: qlora cannot quantise the Conv1D layers of {name}.", remedy="Use adapter: lora.")
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    left = [m for m in linear if not is_quantised(m)]
    if left or not linear:
        raise ModelError(
            f"adapter: qlora, but {len(left)} of {len(linear)} linear layers of {name} were not quantised.",
            remedy="Use adapter: lora.",
        )
    quantised = sum(n_weights(m.weight) for m in linear)
    stacked = sum(p.numel() for p in model.parameters() if p.ndim >= 3)
    if stacked > quantised / 10:
        raise ModelError(
            f"adapter: qlora would leave {stacked:,} weights of {name} as they are and quantise {quantised:,}: its "
            "experts are stacked in tensors that bitsandbytes does not know.",
            remedy="Use adapter: lora.",
        )


@torch.no_grad()
def refuse_misread(model: Any) -> None:
    """Read one layer of each shape with plain arithmetic too: a kernel may take the wrong scales for some shapes."""
    seen: set[tuple[int, ...]] = set()
    for name, module in model.named_modules():
        if not is_quantised(module) or (shape := tuple(module.weight.quant_state.shape)) in seen:
            continue
        seen.add(shape)
        ours, theirs = _read(module.weight), full_weight(module).float()
        gap = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
        if not gap <= SAME_READING:
            raise ModelError(
                f"adapter: qlora: bitsandbytes {version('bitsandbytes')} misreads 4-bit weights of shape {shape} on "
                f"this device (off by {gap:.0%}), e.g. {name}.",
                remedy="Use adapter: lora; or a GPU, or a model whose layers have inputs divisible by 64.",
            )


def _read(packed: Any) -> Tensor:
    """NF4 by its definition: two levels to a byte, the first in the high half, and a scale for each block."""
    from bitsandbytes.functional import dequantize_blockwise

    state = packed.quant_state
    scale = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    pairs = packed.data.flatten().view(torch.uint8).long()
    levels = state.code.to(pairs.device).float()[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()]
    levels = levels[: state.shape.numel()]
    return (levels * scale.float().repeat_interleave(state.blocksize)[: len(levels)]).view(state.shape)


def shell(model: Any) -> Any:
    """What writes the model's files: itself, or for a quantised one the same architecture in full, without weights."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config)
    if hasattr(model, "generation_config"):  # models that score have none
        empty.generation_config = model.generation_config
    return empty


def full_weight(layer: nn.Module) -> Tensor:
    """A layer's weight as a plain tensor; of a quantised one, what its 4 bits stand for."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()


def n_weights(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; two of them share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
