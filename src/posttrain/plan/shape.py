"""A model from its config alone: every parameter has its shape and type, none has contents."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from posttrain.errors import ModelError
from posttrain.models import folded, head, hub
from posttrain.models.attention import IMPLEMENTATION

TRACED_LAYERS = 3  # the first, one that stands for all in the middle, and the last


@dataclass(frozen=True, eq=False)
class Shape:
    """What a config says of a model. Counts are of parameters; tied ones count once."""

    config: Any
    source: str
    remembered: dict[Any, Any] = field(default_factory=dict)  # what was traced with it

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return self.text.num_hidden_layers

    @property
    def vocabulary(self) -> int:
        return self.text.vocab_size

    @property
    def positions(self) -> int | None:
        return getattr(self.text, "max_position_embeddings", None)

    @property
    def file_dtype(self) -> torch.dtype:
        """The type the weights have on disk, as far as the config says."""
        said = getattr(self.config, "dtype", None)
        return said if isinstance(said, torch.dtype) else torch.float32

    @property
    def kv_width(self) -> int:
        """Numbers a token's keys and values take in one layer."""
        c = self.text
        n_kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return 2 * n_kv * head_dim

    @cached_property
    def whole(self) -> Any:
        """All layers, in float32."""
        return self.build(torch.float32)

    @cached_property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.whole.parameters())

    @property
    def n_traced(self) -> int:
        """How many layers stand for all of them."""
        return TRACED_LAYERS if self.uniform else self.n_layers

    @cached_property
    def uniform(self) -> bool:
        """Whether every layer holds the same parameters, so that one can stand for all."""
        layers = layers_of(self.whole, self.n_layers)
        if layers is None or len(layers) <= TRACED_LAYERS:
            return False
        forms = {tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers}
        return len(forms) == 1

    def build(self, dtype: torch.dtype, n_layers: int | None = None) -> Any:
        """The model, or one with fewer layers, on the meta device."""
        config = copy.deepcopy(self.config)
        if n_layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = n_layers
            if getattr(text, "layer_types", None):
                text.layer_types = list(text.layer_types)[:n_layers]
        with torch.device("meta"):
            model = _model(config, dtype)
        model.config.use_cache = False
        return model


def read_shape(source: str) -> Shape:
    """From a folder with a config.json, or a Hub name."""
    from transformers import AutoConfig

    hub.reach(source)
    try:
        return Shape(AutoConfig.from_pretrained(source), source)
    except (OSError, ValueError, KeyError) as e:
        raise ModelError(
            f"no config of model {source!r}: {str(e).strip().splitlines()[0].rstrip('.')}.",
            remedy="Give a folder with a config.json, a Hub name that can be reached, or builtin:tiny-base.",
        ) from e


def _model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as e:
        raise ModelError(
            f"{getattr(config, 'model_type', 'this config')} is no causal language model.",
            remedy="Name a model that continues text.",
        ) from e


def layers_of(model: nn.Module, n_layers: int) -> nn.ModuleList | None:
    """The stack of decoder layers, or None where the model keeps it in another way."""
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)


def bytes_of(model: nn.Module, *, trainable: bool = False) -> int:
    tensors = [p for p in model.parameters() if p.requires_grad or not trainable]
    return sum(p.numel() * p.element_size() for p in tensors)


def use_forest(model: Any) -> None:
    model.set_attn_implementation(IMPLEMENTATION)


def give_device(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU ones, inside FakeTensorMode: autocast asks tensors where they are. Tied
    parameters stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = fake if table is module._buffers else nn.Parameter(fake, tensor.requires_grad)
                table[name] = made[id(tensor)]


@contextmanager
def tiles_of(kind: str) -> Iterator[None]:
    """The output layer's tiles of the device `kind` ("cpu" or "cuda") for tensors that only call themselves "cpu" or
    "meta": a torch without CUDA can then still plan for a GPU."""
    before = dict(folded.TILE), dict(head.KEEP)
    try:
        for table in (folded.TILE, head.KEEP):
            table["cpu"] = table["meta"] = table[kind]
        yield
    finally:
        for table, old in zip((folded.TILE, head.KEEP), before, strict=True):
            table.clear()
            table.update(old)
