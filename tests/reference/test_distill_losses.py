"""The generalised Jensen–Shannon divergence against hand-worked values, a slow float64 twin, and its gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from posttrain.losses.distill import generalised_jsd
from posttrain.methods.distill import divergences
from posttrain.models.output import Head

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def slow_jsd(student: Sequence[float], teacher: Sequence[float], beta: float) -> float:
    """From probabilities, term by term."""

    def kl(p: Sequence[float], q: Sequence[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixed = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def distribution(rng: random.Random, n: int) -> list[float]:
    weights = [math.exp(rng.gauss(0, 3)) for _ in range(n)]
    return [w / math.fsum(weights) for w in weights]


def logs(p: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


def test_by_hand() -> None:
    """Student ½ ½, teacher ¼ ¾. KL(T‖S) = ¼ ln ½ + ¾ ln 3⁄2; KL(S‖T) = ½ ln 2 + ½ ln ⅔; with β = ½ the mixture is
    ⅜ ⅝: ½ (¼ ln ⅔ + ¾ ln 6⁄5) + ½ (½ ln 4⁄3 + ½ ln ⅘)."""
    ours, theirs = logs([[0.5, 0.5]]), logs([[0.25, 0.75]])
    assert float(generalised_jsd(ours, theirs, 0.0)) == pytest.approx(0.13081203594113698, abs=1e-15)
    assert float(generalised_jsd(ours, theirs, 1.0)) == pytest.approx(0.14384103622589045, abs=1e-15)
    half = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(0.8))
    assert float(generalised_jsd(ours, theirs, 0.5)) == pytest.approx(half, abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_the_slow_twin_s(beta: float) -> None:
    rng = random.Random(3)
    ours, theirs = ([distribution(rng, 40) for _ in range(25)] for _ in range(2))
    expected = [slow_jsd(s, t, beta) for s, t in zip(ours, theirs, strict=True)]
    found = generalised_jsd(logs(ours), logs(theirs), beta)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert (generalised_jsd(logs(ours), logs(ours), beta).abs() < 1e-12).all()


def test_its_ends_are_the_limits() -> None:
    rng = random.Random(4)
    ours, theirs = logs([distribution(rng, 12)]), logs([distribution(rng, 12)])
    for beta, scale, end in ((1e-7, 1e-7, 0.0), (1 - 1e-7, 1e-7, 1.0)):
        quotient = generalised_jsd(ours, theirs, beta) / scale
        torch.testing.assert_close(quotient, generalised_jsd(ours, theirs, end), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient(beta: float) -> None:
    torch.manual_seed(0)
    ours = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: generalised_jsd(x.log_softmax(-1), theirs.log_softmax(-1), beta), (ours,))
    generalised_jsd(ours.log_softmax(-1), theirs.log_softmax(-1), beta).sum().backward()
    assert theirs.grad is None, "the teacher carries no gradient"


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_tiles_are_the_whole(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions in tiles of two, a soft cap, temperature, heads of unlike widths: values and gradients of one piece."""
    torch.manual_seed(1)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    theirs, big = torch.randn(7, 9, dtype=torch.float64), torch.randn(24, 9, dtype=torch.float64)
    capped = (hidden @ weight[:18].T / 2.0).tanh() * 2.0
    whole = generalised_jsd(
        (capped / 0.7).log_softmax(-1),
        (theirs @ big[:18].T / 0.7).log_softmax(-1),
        beta,
    )
    expected = torch.autograd.grad((whole * torch.arange(7)).sum(), (hidden, weight))
    monkeypatch.setattr("posttrain.methods.distill.TILE", {"cpu": 2 * 18, "cuda": 2 * 18})
    monkeypatch.setattr("posttrain.methods.distill.LEAST_ROWS", 1)
    head, teacher_head = Head(weight, softcap=2.0), Head(big)
    found, agrees = divergences(hidden, head, theirs, teacher_head, beta=beta, temperature=0.7, width=18)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((found * torch.arange(7)).sum(), (hidden, weight))
    for ours, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    same = (hidden @ weight[:18].T).argmax(-1) == (theirs @ big[:18].T).argmax(-1)
    assert agrees.tolist() == same.double().tolist() and not agrees.requires_grad
