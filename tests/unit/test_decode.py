"""The sampler's own walk through a decoder and its cache: the tokens and log-probs of the model, whatever was laid out
anew for speed. Planted: weights of the last call, columns of others, prompts that wander."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from tiny import random_tree, tiny_policy

from posttrain.models import decode
from posttrain.models.attention import AttentionCall
from posttrain.models.decode import decoder_of
from posttrain.models.policy import Policy
from posttrain.records import Branch, Completion, Request, Sampling, Tree
from posttrain.rollout import cache
from posttrain.rollout.cache import ForestCache, LayerCache
from posttrain.rollout.local import LocalEngine

TOLERANCE = 1e-5
SHORT = ["plain_llama", "qwen2", "qwen3"]


def asked(n: int) -> list[Request]:
    return [
        Request(str(i), random_tree(i, 2 + 5 * i).trunk_ids, tuple(range(9 * i, 9 * i + 1 + i % 4))) for i in range(n)
    ]


def gap(policy: Policy, requests: list[Request], groups: list[list[Completion]]) -> float:
    """Largest difference between the sampler's log-probs and the trainer's."""
    trees = [
        Tree(r.id, r.prompt_ids, tuple(Branch(c.token_ids, (True,) * len(c.token_ids)) for c in group))
        for r, group in zip(requests, groups, strict=True)
    ]
    with torch.no_grad():
        trained = policy.score(trees)[0].logp_N
    sampled = torch.tensor([x for c in chain(*groups) for x in c.logps], dtype=trained.dtype)
    return float((sampled - trained).abs().max())


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight in oneDNN's layout, where there is one: those of small models are else left as they are."""
    monkeypatch.setattr(decode, "PACKED_FROM", 1)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("arch", SHORT)
def test_weights_laid_out_anew_are_the_trainer_s_of_the_moment(arch: str) -> None:
    policy, requests = tiny_policy(arch, seed=5), asked(4)
    straight = policy.straight()
    assert straight is not None
    assert decoder_of(straight, policy.head, 64) is not None
    engine, how = LocalEngine(policy, str), Sampling(max_new_tokens=10)
    before = engine.generate(requests, how)
    assert gap(policy, requests, before) <= TOLERANCE
    with torch.no_grad():
        for p in policy.model.parameters():
            p.data.mul_(1.3)  # behind the back of torch's version counters
    after = engine.generate(requests, how)
    assert gap(policy, requests, after) <= TOLERANCE
    assert gap(policy, requests, before) > 0.01, "other weights would not show"


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("arch", SHORT)
def test_greedy_tokens_are_those_of_generate(arch: str) -> None:
    policy = tiny_policy(arch, seed=6)
    request = asked(4)[3]
    (ours,) = LocalEngine(policy, str).generate(
        [Request("r", request.prompt_ids, (1,))], Sampling(max_new_tokens=20, temperature=0.0)
    )[0]
    policy.model.set_attn_implementation("sdpa")
    ids = torch.tensor([request.prompt_ids])
    theirs = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(ours.token_ids) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2"])
def test_groups_that_join_late_see_their_own_columns_only(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four columns, so that they are merged and forgotten often; groups join while others are under way."""
    monkeypatch.setattr(cache, "GROW", 4)
    policy, requests = tiny_policy(arch, seed=7), asked(9)
    forgot: list[int] = []
    forget = LayerCache.forget
    monkeypatch.setattr(LayerCache, "forget", lambda self, n: (forgot.append(n), forget(self, n))[1])
    joined: list[int] = []
    join = ForestCache.join
    monkeypatch.setattr(ForestCache, "join", lambda self, other: (joined.append(self.n_columns), join(self, other))[1])
    how = Sampling(max_new_tokens=40, stop_token_ids=tuple(range(0, policy.model.config.vocab_size, 25)))
    groups = LocalEngine(policy, str, max_slots=6).generate(requests, how)
    assert max(joined) > 0
    assert max(forgot) >= 4
    assert gap(policy, requests, groups) <= TOLERANCE
    alone = [LocalEngine(policy, str).generate([r], how)[0] for r in requests]
    assert [c.token_ids for c in chain(*groups)] == [c.token_ids for c in chain(*alone)]


def test_double_precision_stays_what_it_is() -> None:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    prompt = torch.randn(2, 1, 2, 3, 4, generator=draw, dtype=torch.float64)
    layer = LayerCache(prompt[0], prompt[1])
    found = ForestCache(np.array([3]), np.array([0]), np.array([0]), 9, layers={0: layer})
    seen = found.attend(AttentionCall(0, None, None, None, 0.0), q, k, v)
    keys, values = (torch.cat([prompt[i][0], x[0][:, None]], dim=1) for i, x in enumerate((k, v)))
    weights = (torch.einsum("he,hle->hl", q[0], keys) / 2).softmax(-1)
    torch.testing.assert_close(seen[0], torch.einsum("hl,hle->he", weights, values), atol=1e-14, rtol=0)


def test_blocks_stay_few_and_whole() -> None:
    """300 columns of two slots: every column is where it was written, in few blocks."""
    layer = LayerCache(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    found = ForestCache(np.array([1]), np.array([0, 0]), np.array([0, 0]), 400, layers={0: layer})
    for column in range(300):
        found._own(layer, torch.full((2, 1, 1), float(column)), torch.full((2, 1, 1), -float(column)))
        found.n_columns += 1
    keys, values = (torch.cat([block[i] for block in layer.own], dim=2)[:, :, :300] for i in (0, 1))
    assert keys[1, 0, :, 0].tolist() == list(range(300))
    assert values[0, 0, :, 0].tolist() == [-c for c in range(300)]
    assert [k.shape[2] for k, _ in layer.own] == [256, 32, 32]
    layer.forget(96)
    assert torch.cat([k for k, _ in layer.own], dim=2)[0, 0, :204, 0].tolist() == list(range(96, 300))


def test_a_slot_that_leaves_is_followed_by_the_last_and_nobody_changes_prompts() -> None:
    layer = LayerCache(torch.arange(3.0).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))
    found = ForestCache(np.array([4, 5, 6]), np.array([0, 0, 1, 1, 2, 2]), np.zeros(6, dtype=int), 9, layers={0: layer})
    mark = torch.arange(6.0).view(6, 1, 1)
    found._own(layer, mark, mark)
    found.n_columns = 1
    prompt_of = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    order = found.keep(np.array([0, 3, 4, 5]))
    assert order.tolist() == [0, 4, 5, 3]
    assert layer.own[0][0][:4, 0, 0, 0].tolist() == [0, 4, 5, 3]
    prompts = layer.prompt_k_PhLE.flatten()[found.group_S].tolist()
    assert prompts == [prompt_of[s] for s in order]
    order = order[found.keep(np.array([1, 3]))]  # nobody of the first prompt is left
    assert sorted(order.tolist()) == [3, 4]
    assert len(layer.prompt_k_PhLE) == 2
    assert layer.prompt_k_PhLE.flatten()[found.group_S].tolist() == [prompt_of[s] for s in order]
    assert found.depth_S.tolist() == [{1: 5, 2: 6}[prompt_of[s]] + 1 for s in order]
