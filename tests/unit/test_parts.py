"""MLPs and slopes in parts: the same numbers, and only where parts are worth it."""

from __future__ import annotations

import pytest
import torch
from tiny import gradients, largest_gap, mixed_trees, tiny_policy

from posttrain.models import folded, halves
from posttrain.models import head as head_module
from posttrain.models.memory import MAPPED_FROM


def test_parts_cover_the_rows_in_round_numbers() -> None:
    width = 1408
    most = MAPPED_FROM // (4 * width)
    for n_rows, n_parts in ((most // 64 * 64, 1), (most + 64, 2), (4544, 2), (10_000, 4), (16_384, 1)):
        parts = halves.parts_of(torch.empty(n_rows, 1), width)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n_rows))
        assert len(parts) == n_parts
        assert n_parts == 1 or all((p.stop - p.start) * width * 4 <= MAPPED_FROM for p in parts)
        assert all(p.start % 64 == 0 for p in parts)
    assert len(halves.parts_of(torch.empty(3000, 1), 8960)) == 1, "so few rows would be slow"


def test_slopes_are_kept_in_parts_below_the_same_limit() -> None:
    cpu = torch.device("cpu")
    for n, vocabulary, n_parts in ((3300, 4096, 5), (256, 4096, 1), (900, 151_936, 1), (0, 4096, 0), (10_000, 4096, 1)):
        tiles = folded.tiles(n, vocabulary, cpu)
        parts = head_module._parts(tiles, vocabulary, cpu)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert len(parts) == n_parts
        assert n_parts < 2 or all((p.stop - p.start) * vocabulary * 4 < MAPPED_FROM for p in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_give_the_same_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3", seed=0)
    policy.model.to(dtype)
    trees = mixed_trees()
    policy.score(trees)[0].logp_N.sum().backward()
    whole = gradients(policy)
    halves_of = halves.parts_of
    monkeypatch.setattr(halves, "ROUND", 4)
    monkeypatch.setattr(halves, "LEAST_ROWS", 4)
    monkeypatch.setattr(halves, "MOST_PARTS", 100)
    monkeypatch.setattr(halves, "MAPPED_FROM", 4096)
    monkeypatch.setattr(head_module, "MAPPED_FROM", 4096)
    monkeypatch.setattr(folded, "TILE", {"cpu": 400})
    monkeypatch.setattr(folded, "LEAST_ROWS", 4)
    assert len(halves_of(torch.empty(40, 1, dtype=dtype), 48)) > 1
    policy.score(trees)[0].logp_N.sum().backward()
    assert largest_gap(whole, gradients(policy)) <= (1e-4 if dtype == torch.float32 else 1e-11)
