"""The frozen model that ratios are measured against: the adapter switched off, or a copy of the weights passed in.

Never the policy itself, never a model re-loaded by name, and its weights' checksum is the same at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.models.forest import LossTable
from posttrain.models.load import weights_fingerprint
from posttrain.models.policy import Policy
from posttrain.records import Tree


class Reference:
    """Take it before the first optimiser step and before any checkpoint is restored into the policy."""

    def __init__(self, policy: Policy) -> None:
        self._shared = policy.adapter is not None
        self._policy = policy if self._shared else _frozen_copy(policy)
        self._fingerprint = self._weights()

    @torch.no_grad()
    def logps(self, trees: Sequence[Tree], *, temperature: float = 1.0) -> tuple[Tensor, LossTable]:
        """Log-probabilities of the scored tokens, (N,), without gradients."""
        if not self._shared:
            scored, table = self._policy.score(trees, temperature=temperature)
            return scored.logp_N, table
        with self._policy.adapter_off():
            scored, table = self._policy.score(trees, temperature=temperature)
        return scored.logp_N, table

    def refuse_if_changed(self) -> None:
        """A reference that moved makes every logged margin and KL a lie."""
        if self._weights() != self._fingerprint:
            raise AssertionError("the reference model's weights changed during training")

    def _weights(self) -> str:
        return weights_fingerprint(self._policy, frozen_only=self._shared)


def _frozen_copy(policy: Policy) -> Policy:
    model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return Policy(model, policy.tokenizer, layout=policy.layout, autocast=policy.autocast)
