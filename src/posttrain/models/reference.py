"""The frozen model that ratios are measured against: the adapter switched off, or a copy of the weights passed in.

Never the policy while it trains, never a model re-loaded by name, and its weights' checksum is the same at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from posttrain.models.forest import LossTable
from posttrain.models.load import weights_fingerprint
from posttrain.models.memory import must_fit
from posttrain.models.policy import Policy
from posttrain.records import Tree


class Reference:
    """Take it before the first optimiser step and before any checkpoint is restored into the policy.

    `still`: it is asked only while nothing trains `policy` (training has not begun, or the model was loaded to be
    asked), so it needs no copy; asked after that, it would answer for other weights.
    """

    def __init__(self, policy: Policy, *, still: bool = False) -> None:
        self._shared = policy.adapter is not None
        self._policy = policy if self._shared or still else _frozen_copy(policy)
        self._fingerprint = self._weights()

    @property
    def shared(self) -> bool:
        """It is the policy with its adapter switched off."""
        return self._shared

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights that answer."""
        return self._fingerprint

    @torch.no_grad()
    def logps(self, trees: Sequence[Tree], *, temperature: float = 1.0) -> tuple[Tensor, LossTable]:
        """Log-probabilities of the scored tokens, (N,), without gradients."""
        asked_of = self._policy.adapter_off() if self._shared else nullcontext()
        with must_fit("asking the reference", "Lower micro_batch_tokens."), asked_of:
            return self._policy.logps(trees, temperature=temperature)

    @torch.no_grad()
    def move(self, policy: Policy, alpha: float) -> None:
        """(1 − α) reference + α policy, the one change a reference may undergo (Gorbatovski et al. 2024, TR-DPO)."""
        assert not self._shared, "an adapter's reference is its base, which others share"
        assert self._policy is not policy, "a reference without weights of its own cannot move"
        ours, theirs = self._policy.model.state_dict(), policy.model.state_dict()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                tensor.lerp_(theirs[name].to(tensor.dtype), alpha)
            else:
                tensor.copy_(theirs[name])
        self._fingerprint = self._weights()

    def state(self) -> dict[str, Tensor]:
        """Its weights, for a reference that moves."""
        return dict(self._policy.model.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._policy.model.load_state_dict(state)
        self._fingerprint = self._weights()

    def refuse_if_changed(self) -> None:
        """A reference that moved makes every logged margin and KL a lie."""
        if self._weights() != self._fingerprint:
            raise AssertionError("the reference model's weights changed during training")

    def _weights(self) -> str:
        return weights_fingerprint(self._policy, frozen_only=self._shared)


def _frozen_copy(policy: Policy) -> Policy:
    model = copy.deepcopy(policy.model).eval().requires_grad_(False)
    return Policy(model, policy.tokenizer, layout=policy.layout, autocast=policy.autocast)
