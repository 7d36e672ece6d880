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


@cache
def has_onednn() -> bool:
    """Whether this build of torch has the kernels. They are not part of torch's documented interface, so what they give
    is compared once with what torch gives."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    x_TD, weight_FD, more_TF = torch.rand(3, 8) - 0.5, torch.rand(5, 8) - 0.5, torch.rand(3, 5)
    try:
        return torch.allclose(_onednn(x_TD, weight_FD, None), x_TD @ weight_FD.t(), atol=1e-6) and torch.allclose(
            _onednn_onto(more_TF, x_TD, weight_FD), more_TF + x_TD @ weight_FD.t(), atol=1e-6
        )
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, weight_FD, bias_F, "none", [], "")
    return found


def _onednn_onto(base_TF: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x_TD, base_TF, weight_FD, None, "add")
    return found


def _suits(x_TD: Tensor, weight_FD: Tensor) -> bool:
    return (
        x_TD.device.type == "cpu"
        and x_TD.dtype == weight_FD.dtype == torch.float32
        and x_TD.shape[0] > 0
        and not (torch.is_grad_enabled() and (x_TD.requires_grad or weight_FD.requires_grad))
        and has_onednn()
    )


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (T, F)."""
    if _suits(x_TD, weight_FD):
        return _onednn(x_TD, weight_FD, bias_F)
    return F.linear(x_TD, weight_FD, bias_F)


def product_onto(base_TF: Tensor, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """base + x Wᵀ, (T, F)."""
    if _suits(x_TD, weight_FD):
        return _onednn_onto(base_TF, x_TD, weight_FD)
    return torch.addmm(base_TF, x_TD, weight_FD.t())
