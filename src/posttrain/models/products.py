"""Products of activations and weights: on x86 CPUs by oneDNN's float32 kernels, which use the whole processor where the
BLAS that torch calls may not (MKL on an AMD processor), and need less time with the few rows of a sampling step.

Axes: T tokens, D inputs, F outputs. oneDNN's carry no gradients: where one is recorded, torch's own take over.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@cache
def has_onednn() -> bool:
    """Whether this build of torch has the kernels. They are not part of torch's documented interface, so what they give
    is compared once with what torch gives: on real numbers, also where the first to ask only counts operations."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    with _disable_current_modes(), torch.no_grad():
        x_TD = torch.linspace(-1, 1, 3 * 40).view(3, 40).cos()
        weight_FD, base_TF = torch.linspace(-9, 9, 50 * 40).view(50, 40).sin(), torch.linspace(0, 1, 150).view(3, 50)
        exact_TF = x_TD @ weight_FD.t()
        try:
            found = onednn(x_TD, weight_FD, None), onednn(x_TD, pack(weight_FD), None)
            onto = _onednn_onto(base_TF, x_TD, weight_FD)
        except (AttributeError, RuntimeError, TypeError):
            return False
        gaps = [
            float((a - b).abs().max())
            for a, b in ((found[0], exact_TF), (found[1], exact_TF), (onto, base_TF + exact_TF))
        ]
        return max(gaps) <= 1e-5 * float(weight_FD.abs().sum(1).max())  # sums of up to that, rounded in another order


def pack(weight_FD: Tensor) -> Tensor:
    """The weight as oneDNN's kernels read it fastest: for many products while it does not change."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_FD.contiguous())
    return found


def onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    if bias_F is not None:
        bias_F = bias_F.contiguous()  # the kernel takes its numbers as they lie, whatever its stride
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, "none", [], "")
    return found


def _onednn_onto(base_TF: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TD, base_TF, weight_FD, None, "add")
    return found


def _suits(x_TD: Tensor, weight_FD: Tensor, added: Tensor | None) -> bool:
    return (
        x_TD.device.type == "cpu"
        and x_TD.dtype == weight_FD.dtype == torch.float32
        and x_TD.shape[0] > 0
        and (added is None or added.dtype == torch.float32)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weight_FD, added) if t is not None))
        and has_onednn()
    )


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (T, F)."""
    if _suits(x_TD, weight_FD, bias_F):
        return onednn(x_TD, weight_FD, bias_F)
    return F.linear(x_TD, weight_FD, bias_F)


def product_onto(base_TF: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """base + x Wᵀ, (T, F)."""
    if _suits(x_TD, weight_FD, base_TF):
        return _onednn_onto(base_TF, x_TD, weight_FD)
    return torch.addmm(base_TF, x_TD, weight_FD.t())
