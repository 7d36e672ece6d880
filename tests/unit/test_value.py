"""Models that score: read where they should be, saved as trained, opened by others with the same score.

Planted: another token read, padding that is the end token, a saved model that is not the trained one, a language model
where a reward model is wanted and the other way round, an architecture without a class that scores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, mixed_trees, random_tree, tiny_policy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.models import value
from posttrain.models.adapters import add_lora
from posttrain.models.load import LoadOptions, load_policy, save_policy, weights_fingerprint
from posttrain.models.policy import Policy
from posttrain.models.value import (
    ANSWER,
    at_ends,
    load_scorer,
    probe_scores,
    read_scores,
    save_scorer,
    saved_scorer_differs,
    with_score,
)
from posttrain.settings import LoraSettings

END, START = 0, 1  # ids of <|end|> and <|im_start|> in the byte tokenizer


def scorer(arch: str = "llama", *, lora: bool = False, **config: Any) -> Policy:
    policy = tiny_policy(arch, seed=2, forest="auto", **config)
    policy.tokenizer = byte_tokenizer()
    if lora:
        add_lora(policy, LoraSettings(r=4, dropout=0.0), seed=3)
        with torch.no_grad():
            for name, p in policy.trainable().items():
                if "lora_B" in name:
                    p.add_(0.05)
    return with_score(policy, ANSWER, seed=7)


@torch.no_grad()
def stock_scores(model: Any, trees: list[Any]) -> list[float]:
    """Each answer a row of its own through transformers' class, with no padding token, so that it reads the last."""
    found = []
    for tree in trees:
        for branch in tree.branches:
            config = model.config
            pad, config.pad_token_id = config.pad_token_id, None
            found.append(model(torch.tensor([[*tree.trunk_ids, *branch.token_ids]])).logits[0, 0].item())
            config.pad_token_id = pad
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "opt", "gpt_oss"])
def test_forest_and_padded_rows_and_the_stock_class_give_one_score(arch: str, tmp_path: Path) -> None:
    model = scorer(arch)
    trees = [at_ends(tree) for tree in mixed_trees()]
    with torch.no_grad():
        ours = read_scores(model, trees)[0]
        layout, model.layout = model.layout, "padded"
        padded = read_scores(model, trees)[0] if layout == "forest" else ours
    assert float((ours - padded).abs().max()) <= 1e-5
    save_scorer(model, tmp_path, stop_token_ids=(END,))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert ours.tolist() == pytest.approx(stock_scores(stock, trees), abs=1e-4)
    assert len(set(ours.tolist())) == len(ours), "a constant would agree with anything"


def test_marks_decide_what_is_read() -> None:
    """The state of the marked token itself, not of the one that predicts it."""
    model = scorer()
    tree = random_tree(3, 4, 5)
    marked = [(0,), (2,), (4,), (0, 2, 4)]
    found = []
    for at in marked:
        branch = value.Branch(tree.branches[0].token_ids, tuple(i in at for i in range(5)))
        with torch.no_grad():
            found.append(read_scores(model, [value.Tree("t", tree.trunk_ids, (branch,))])[0].tolist())
    assert found[3] == pytest.approx([found[0][0], found[1][0], found[2][0]], abs=1e-6)
    with torch.no_grad():
        cut = value.Tree("t", tree.trunk_ids, (value.Branch(tree.branches[0].token_ids[:3], (False, False, True)),))
        assert read_scores(model, [cut])[0].tolist() == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("arch", ["mamba", "granite"])
def test_an_architecture_that_cannot_is_refused_by_name(arch: str) -> None:
    with pytest.raises(ModelError, match=f"{arch} cannot become a reward model: transformers has no class"):
        with_score(tiny_policy(arch, forest="auto"), ANSWER, seed=0)


def test_what_an_adapter_would_train_in_vain_is_refused_and_what_trains_is_counted() -> None:
    """The output layer, and its copy that was to train, are gone; the score's 32 numbers came."""
    policy = tiny_policy("llama", seed=2)
    add_lora(policy, LoraSettings(r=4, modules_to_save=["norm", "lm_head"]), seed=3)
    with pytest.raises(ModelError, match="lm_head is the output layer, which a reward model does not have"):
        with_score(policy, ANSWER, seed=7)
    for arch, head in (("llama", 97 * 32), ("qwen3", 0)):
        policy = tiny_policy(arch, seed=2)
        before = add_lora(policy, LoraSettings(r=4, modules_to_save=["embed_tokens"]), seed=3)
        model = with_score(policy, ANSWER, seed=7)
        assert before.on(model.model) == replace(
            before, n_trained=before.n_trained + 32, n_frozen=before.n_frozen - head
        )


def test_a_class_that_scores_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = value.read_scores
    monkeypatch.setattr(value, "read_scores", lambda *a: (real(*a)[0] + 1.0, None))
    with pytest.raises(ModelError, match="its own class scores otherwise, by 1"):
        scorer()


@pytest.mark.parametrize("lora", [False, True])
def test_saved_equals_trained_and_a_change_is_noticed(lora: bool, tmp_path: Path) -> None:
    model = scorer(lora=lora)
    assert "score.weight" in model.trainable(), "it trains with adapters too"
    save_scorer(model, tmp_path, stop_token_ids=(END,))
    assert saved_scorer_differs(model, tmp_path) is None
    back = load_scorer(str(tmp_path), LoadOptions())
    assert back.layout == "forest"
    assert torch.allclose(probe_scores(back), probe_scores(model), atol=1e-5)
    assert not any("lora" in name for name in back.model.state_dict())
    with torch.no_grad():
        model.model.score.weight.add_(0.1)
    assert "its scores differ by" in str(saved_scorer_differs(model, tmp_path))


def test_others_read_a_padded_batch_at_the_end_token(tmp_path: Path) -> None:
    """Where padding is the end token, transformers' own class would read the token before the end."""
    model = scorer()
    assert model.tokenizer.pad_token_id == END
    save_scorer(model, tmp_path, stop_token_ids=(END,))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert tokenizer.pad_token_id == stock.config.pad_token_id == START
    rows = [[10, 11, 12, 13, END], [20, 21, END]]
    trees = [at_ends(value.Tree(str(i), (row[0],), (value.Branch(tuple(row[1:]), ()),))) for i, row in enumerate(rows)]
    with torch.no_grad():
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        theirs = stock(**batch).logits[:, 0]
        ours = read_scores(model, trees)[0]
        stock.config.pad_token_id = END
        wrong = stock(torch.tensor([[20, 21, END, END, END]])).logits[0, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert abs(float(wrong - ours[1])) > 1e-3, "the fault this prevents"
    assert model.tokenizer.pad_token_id == END, "the tokenizer in use stays as it is"


def test_without_another_special_token_nothing_pads(tmp_path: Path) -> None:
    model = scorer()
    save_scorer(model, tmp_path, stop_token_ids=(0, 1, 2))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert stock.config.pad_token_id is None
    with pytest.raises(ValueError, match="padding token"):
        stock(torch.tensor([[5, 6, 0], [7, 0, 0]]))


def test_a_language_model_and_a_reward_model_are_not_mistaken(tmp_path: Path) -> None:
    policy = tiny_policy("llama", tie_word_embeddings=True)
    policy.tokenizer = byte_tokenizer()
    save_policy(policy, tmp_path / "lm", stop_token_ids=(END,))
    save_scorer(with_score(policy, ANSWER, seed=1), tmp_path / "rm", stop_token_ids=(END,))
    with pytest.raises(ModelError, match="lm is a language model, not a reward model"):
        load_scorer(str(tmp_path / "lm"), LoadOptions())
    with pytest.raises(ModelError, match="rm is a reward model: it scores answers and writes none"):
        load_policy(str(tmp_path / "rm"))


def test_the_same_seed_begins_with_the_same_score() -> None:
    prints = [weights_fingerprint(with_score(tiny_policy("llama"), ANSWER, seed=seed)) for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
