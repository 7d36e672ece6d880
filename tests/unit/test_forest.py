"""A forest must give what padded rows give, computed once. Planted: answers that see each other, keys beyond the
window, a table off by one, an architecture the forest cannot serve."""

from __future__ import annotations

import pytest
import torch
from tiny import FOREST, PADDED, gradients, largest_gap, mixed_trees, random_tree, stock_logps, tiny_policy

from posttrain.errors import ModelError
from posttrain.models import forest as forest_module
from posttrain.models.forest import build_forest
from posttrain.models.native import kernels
from posttrain.models.padded import build_padded
from posttrain.models.policy import Policy
from posttrain.records import Branch, Tree

TOLERANCE = 1e-5  # float32; forest and rows add in another order


def tree(trunk: tuple[int, ...], *branches: tuple[int, ...]) -> Tree:
    return Tree("t", trunk, tuple(Branch(b, (True,) * len(b)) for b in branches))


def weighted_loss(policy: Policy, trees: list[Tree]) -> torch.Tensor:
    """Every log-prob has a weight of its own, so that errors cannot cancel."""
    logp_N = policy.score(trees)[0].logp_N
    return (logp_N * torch.linspace(-1.0, 1.0, len(logp_N))).sum()


@pytest.mark.parametrize("arch", FOREST)
def test_forest_padded_and_stock_rows_agree(arch: str) -> None:
    policy = tiny_policy(arch, seed=1)
    trees = mixed_trees(1, every=0.7)
    logps, grads = {}, {}
    for layout in ("forest", "padded"):
        policy.layout = layout
        logps[layout] = policy.score(trees)[0].logp_N.detach()
        weighted_loss(policy, trees).backward()
        grads[layout] = gradients(policy)
    torch.testing.assert_close(logps["forest"], logps["padded"], atol=TOLERANCE, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(logps["forest"], stock_logps(policy, trees), atol=TOLERANCE, rtol=0)
    scale = max(float(g.abs().max()) for g in grads["padded"].values())
    assert scale > 0.1, "gradients this small would agree by being nothing"
    assert largest_gap(grads["forest"], grads["padded"]) <= TOLERANCE * max(1.0, scale)


@pytest.mark.parametrize("seed", range(8))
def test_forest_equals_padded_on_random_shapes(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def n(high: int) -> int:
        return int(torch.randint(1, high, (1,), generator=rng))

    heads = [1, 2, 4][seed % 3]
    policy = tiny_policy("mistral", seed=seed, num_key_value_heads=heads, sliding_window=n(12))
    trees = [random_tree(seed * 10 + i, n(20), *(n(16) for _ in range(n(5))), every=0.8) for i in range(n(8))]
    with torch.no_grad():
        forest = policy.score(trees)[0]
        policy.layout = "padded"
        padded = policy.score(trees)[0]
    torch.testing.assert_close(forest.logp_N, padded.logp_N, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(forest.entropy_N, padded.entropy_N, atol=TOLERANCE, rtol=0)


def test_an_answer_is_blind_to_its_siblings_and_to_other_trees() -> None:
    policy = tiny_policy("llama")
    ours, sibling, other = (5, 6, 7), (8, 9, 10, 11), tree((1, 2), (3, 4))
    with torch.no_grad():
        alone = policy.score([tree((1, 2, 3), ours)])[0].logp_N
        among = policy.score([other, tree((1, 2, 3), sibling, ours), other])[0].logp_N
    torch.testing.assert_close(among[2 + 4 : 2 + 4 + 3], alone, atol=TOLERANCE, rtol=0)


def test_the_trunk_is_laid_once_however_many_answers_hang_on_it() -> None:
    trunk, answers = tuple(range(10)), [(1, 2), (3, 4, 5), (6,)]
    group = tree(trunk, *answers)
    assert len(build_forest([group]).token_ids_T) == 10 + 2 + 3 + 1 == group.n_tokens
    assert len(build_forest([group], share_trunks=False).token_ids_T) == 3 * 10 + 6
    assert len(build_forest([tree(trunk, (1, 2))]).token_ids_T) == 12
    assert build_padded([group]).token_ids_BL.shape == (3, 13)


def test_loss_table_worked_by_hand() -> None:
    """Row:   0  1  2 | 3  4 | 5  6  7 | 8  9    tree A: trunk 0-2, answers 3-4 and 5-7; tree B: 8, answer 9
    tokens   10 11 12  20 21  30 31 32   40 50

    Scored: 20 21 of the first answer, 30 32 of the second (31 is tool output), 50 of tree B. The first token of each
    answer is predicted by the trunk's last hidden state, 2.
    """
    a = Tree(
        "a", (10, 11, 12), (Branch((20, 21), (True, True)), Branch((30, 31, 32), (True, False, True)))
    )  # fmt: skip
    b = tree((40,), (50,))
    batch = build_forest([a, b])
    assert batch.token_ids_T.tolist() == [10, 11, 12, 20, 21, 30, 31, 32, 40, 50]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1]
    assert batch.table.hidden.index_N.tolist() == [2, 3, 2, 6, 8]
    assert batch.table.target_N.tolist() == [20, 21, 30, 32, 50]
    assert batch.table.branch_N.tolist() == [0, 0, 1, 1, 2]
    assert batch.table.n_branches == 3
    # Padded rows of 6: [10 11 12 20 21 .] [10 11 12 30 31 32] [40 50 . . . .]
    padded = build_padded([a, b])
    assert padded.token_ids_BL[1].tolist() == [10, 11, 12, 30, 31, 32]
    assert padded.mask_BL.sum(1).tolist() == [5, 6, 2]
    assert padded.table.hidden.index_N.tolist() == [2, 3, 6 + 2, 6 + 4, 12 + 0]
    assert padded.table.target_N.tolist() == batch.table.target_N.tolist()


def test_masks_worked_by_hand() -> None:
    """An answer of 2 tokens on a trunk of 3: its queries have depth 3 and 4. A window of 3 hides depths ≤ depth - 3."""
    batch = build_forest([tree((1, 2, 3), (4, 5), (6, 7))])
    answers = next(g for g in batch.groups().groups if not g.plain_causal)
    assert answers.key_index_RK.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]]
    assert answers.mask(None)[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert answers.mask(3)[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_rows_of_unlike_lengths_fall_into_several_groups_and_keep_their_order() -> None:
    trees = [random_tree(i, 2, n) for i, n in enumerate((40, 3, 38, 9, 2))] + [random_tree(9, 20, 3, 18, 4)]
    batch = build_forest(trees)
    laid = batch.groups()
    assert len(laid.groups) >= 5
    assert laid.query_index[laid.place_T].tolist() == list(range(len(batch.token_ids_T)))
    for group in laid.groups:
        n_queries = group.query_index_RQ.numel()
        assert int(group.valid_RQ.sum()) / n_queries > forest_module.MIN_FILL**2


def test_a_group_is_split_when_its_scores_would_grow_too_big(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, trees = tiny_policy("llama"), [random_tree(i, 4, 6) for i in range(6)]
    monkeypatch.setattr(kernels, "serve", lambda *_: False)
    batch = build_forest(trees)
    whole, hidden = batch.groups(), policy.hidden(batch)
    monkeypatch.setattr(forest_module, "MAX_GROUP_SCORES", 2 * 10 * 10)
    split = batch.groups()
    assert (len(whole.groups), len(split.groups)) == (1, 3)
    torch.testing.assert_close(policy.hidden(batch), hidden, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", ["forest", "padded"])
def test_empty_and_unscored_answers_take_no_part(layout: str) -> None:
    policy = tiny_policy("llama")
    policy.layout = layout
    unscored = Branch((4, 5), (False, False))
    group = Tree("g", (1, 2, 3), (Branch((), ()), Branch((6, 7), (True, True)), unscored))
    with torch.no_grad():
        scored, table = policy.score([group])
        alone = policy.score([tree((1, 2, 3), (6, 7))])[0]
    assert (table.branch_N.tolist(), table.n_branches) == ([1, 1], 3)
    torch.testing.assert_close(scored.logp_N, alone.logp_N, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("build", [build_forest, build_padded])
def test_a_scored_first_token_without_a_trunk_is_refused(build: type) -> None:
    with pytest.raises(ValueError, match="t: the first token of a tree without a trunk has nothing to predict it"):
        build([tree((), (1, 2))])
    unscored_start = Tree("u", (), (Branch((1, 2), (False, True)),))
    assert build([unscored_start]).table.hidden.index_N.tolist() == [0]


@pytest.mark.parametrize("arch", PADDED)
def test_an_architecture_without_a_forest_falls_back_aloud(arch: str) -> None:
    policy = tiny_policy(arch, forest="auto")
    assert policy.layout == "padded"
    assert len(policy.notes) == 1
    assert f"forest off for {arch}" in policy.notes[0]
    trees = mixed_trees(2)
    with torch.no_grad():
        ours = policy.score(trees)[0].logp_N
        torch.testing.assert_close(ours, stock_logps(policy, trees), atol=TOLERANCE, rtol=0)
    with pytest.raises(ModelError, match=f"forest: on, but {arch} cannot") as refused:
        tiny_policy(arch, forest="on")
    assert "forest: auto" in refused.value.remedy


def test_off_is_padded_and_says_nothing() -> None:
    policy = tiny_policy("llama", forest="off")
    assert (policy.layout, policy.notes) == ("padded", [])
    assert policy.model.config._attn_implementation != "posttrain_forest"


@pytest.mark.parametrize("forest", ["on", "off"])
def test_gradient_checkpointing_gives_the_same_gradients(forest: str) -> None:
    policy, trees = tiny_policy("gemma2", forest=forest), mixed_trees(3)
    policy.model.train()
    weighted_loss(policy, trees).backward()
    plain = gradients(policy)
    runs: list[int] = []
    policy.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weighted_loss(policy, trees).backward()
    assert len(runs) == 2, "forward, and again in the backward pass"
    assert largest_gap(gradients(policy), plain) <= 1e-6


def test_bfloat16_autocast_trains_on_a_cpu() -> None:
    policy, trees = tiny_policy("qwen3"), mixed_trees(4)
    weighted_loss(policy, trees).backward()
    exact, exact_grads = policy.score(trees)[0].logp_N, gradients(policy)
    policy.autocast = torch.bfloat16
    rough = policy.score(trees)[0].logp_N
    gap = (rough - exact).abs().max()
    assert 1e-6 < gap < 0.2, "computed in bfloat16, and close"
    weighted_loss(policy, trees).backward()
    for name, g in gradients(policy).items():
        assert g.dtype == torch.float32
        exact_g = exact_grads[name]
        assert float((g - exact_g).norm()) <= 0.15 * float(exact_g.norm()) + 1e-3, name
