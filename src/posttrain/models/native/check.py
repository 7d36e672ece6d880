"""The C kernels against torch, on random numbers of awkward sizes: what is asked once before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.models.native import kernels

Found = tuple[str, Tensor, Tensor]


def largest_gap(n_threads: int) -> tuple[str, float]:
    """(kernel, difference): the largest of all, by the size of torch's numbers; NaN counts as infinite. To be asked in
    a thread without modes of torch; it will compute with `n_threads` threads."""
    torch.set_num_threads(n_threads)
    draw = torch.Generator().manual_seed(0)
    found = [pair for part in (_attention, _norms, _turns, _gates, _scores, _steps) for pair in part(_random(draw))]
    gaps = [(name, _gap(ours.detach(), theirs.detach())) for name, ours, theirs in found]
    return max(gaps, key=lambda x: x[1])


def _gap(ours: Tensor, theirs: Tensor) -> float:
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    return gap if gap == gap else float("inf")


def _random(draw: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float32)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _attention(random: Callable[..., Tensor]) -> Iterator[Found]:
    """A prompt of 37 tokens with answers of 30 and 5, and a row of 29; 4 heads on 2, of size 20."""
    rows = [(0, 37, 0, 0), (37, 30, 0, 37), (67, 5, 0, 37), (72, 29, 0, 0)]
    laid, n = kernels.Rows.of(rows), 101
    q, k, v, g = random(n, 4, 20), random(n, 2, 20), random(n, 2, 20), random(n, 4, 20)
    for window in (None, 9):
        seen = torch.zeros(n, n, dtype=torch.bool)
        for start, length, prefix_start, prefix in rows:
            place = torch.tensor([*range(prefix_start, prefix_start + prefix), *range(start, start + length)])
            behind = (prefix + torch.arange(length))[:, None] - torch.arange(prefix + length)
            seen[start : start + length, place] = (behind >= 0) & (behind < (window or n))
        leaves = _leaves(q, k, v)
        wide = [x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in leaves]
        theirs = F.scaled_dot_product_attention(wide[0], wide[1], wide[2], attn_mask=seen, scale=0.3).transpose(0, 1)
        theirs.backward(g)
        out, lse = kernels.attend(q, k, v, laid, 0.3, window)
        yield "attention", out, theirs
        ours = kernels.attend_backward(g, (q, k, v, out, lse), laid, 0.3, window)
        for mine, leaf in zip(ours, leaves, strict=True):
            assert leaf.grad is not None
            yield "attention's gradient", mine, leaf.grad


def _norms(random: Callable[..., Tensor]) -> Iterator[Found]:
    x, w, g, more = random(7, 37), random(37), random(7, 37), random(7, 37)
    leaves = _leaves(x, w)
    theirs = F.rms_norm(leaves[0], (37,), leaves[1], 1e-3)
    theirs.backward(g)
    y, r = kernels.norm(x, w, 1e-3)
    yield "norm", y, theirs
    dx, dw = kernels.norm_backward(g.clone(), x, r, w, True, more)
    assert dw is not None and leaves[0].grad is not None and leaves[1].grad is not None
    yield "norm's gradient", dx, leaves[0].grad + more
    yield "norm's gradient", dw, leaves[1].grad


def _turns(random: Callable[..., Tensor]) -> Iterator[Found]:
    x, w, g, angle = random(5, 3, 20), random(20), random(5, 3, 20), random(5, 1, 10).repeat(1, 1, 2)
    for normed in (True, False):
        leaves = _leaves(x, w)
        y = F.rms_norm(leaves[0], (20,), leaves[1], 1e-3) if normed else leaves[0]
        theirs = y * angle.cos() + torch.cat([-y[..., 10:], y[..., :10]], -1) * angle.sin()
        theirs.backward(g)
        out, r = kernels.turn(x, w if normed else None, 1e-3, angle.cos(), angle.sin())
        yield "rotation", out, theirs
        kept = (x, r, w) if r is not None else None
        dx, dw = kernels.turn_backward(g, angle.cos(), angle.sin(), kept, True)
        assert leaves[0].grad is not None
        yield "rotation's gradient", dx, leaves[0].grad
        if dw is not None:
            assert leaves[1].grad is not None
            yield "rotation's gradient", dw, leaves[1].grad


def _gates(random: Callable[..., Tensor]) -> Iterator[Found]:
    g, u, dh = random(5, 37) * 8, random(5, 37), random(5, 37)
    leaves = _leaves(g, u)
    theirs = F.silu(leaves[0]) * leaves[1]
    theirs.backward(dh)
    yield "gate", kernels.gate(g, u), theirs
    h, dg, du = kernels.gate_backward(dh.clone(), g, u)
    assert leaves[0].grad is not None and leaves[1].grad is not None
    yield "gate", h, theirs
    yield "gate's gradient", dg, leaves[0].grad
    yield "gate's gradient", du, leaves[1].grad


def _scores(random: Callable[..., Tensor]) -> Iterator[Found]:
    for n_tokens in (101, 7):
        logits, target = random(5, n_tokens) * 9, torch.tensor([0, n_tokens - 1, 5, 6, 3])
        logp = (logits * 0.7).log_softmax(-1)
        slope = torch.empty_like(logits)
        ours, entropy = kernels.score(logits.clone(), target, 0.7, slope_RV=slope)
        yield "softmax", ours, logp.gather(1, target[:, None]).squeeze(1)
        yield "entropy", entropy, -(logp.exp() * logp).sum(-1)
        yield "softmax's gradient", slope, logp.exp() - F.one_hot(target, n_tokens)
        kept, sums = torch.zeros(4, 5, dtype=torch.float32), torch.zeros(5, dtype=torch.float32)
        kept[0] = -torch.inf
        for first, block in ((0, logits[:, :5].clone()), (5, logits[:, 5:].clone())):
            shrink = kernels.fold(block, target, 0.7, kept, first)
            sums = sums * shrink + block.sum(1)
        top, total, dots, at = kept
        yield "softmax of blocks", at - top - total.log(), ours
        yield "entropy of blocks", total.log() - dots / total, entropy
        yield "sums of blocks", sums / total, 1 - logp.gather(1, target[:, None]).squeeze(1).exp()
        rest = logits[:, 5:].clone()
        kernels.unfold(rest, target, top + total.log(), ours, 0.7, 5)
        yield "gradient of a block", rest, slope[:, 5:]


def _steps(random: Callable[..., Tensor]) -> Iterator[Found]:
    """Five answers to two prompts at column 6 of blocks of 4 and 4; 4 heads on 2, of size 20; the last began at 3."""
    q, k, v = random(5, 4, 20), random(5, 2, 20), random(5, 2, 20)
    prompts, blocks = (
        [random(2, 2, 9, 20) for _ in range(2)],
        [[random(5, 2, 4, 20) for _ in range(2)] for _ in range(2)],
    )
    group, begun, length = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 0, 0, 3]), torch.tensor([9, 5])
    for window in (None, 4):
        places = (group, begun, length)
        ours = kernels.decode_attend(
            q, k, v, prompts[0], prompts[1], places, [(a, b) for a, b in blocks], 6, 0.3, window
        )
        theirs = torch.zeros_like(q)
        for s in range(5):
            keys, values = (
                torch.cat([p[group[s], :, : length[group[s]]], *(b[i][s] for b in blocks)], 1)[
                    :, : length[group[s]] + 7
                ]
                for i, p in enumerate(prompts)
            )
            seen = [j for j in range(keys.shape[1]) if not 0 <= j - int(length[group[s]]) < begun[s]][-(window or 99) :]
            for head in range(4):
                weights = (keys[head // 2, seen] @ q[s, head] * 0.3).softmax(0)
                theirs[s, head] = weights @ values[head // 2, seen]
        yield "attention of a step", ours, theirs
    joined, weight, angle = random(5, 8 * 20), random(6, 20), random(5, 10)
    turn = torch.stack([angle.cos(), angle.sin()], -1)
    for norm in (weight, None):
        heads = joined.view(5, 8, 20)
        qk = heads[:, :6] if norm is None else F.rms_norm(heads[:, :6], (20,), None, 1e-3) * norm
        pairs = torch.view_as_complex(qk.unflatten(2, (-1, 2)).contiguous()) * torch.view_as_complex(turn)[:, None]
        theirs = torch.cat([torch.view_as_real(pairs).flatten(2), heads[:, 6:]], 1)
        yield "heads of a step", torch.cat(kernels.decode_heads(joined, norm, 1e-3, turn.flatten(1), 4, 2), 1), theirs
    gate, up = random(3, 37), random(3, 37)
    yield "gate of a step", kernels.decode_gate(torch.cat([gate, up], 1)), F.silu(gate) * up
    x, weight, bias, base = random(5, 37), random(48, 37), random(48), random(5, 48)
    yield "product of a step", kernels.decode_product(x, weight.t().contiguous(), bias), F.linear(x, weight, bias)
    yield (
        "product of a step",
        kernels.decode_product(x, weight.t().contiguous(), None, base.clone()),
        base + x @ weight.t(),
    )
    logits, at = random(64, 101) * 3, torch.linspace(0, 1 - 2**-52, 64, dtype=torch.float64)
    token, logp = kernels.decode_draw(logits, at)
    until = logits.double().softmax(-1).cumsum(-1)
    yield "draw", token.float(), (until <= at[:, None] * until[:, -1:]).sum(-1).clamp(max=100).float()
    yield "draw", logp, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
