"""The C kernels as functions of tensors. They take float32 tensors on a CPU that lie in one piece, and carry no
gradients: their callers are autograd functions whose backward pass is here too.

Before the first use each is compared with what torch computes; where one differs, none is used.

Axes: T tokens, D width, F width of the MLP, H query heads, h key/value heads, n heads of either kind, E head size,
R rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.native.library import load

VECTOR = 16  # floats of the widest vector: sizes that must be whole vectors are multiples of it
REAL = (Tensor, nn.Parameter)  # those without contents are of other classes, or on no device
_estimating: ContextVar[bool] = ContextVar("estimating", default=False)
SAME = 1e-5  # largest difference from torch's results, by the largest of them
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "attend": (*[_POINTER] * 6, *[_LONG] * 4, _FLOAT, _LONG),
    "attend_backward": (*[_POINTER] * 10, _LONG, _POINTER, *[_LONG] * 4, _FLOAT, _LONG),
    "norm": (*[_POINTER] * 4, _LONG, _LONG, _FLOAT),
    "norm_backward": (*[_POINTER] * 7, _LONG, _LONG),
    "turn": (_POINTER, _POINTER, _FLOAT, *[_POINTER] * 4, *[_LONG] * 3),
    "turn_backward": (*[_POINTER] * 8, *[_LONG] * 3),
    "gate": (*[_POINTER] * 3, _LONG),
    "gate_backward": (*[_POINTER] * 5, _LONG),
    "decode_heads": (_POINTER, _POINTER, _FLOAT, *[_POINTER] * 4, *[_LONG] * 4),
    "decode_attend": (*[_POINTER] * 10, *[_LONG] * 8, _FLOAT),
    "decode_product": (*[_POINTER] * 4, *[_LONG] * 4),
    "decode_draw": (*[_POINTER] * 4, _LONG, _LONG),
    "decode_gate": (*[_POINTER] * 2, _LONG, _LONG),
    "fold": (_POINTER, _POINTER, _FLOAT, *[_POINTER] * 2, *[_LONG] * 3),
    "unfold": (_POINTER, _POINTER, _FLOAT, *[_POINTER] * 2, *[_LONG] * 3),
    "score": (_POINTER, _POINTER, _FLOAT, *[_POINTER] * 3, _LONG, _LONG),
}
_WITH_STATUS = frozenset(
    {"attend", "attend_backward", "decode_attend", "decode_draw", "norm_backward", "score", "turn_backward"}
)


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    library, fault = load()
    if library is None:
        return None, fault
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, ctypes.c_int if name in _WITH_STATUS else None
    return library, ""


@cache
def fault() -> str | None:
    """None where the kernels are in use; else why they are not."""
    library, why = _library()
    if library is None:
        return why
    from posttrain.models.native.check import largest_gap

    # In a thread of its own: the first to ask may be under autocast, in a checkpointed layer or inference mode, or only
    # count what tensors without contents take. None of that reaches another thread.
    with ThreadPoolExecutor(1) as thread:
        name, gap = thread.submit(largest_gap, torch.get_num_threads()).result()
    return None if gap <= SAME else f"their {name} differs from torch's by {gap:.2g}"


def serve(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these."""
    given = [t for t in tensors if t is not None]
    if not all(t.dtype == torch.float32 for t in given):
        return False
    if all(map(_has_contents, given)):
        return fault() is None
    return _estimating.get() and fault() is None


@contextmanager
def estimating(on: bool) -> Iterator[None]:
    """Within, tensors without contents go where those of a CPU would: memory and operations are counted, not done."""
    token = _estimating.set(on)
    try:
        yield
    finally:
        _estimating.reset(token)


def _has_contents(tensor: Tensor) -> bool:
    return type(tensor) in REAL and tensor.device.type == "cpu"


@cache
def _function(name: str) -> Any:
    library, why = _library()
    assert library is not None, why
    return getattr(library, name)


def _call(name: str, *arguments: Any) -> None:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    assert all(a.is_contiguous() for a in tensors), name
    if not all(map(_has_contents, tensors)):
        return
    if _function(name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)):
        if name == "score":
            raise IndexError(f"a target is not among the {arguments[-1]} tokens of the vocabulary")
        raise MemoryError(f"{name}: no memory for its working space")


@dataclass(frozen=True, slots=True)
class Rows:
    """Attention rows as the kernels read them: start, length, prefix start, prefix length. Families, a prompt and all
    that see it, stand together, the longest work first; `families` are their ends, after a 0."""

    rows_R4: Tensor
    families: Tensor
    n_scores: int  # of one head

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int]]) -> Rows:
        families: dict[int, list[tuple[int, int, int, int]]] = {}
        for start, length, prefix_start, prefix in rows:
            if length:
                families.setdefault(prefix_start if prefix else start, []).append((start, length, prefix_start, prefix))
        ordered = sorted(families.values(), key=lambda f: -sum(n * (prefix + n // 2) for _, n, _, prefix in f))
        ends = torch.tensor([0, *(len(f) for f in ordered)]).cumsum(0)
        flat = [row for f in ordered for row in f]
        n_scores = sum(length * (prefix + length) for _, length, _, prefix in flat)
        return cls(torch.tensor(flat, dtype=torch.int64).view(-1, 4), ends, n_scores)


# As operations of torch's own kind, so that whoever counts operations sees them. A row's scores are counted whole, as
# fused kernels' formulas count them.


@torch.library.custom_op("posttrain::attend", mutates_args=())
def _attend(
    q_THE: Tensor, k_ThE: Tensor, v_ThE: Tensor, rows_R4: Tensor, scale: float, window: int, n_scores: int
) -> tuple[Tensor, Tensor]:
    del n_scores  # for whoever counts
    out_THE, lse_TH = torch.empty_like(q_THE), q_THE.new_empty(q_THE.shape[:2])
    shape = q_THE.shape[1], k_ThE.shape[1], q_THE.shape[2]
    _call("attend", q_THE, k_ThE, v_ThE, out_THE, lse_TH, rows_R4, len(rows_R4), *shape, scale, window)
    return out_THE, lse_TH


@_attend.register_fake
def _(q_THE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_THE), q_THE.new_empty(q_THE.shape[:2])


@torch.library.custom_op("posttrain::attend_backward", mutates_args=())
def _attend_backward(
    q_THE: Tensor, k_ThE: Tensor, v_ThE: Tensor, out_THE: Tensor, lse_TH: Tensor, g_THE: Tensor,
    rows_R4: Tensor, families: Tensor, scale: float, window: int, n_scores: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del n_scores
    dq_THE, dk_ThE, dv_ThE = torch.empty_like(q_THE), torch.zeros_like(k_ThE), torch.zeros_like(v_ThE)
    _call(
        "attend_backward", q_THE, k_ThE, v_ThE, out_THE, lse_TH, g_THE, dq_THE, dk_ThE, dv_ThE,
        rows_R4, len(rows_R4), families, len(families) - 1, q_THE.shape[1], k_ThE.shape[1], q_THE.shape[2],
        scale, window,
    )  # fmt: skip
    return dq_THE, dk_ThE, dv_ThE


@_attend_backward.register_fake
def _(q_THE: Tensor, k_ThE: Tensor, v_ThE: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_THE), torch.empty_like(k_ThE), torch.empty_like(v_ThE)


def attend(
    q_THE: Tensor, k_ThE: Tensor, v_ThE: Tensor, rows: Rows, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(T, H, E) and the logarithm of each query's sum of exponentials, (T, H). Every token is a query of one row."""
    return _attend(q_THE, k_ThE, v_ThE, rows.rows_R4, scale, window or 0, rows.n_scores)


def attend_backward(
    g_THE: Tensor, kept: Sequence[Tensor], rows: Rows, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `kept`: q, k, v, and what `attend` gave."""
    return _attend_backward(*kept, g_THE, rows.rows_R4, rows.families, scale, window or 0, rows.n_scores)


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm: y = x · r ⊙ w and r = (mean x² + eps)^−½, (T, 1)."""
    y_TD, r_T1 = torch.empty_like(x_TD), x_TD.new_empty((x_TD.shape[0], 1))
    _call("norm", x_TD, weight_D, y_TD, r_T1, *x_TD.shape, eps)
    return y_TD, r_T1


def norm_backward(
    g_TD: Tensor, x_TD: Tensor, r_T1: Tensor, weight_D: Tensor, wanted: bool, more_TD: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, plus `more`; gradient of the weight). `g` is spent."""
    dw_D = torch.empty_like(weight_D) if wanted else None
    _call("norm_backward", g_TD, x_TD, r_T1, weight_D, more_TD, g_TD, dw_D, *x_TD.shape)
    return g_TD, dw_D


def turn(x_TnE: Tensor, weight_E: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    """Heads normed, where there is a weight, then turned by their token's angles; and the norms' r (T, n, 1)."""
    _check_angles(x_TnE, cos, sin)
    y_TnE = torch.empty_like(x_TnE)
    r_Tn1 = x_TnE.new_empty((*x_TnE.shape[:2], 1)) if weight_E is not None else None
    _call("turn", x_TnE, weight_E, eps, cos, sin, y_TnE, r_Tn1, *x_TnE.shape)
    return y_TnE, r_Tn1


def turn_backward(
    g_TnE: Tensor, cos: Tensor, sin: Tensor, normed: tuple[Tensor, Tensor, Tensor] | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, gradient of the weight); `normed`: x, r and the weight."""
    _check_angles(g_TnE, cos, sin)
    x, r, weight = normed if normed is not None else (None, None, None)
    dx = torch.empty_like(g_TnE)
    dw = torch.empty_like(weight) if wanted and weight is not None else None
    _call("turn_backward", g_TnE, x, weight, r, cos, sin, dx, dw, *g_TnE.shape)
    return dx, dw


def _check_angles(x_TnE: Tensor, cos: Tensor, sin: Tensor) -> None:
    n_tokens, _, size = x_TnE.shape
    if size % 2 or not cos.shape == sin.shape == (n_tokens, 1, size):
        raise ValueError(f"heads {tuple(x_TnE.shape)} cannot be turned by angles {tuple(cos.shape)}")


def gate(g_TF: Tensor, u_TF: Tensor) -> Tensor:
    """silu(g) ⊙ u"""
    h_TF = torch.empty_like(g_TF)
    _call("gate", g_TF, u_TF, h_TF, g_TF.numel())
    return h_TF


def gate_backward(dh_TF: Tensor, g_TF: Tensor, u_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(silu(g) ⊙ u again, gradient of g, gradient of u). `dh` is spent."""
    h_TF, du_TF = torch.empty_like(g_TF), torch.empty_like(g_TF)
    _call("gate_backward", dh_TF, g_TF, u_TF, h_TF, du_TF, g_TF.numel())
    return h_TF, dh_TF, du_TF


def score(
    logit_RV: Tensor, target_R: Tensor, factor: float, *, entropy: bool = True, slope_RV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p[target] and entropy (nats; empty where it is not wanted) of softmax(factor · logits); `slope` becomes
    p − onehot. The logits are spent. Targets are int64; IndexError where one is not in the vocabulary."""
    assert target_R.dtype == torch.int64 and target_R.shape == logit_RV.shape[:1]
    logp_R = logit_RV.new_empty(len(logit_RV))
    entropy_R = logit_RV.new_empty(len(logit_RV) if entropy else 0)
    _call("score", logit_RV, target_R, factor, logp_R, entropy_R if entropy else None, slope_RV, *logit_RV.shape)
    return logp_R, entropy_R


def fold(logit_RC: Tensor, target_R: Tensor, factor: float, kept_4R: Tensor, first: int) -> Tensor:
    """Takes in a block of columns, from `first` on, of factor · logits. `kept` holds of each row so far: the largest
    logit, top; Σ e^(x − top); Σ e^(x − top) (x − top); the target's x. The block becomes e^(x − top), 0 at the target.
    (R,): what sums over earlier blocks are to be multiplied by."""
    assert target_R.dtype == torch.int64 and target_R.shape == logit_RC.shape[:1] and kept_4R.dtype == torch.float32
    shrink_R = logit_RC.new_empty(len(logit_RC))
    _call("fold", logit_RC, target_R.contiguous(), factor, kept_4R, shrink_R, first, *logit_RC.shape)
    return shrink_R


def unfold(logit_RC: Tensor, target_R: Tensor, lse_R: Tensor, logp_R: Tensor, factor: float, first: int) -> None:
    """The same block of logits becomes p − onehot."""
    assert target_R.dtype == torch.int64 and lse_R.dtype == logp_R.dtype == torch.float32
    _call("unfold", logit_RC, target_R.contiguous(), factor, lse_R, logp_R, first, *logit_RC.shape)


# A step of the sampler: short work many times. Its callers ask `serve` and hand over tensors in one piece.


def decode_heads(
    joined_SX: Tensor, weight_nE: Tensor | None, eps: float, turn_SE: Tensor, n_heads: int, n_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From joined projections, (S, (H + 2h) E) with pairs side by side: queries (S, H, E) and keys (S, h, E) normed,
    where there is a weight (H + h, E), and turned by (S, E) cosines and sines in pairs; values (S, h, E)."""
    n, size = turn_SE.shape
    assert joined_SX.shape == (n, (n_heads + 2 * n_kv) * size) and joined_SX.dtype == torch.float32
    q, k, v = (joined_SX.new_empty((n, heads, size)) for heads in (n_heads, n_kv, n_kv))
    _function("decode_heads")(
        joined_SX.data_ptr(), None if weight_nE is None else weight_nE.data_ptr(), eps, turn_SE.data_ptr(),
        q.data_ptr(), k.data_ptr(), v.data_ptr(), n, n_heads, n_kv, size,
    )  # fmt: skip
    return q, k, v


def decode_attend(
    q_SHE: Tensor, k_ShE: Tensor, v_ShE: Tensor, prompt_k_PhLE: Tensor, prompt_v_PhLE: Tensor,
    places: tuple[Tensor, Tensor, Tensor], blocks: Sequence[tuple[Tensor, Tensor]], n_columns: int,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Writes keys and values of this step into column `n_columns` of `blocks`, pairs of (S or more, h, B, E) that have
    room for it, and attends: each answer sees its prompt and its own columns. `places`: the group of each answer, its
    first column, and the length of each group's prompt, int64. (S, H, E)"""
    out = torch.empty_like(q_SHE)
    flat = [x for k, v in blocks for x in (k.data_ptr(), v.data_ptr(), k.shape[2])]
    n_slots, n_heads, size = q_SHE.shape
    pointers = (x.data_ptr() for x in (q_SHE, k_ShE, v_ShE, out, prompt_k_PhLE, prompt_v_PhLE, *places))
    if _function("decode_attend")(
        *pointers, (_LONG * len(flat))(*flat), len(blocks), n_slots, n_heads, k_ShE.shape[1], size,
        prompt_k_PhLE.shape[2], n_columns, window or 0, scale,
    ):  # fmt: skip
        raise MemoryError("decode_attend: no memory for its working space")
    return out


def decode_gate(joined_SX: Tensor) -> Tensor:
    """silu(g) ⊙ u of joined rows (S, 2F): (S, F)"""
    n, width = joined_SX.shape
    h_SF = joined_SX.new_empty((n, width // 2))
    _function("decode_gate")(joined_SX.data_ptr(), h_SF.data_ptr(), n, width // 2)
    return h_SF


def decode_unit(x_SD: Tensor, ones_D: Tensor, eps: float) -> Tensor:
    """x · (mean x² + eps)^−½"""
    y_SD, rate_S = torch.empty_like(x_SD), x_SD.new_empty(len(x_SD))
    _function("norm")(x_SD.data_ptr(), ones_D.data_ptr(), y_SD.data_ptr(), rate_S.data_ptr(), *x_SD.shape, eps)
    return y_SD


def decode_product(x_SK: Tensor, weight_KN: Tensor, bias_N: Tensor | None, onto_SN: Tensor | None = None) -> Tensor:
    """x W + b, or onto + x W in its place; N a multiple of `VECTOR`."""
    n, width = len(x_SK), weight_KN.shape[1]
    assert x_SK.shape[1] == len(weight_KN) and x_SK.dtype == torch.float32 and x_SK.is_contiguous()
    out = x_SK.new_empty((n, width)) if onto_SN is None else onto_SN
    bias = None if bias_N is None else bias_N.data_ptr()
    where = x_SK.data_ptr(), weight_KN.data_ptr(), bias, out.data_ptr()
    _function("decode_product")(*where, n, *weight_KN.shape, onto_SN is not None)
    return out


def decode_draw(logit_SV: Tensor, at_S: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `at` (float64, below 1), and its log-probability."""
    token_S, logp_S = torch.empty(len(at_S), dtype=torch.int64), logit_SV.new_empty(len(at_S))
    if _function("decode_draw")(
        logit_SV.data_ptr(), at_S.data_ptr(), token_S.data_ptr(), logp_S.data_ptr(), *logit_SV.shape
    ):
        raise MemoryError("decode_draw: no memory for its working space")
    return token_S, logp_S
