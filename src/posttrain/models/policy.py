"""A causal language model with its tokenizer, as every method uses it: trees in, log-probabilities out.

Axes: T tokens, D width, N scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.attention import IMPLEMENTATION, Attends, ForestAttention
from posttrain.models.decode import Logits, decoder_of
from posttrain.models.forest import ForestBatch, LossTable, Places, build_forest
from posttrain.models.head import Scored, log_probs, score
from posttrain.models.output import Head, head_of
from posttrain.models.padded import PaddedBatch, build_padded
from posttrain.models.straight import Straight, straight_of
from posttrain.records import Tree


@dataclass
class Policy:
    """`model` is the transformers causal LM (with adapter layers inside it, if any); `adapter` the peft wrapper."""

    model: Any
    tokenizer: Any
    layout: str = "forest"  # forest | padded
    adapter: Any = None
    # What trained at its start, where that was taken out of the base weights (PiSSA, OLoRA): without the adapter those
    # are not the model the stage began with.
    adapter_start: dict[str, Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None  # compute type when it differs from the weights'
    notes: list[str] = field(default_factory=list)  # what the user must be told about this model
    short: bool = True  # False: always through the decoder's own modules
    # What trains beside the model and is no part of it (a critic): in checkpoints, not in what a stage saves.
    companions: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        base = self.model.base_model  # some architectures do not name theirs, and return themselves
        return base if base is not self.model else self.model.model

    @property
    def head(self) -> Head:
        # A CPU rounds the sums of 16-bit products to 16 bits, log-probabilities with them.
        return head_of(self.model, self.autocast if self.device.type == "cuda" else None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every weight that trains, by name; a companion's begin with the companion's name."""
        named = dict(self.model.named_parameters())
        for companion, module in self.companions.items():
            named |= {f"{companion}.{name}": p for name, p in module.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def batch(self, trees: Sequence[Tree]) -> ForestBatch | PaddedBatch:
        if self.layout == "forest":
            return build_forest(trees, self.device)
        return build_padded(trees, self.device)

    def compute(self) -> Any:
        """Context of every forward pass: autocast where the recipe computes in another type than it keeps."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def hidden(self, batch: ForestBatch | PaddedBatch) -> Tensor:
        """Final hidden states, (tokens of the batch, D)."""
        if isinstance(batch, ForestBatch):
            return self.hidden_forest(batch.token_ids_T, batch.position_ids_T, ForestAttention(batch))
        with self.compute(), stock_attention(self.model):
            out = self.decoder(input_ids=batch.token_ids_BL, attention_mask=batch.mask_BL, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)

    def hidden_at(self, batch: ForestBatch | PaddedBatch, read: Places) -> Tensor:
        """Final hidden states (N, D) of the tokens that are read, and of no others where that saves work."""
        straight = self.straight() if isinstance(batch, ForestBatch) else None
        if straight is None:
            return self.hidden(batch).index_select(0, read.index_N)
        assert isinstance(batch, ForestBatch)
        found_KD = straight.hidden(batch.token_ids_T, batch.position_ids_T, ForestAttention(batch), read.kept_K)
        return found_KD if read.place_N is None else found_KD.index_select(0, read.place_N)

    def straight(self) -> Straight | None:
        """The short way through the decoder, where there is one for this model as it stands."""
        return None if self.autocast or self.layout != "forest" or not self.short else straight_of(self.decoder)

    def for_sampling(self, n_positions: int) -> Logits:
        """Tokens to logits in many short steps at positions below `n_positions`, while the weights do not change."""
        straight, head = self.straight(), self.head.ready()
        if straight is not None and (decoder := decoder_of(straight, head, n_positions)) is not None:
            return decoder.logits
        hidden = self.hidden_forest if straight is None else straight.for_sampling(n_positions).hidden

        def logits(
            token_ids_T: Tensor, position_ids_T: Tensor, attends: Attends, keep_K: Tensor | None = None
        ) -> Tensor:
            found_TD = hidden(token_ids_T, position_ids_T, attends)
            return head.logits(found_TD if keep_K is None else found_TD[keep_K])

        return logits

    def hidden_forest(self, token_ids_T: Tensor, position_ids_T: Tensor, forest: Attends) -> Tensor:
        if (straight := self.straight()) is not None:
            return straight.hidden(token_ids_T, position_ids_T, forest)
        with self.compute():
            out = self.decoder(
                input_ids=token_ids_T[None], position_ids=position_ids_T[None], use_cache=False, forest=forest
            )
        return out.last_hidden_state[0]

    def states(self, trees: Sequence[Tree]) -> tuple[Tensor, LossTable]:
        """(N, D) the hidden states that the scored tokens of the trees are drawn from, in tree order."""
        batch = self.batch(trees)
        return self.hidden_at(batch, batch.table.hidden), batch.table

    def score(
        self,
        trees: Sequence[Tree],
        *,
        temperature: float = 1.0,
        collision: bool = False,
        entropy_grad: bool = False,
    ) -> tuple[Scored, LossTable]:
        """Log-probabilities of every scored token of the trees, in tree order; `collision` adds log Σ p² there, and
        `entropy_grad` makes the entropy something to train."""
        hidden_ND, table = self.states(trees)
        found = score(
            hidden_ND,
            table.target_N,
            self.head,
            temperature=temperature,
            collision=collision,
            entropy_grad=entropy_grad,
        )
        return found, table

    @torch.no_grad()
    def logps(self, trees: Sequence[Tree], *, temperature: float = 1.0) -> tuple[Tensor, LossTable]:
        """(N,) `score`'s log-probabilities, without gradients and without what else it finds."""
        hidden_ND, table = self.states(trees)
        return log_probs(hidden_ND, table.target_N, self.head, temperature), table

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model as the adapter found it: switched off; where it took its start out of the weights, as it began."""
        assert self.adapter is not None, "only a model with an adapter can switch it off"
        if not self.adapter_start:
            with self.adapter.disable_adapter():
                yield
            return
        weights = dict(self.model.named_parameters())
        trained = {name: weights[name].data for name in self.adapter_start}
        try:
            self._point_at(self.adapter_start)
            yield
        finally:
            self._point_at(trained)

    def _point_at(self, values: Mapping[str, Tensor]) -> None:
        """Exchanges storage and copies nothing: a graph that waits for its backward pass stays valid."""
        weights = dict(self.model.named_parameters())
        for name, tensor in values.items():
            weights[name].data = tensor


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """transformers' own attention for the duration: SDPA where the architecture has it, else eager."""
    before = model.config._attn_implementation
    if before != IMPLEMENTATION:
        yield
        return
    model.set_attn_implementation(
        "sdpa" if getattr(model, "_supports_sdpa", False) and not _softcaps(model) else "eager"
    )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _softcaps(model: Any) -> bool:
    return getattr(model.config, "attn_logit_softcapping", None) is not None


def disable_dropout(model: nn.Module) -> None:
    """Preference and RL ratios must not carry dropout noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
            continue
        # Some architectures call the function with a rate of their own: attention_dropout, dropout, layerdrop, …
        for name, value in list(vars(module).items()):
            if name.endswith(("dropout", "layerdrop")) and isinstance(value, float):
                setattr(module, name, 0.0)
