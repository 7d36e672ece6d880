"""What a step must compute and read, counted by hand: shapes, floating-point operations, bytes. Needs no torch.

Useful operations, 2 per multiplication and addition, for N weights of the layers' matrices and T tokens, each prompt
counted once however many answers it has:

    forward     2·N·T   layers    4·H·E per token and key it may see (scores, then values)    2·V·D per scored position
    backward    4·N·T   half of it for the gradients of inputs, half for those of weights; attention twice its forward;
                the head 4·V·D per scored position

With LoRA the frozen matrices have no weight gradients (backward 2·N·T), the head neither, the first layer's queries,
keys and values have nobody below them who would read an input gradient; the adapters' own products are added. Not
useful, so that doing it costs time and earns nothing: padding, prompts computed again, logits nobody scores, keys
nobody may see, layers computed again for the backward pass, norms, activations, embeddings, the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 decoder."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    kv: int
    head_size: int
    vocabulary: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the matrices of one layer."""
        q, kv = self.heads * self.head_size, self.kv * self.head_size
        return {
            "q_proj": (self.width, q),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (q, self.width),
            "gate_proj": (self.width, self.mlp),
            "up_proj": (self.width, self.mlp),
            "down_proj": (self.mlp, self.width),
        }

    @property
    def layer(self) -> int:
        return sum(i * o for i, o in self.matrices.values())

    @property
    def body(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * self.layer

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    def cell(self, bytes_each: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv * self.head_size * bytes_each


SHAPES = {
    "qwen3-8b": Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151_936),
    "tiny": Shape("tiny", 2, 64, 96, 4, 2, 16, 512),
}


@dataclass(frozen=True, slots=True)
class Load:
    """What a forest of prompts and answers asks for."""

    tokens: int  # prompts once, answers once each
    scored: int
    seen: int  # keys that tokens may see, themselves included, over all tokens

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.scored + other.scored, self.seen + other.seen)

    @classmethod
    def of(cls, trunk: int, answers: Sequence[tuple[int, int]]) -> Load:
        """A prompt of `trunk` tokens and its answers, each as (tokens, of which scored)."""
        seen = trunk * (trunk + 1) // 2 + sum(n * trunk + n * (n + 1) // 2 for n, _ in answers)
        return cls(trunk + sum(n for n, _ in answers), sum(scored for _, scored in answers), seen)


def forward(shape: Shape, load: Load) -> int:
    return 2 * shape.body * load.tokens + attention(shape, load) + 2 * shape.head * load.scored


def attention(shape: Shape, load: Load) -> int:
    """Of a forward pass."""
    return 4 * shape.layers * shape.heads * shape.head_size * load.seen


def full_step(shape: Shape, load: Load) -> int:
    """Forward and backward where every weight trains."""
    return (
        forward(shape, load) + 4 * shape.body * load.tokens + 2 * attention(shape, load) + 4 * shape.head * load.scored
    )


def lora_step(shape: Shape, load: Load, rank: int = LORA_RANK) -> int:
    """Forward and backward where adapters on every matrix of the layers train, and nothing else."""
    first = [shape.matrices[name] for name in ("q_proj", "k_proj", "v_proj")]
    unread, unread_lora = sum(i * o for i, o in first), sum(rank * i for i, _ in first)
    lora = shape.layers * sum(rank * (i + o) for i, o in shape.matrices.values())
    adapters = (6 * lora - 2 * unread_lora) * load.tokens
    frozen = 2 * (shape.body - unread) * load.tokens + 2 * attention(shape, load) + 2 * shape.head * load.scored
    return forward(shape, load) + frozen + adapters


def dpo_step(shape: Shape, load: Load) -> int:
    """Every weight trains; the reference's forward pass is part of the step."""
    return full_step(shape, load) + forward(shape, load)


def decode_bytes(shape: Shape, groups: Iterable[tuple[int, int]], n_new: int, bytes_each: int = 2) -> int:
    """What must be read to decode after the first token of each answer: in every step all matrices once, each prompt's
    keys and values once, each answer's own. `groups`: (prompt tokens, answers)."""
    groups = list(groups)
    steps = n_new - 1
    prompts, answers = sum(n for n, _ in groups), sum(n for _, n in groups)
    own = answers * steps * (steps + 1) // 2  # 1 token in the first of these steps, `steps` in the last
    return steps * (shape.body + shape.head) * bytes_each + (steps * prompts + own) * shape.cell(bytes_each)
