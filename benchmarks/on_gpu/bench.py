"""One random model on one device, and what every case does with it on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import Machine
from torch import Tensor, nn
from work import LORA_RANK, Load, Shape

from posttrain.models.attention import IMPLEMENTATION
from posttrain.models.load import checkpoint_activations, choose_layout
from posttrain.models.policy import Policy
from posttrain.records import Tree

PRECISIONS = {  # (weights, compute)
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
LEARNING_RATE = 1e-6
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Side:
    """One way to take a step. `prefill`: the part of it before the first decode step, of the cases that decode."""

    name: str
    attention: str
    step: Callable[[], object]
    prefill: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured. `compare` gives log-probs of the same tokens by both sides; `work` are useful operations of a
    step, `read` bytes that decoding must read."""

    name: str
    target: float | None
    tokens: int  # that tokens a second are counted in
    sides: tuple[Side, Side]
    compare: Callable[[], tuple[Tensor, Tensor]]
    work: int | None = None
    read: int | None = None


@dataclass
class Bench:
    """The model both sides share, weights and optimiser included: they take turns, and nothing is held twice."""

    shape: Shape
    machine: Machine
    precision: str
    budget: int  # tokens of a micro-batch, on either side
    attention: str  # of plain transformers
    policy: Policy = field(init=False)
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        weights, compute = PRECISIONS[self.precision]
        self.policy = Policy(random_model(self.shape, self.machine.device, weights), None)
        self.policy.autocast = compute if compute != weights else None
        self.policy.model.config.use_cache = False
        choose_layout(self.policy, "on")

    @property
    def model(self) -> Any:
        return self.policy.model

    @property
    def compute_type(self) -> torch.dtype:
        return PRECISIONS[self.precision][1]

    def autocast(self) -> AbstractContextManager[Any]:
        """What the other side computes under: the same."""
        wanted = self.policy.autocast
        return torch.autocast(self.machine.device.type, wanted) if wanted else nullcontext()

    def attend(self, implementation: str) -> None:
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def checkpoint(self) -> None:
        checkpoint_activations(self.model)

    def ours(self, step: Callable[[], object], prefill: Callable[[], object] | None = None) -> Side:
        return Side("posttrain", IMPLEMENTATION, step, prefill)

    def theirs(self, step: Callable[[], object], prefill: Callable[[], object] | None = None) -> Side:
        return Side("transformers", self.attention, step, prefill)

    # --- one optimiser step, the same on both sides ------------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def learn(self, losses: Iterator[Tensor]) -> None:
        """Backward passes of the parts of a loss, clip, AdamW; the host looks at the norm, as a loop does."""
        self.model.train()
        for loss in losses:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained(), MAX_NORM)
        if not torch.isfinite(norm).item():
            raise SystemExit(f"the gradient's norm is {float(norm)}")
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.trained(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        self.optimizer = None
        self.model.zero_grad(set_to_none=True)
        self.machine.forget()

    # --- plain transformers: rows as anybody would lay them ----------------------------------------------------------

    def tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.machine.device)

    def add_lora(self) -> None:
        """peft's adapters on every linear layer but the head, for both sides."""
        from peft import LoraConfig, get_peft_model

        names = list(self.shape.matrices)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names, task_type="CAUSAL_LM")
        self.policy.adapter = get_peft_model(self.model, config)

    def remove_lora(self) -> None:
        if self.policy.adapter is not None:
            self.policy.adapter.unload()
            self.policy.adapter = None
            self.model.requires_grad_(True)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Made where it will live: 16 GB never pass through the host."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv, head_dim=shape.head_size,
        vocab_size=shape.vocabulary, max_position_embeddings=40_960, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_of(trees: Sequence[Tree]) -> Load:
    total = Load(0, 0, 0)
    for tree in trees:
        total += Load.of(len(tree.trunk_ids), [(len(b.token_ids), sum(b.scored)) for b in tree.branches])
    return total


def chunks(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Neighbours whose rows, padded to their longest, stay within the budget; at least one."""
    first = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or (i + 1 - first) * max(lengths[first : i + 1]) > budget:
            yield slice(first, i)
            first = i


def picked(logit_NV: Tensor, target_N: Tensor) -> Tensor:
    """Log-prob of each target: one number less a log-sum-exp, in float32, without a second copy of the logits."""
    logit_NV = logit_NV.float()
    return logit_NV.gather(-1, target_N[..., None]).squeeze(-1) - logit_NV.logsumexp(-1)
