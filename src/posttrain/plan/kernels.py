"""Which kernels a device would choose, for operations on tensors without contents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.models.native import kernels


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Which kernels the device would choose, for as long as a trace runs (they are asked again while a checkpointed
    layer is recomputed, so a function mode of torch would not do).

    Attention without a mask takes a fused kernel on either device. With a mask (several answers on one prompt) a CPU
    does too; on a GPU, grouped heads with a mask leave only the kernel that lays out all scores.
    On a CPU the C kernels take what they take of real tensors (models/native).
    Mixture-of-experts layers take the grouped product that is defined for every number format.
    """
    stock = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        if device == "cuda" and attn_mask is not None:
            with sdpa_kernel(SDPBackend.MATH):
                return stock(query, key, value, attn_mask=attn_mask, **how)
        if query.device.type != "meta" or query.shape[-1] != value.shape[-1]:  # what no fused kernel of a CPU takes
            return stock(query, key, value, attn_mask=attn_mask, **how)
        if attn_mask is not None:  # a meta tensor is offered no fused kernel; this is what its entry would do
            seen, hidden = query.new_zeros(()), query.new_zeros(())
            attn_mask = torch.where(attn_mask, seen, hidden)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, how.get("dropout_p", 0.0), how.get("is_causal", False), attn_mask=attn_mask,
            scale=how.get("scale"),
        )[0]  # fmt: skip

    def grouped(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offs)

    with ExitStack() as patches:
        patches.enter_context(kernels.estimating(device == "cpu"))
        patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        for owner, name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
            if hasattr(owner, name):
                patches.enter_context(mock.patch.object(owner, name, grouped))
        yield
