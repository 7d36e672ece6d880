"""KTO on real models: the baseline of the whole step, answers of other prompts, weights of the classes.

Planted: mismatched answers that match, a class that is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path

import pytest
import torch
import toy
from small_run import go, preference, recipe, rows, sft, small_data, tiny_base
from stepped import ALL_AT_ONCE, ONE_BY_ONE, nudge, step
from tiny import byte_tokenizer, largest_gap, random_tree

from posttrain.data.render import Renderer
from posttrain.errors import DataError, TrainingStopped
from posttrain.methods import kto
from posttrain.records import Message, Pair, Rated, Tree
from posttrain.train.metrics import read_metrics


def test_kto_measures_its_baseline_once_over_the_whole_step(tmp_path: Path) -> None:
    whole, parts = (step("kto", budget, tmp_path / str(budget)) for budget in (ALL_AT_ONCE, ONE_BY_ONE))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert largest_gap(parts[1], whole[1]) <= 1e-5 * max(float(g.abs().max()) for g in whole[1].values())
    assert parts[2]["kto_z0"].value == pytest.approx(whole[2]["kto_z0"].value, rel=1e-4)
    assert parts[2]["reward_good"].count + parts[2]["reward_bad"].count == 6


def test_the_baseline_is_the_mean_log_ratio_of_other_prompts_answers(tmp_path: Path) -> None:
    """By hand from the two models; a baseline per micro-batch would be another one for each row."""
    policy, start = toy.policy_for("kto"), toy.policy_for("kto")
    s = toy.METHODS["kto"].settings(per_device_train_batch_size=6, micro_batch_tokens=ONE_BY_ONE)
    objective = toy.METHODS["kto"].objective(policy, s, toy.place_in(tmp_path))
    with torch.no_grad():  # towards what the mismatched answers hold, so that the mean is above 0
        policy.model.lm_head.weight.mul_(0.5)
    batch = objective.batch(1)
    others = [objective.rows.mismatched[i] for i in objective.steps[1]]
    with torch.no_grad():
        ratios = [(policy.score([t])[0].logp_N.sum() - start.score([t])[0].logp_N.sum()).item() for t in others]
    assert batch.metrics["kto_z0"].value == pytest.approx(sum(ratios) / 6, rel=1e-4)
    assert sum(ratios) > 1
    assert max(ratios) - min(ratios) > 1


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_step_and_an_evaluation_by_hand(loss_type: str, tmp_path: Path) -> None:
    """Good ones weigh 2 and bad ones 5; each has the baseline of its own rows, or none."""
    policy, start = toy.policy_for("kto"), toy.policy_for("kto")
    s = toy.METHODS["kto"].settings(loss_type=loss_type, beta=0.5, desirable_weight=2.0, undesirable_weight=5.0)
    objective = toy.METHODS["kto"].objective(policy, s, toy.place_in(tmp_path))
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.5)

    @torch.no_grad()
    def ratios(trees: list[Tree]) -> list[float]:
        return [(policy.score([t])[0].logp_N.sum() - start.score([t])[0].logp_N.sum()).item() for t in trees]

    def expected(rows: kto.Rows, places: Sequence[int]) -> tuple[float, float]:
        z0, total = 0.0, 0.0
        if loss_type == "kto":
            z0 = sum(ratios([rows.mismatched[i] for i in places])) / len(places)
            assert z0 > 0.3
        for place, x in zip(places, ratios([rows.rated[i].tree for i in places]), strict=True):
            sign, weight = (1, 2) if rows.rated[place].good else (-1, 5)
            total += weight * (1 - 1 / (1 + exp(-sign * 0.5 * (x - z0))))
        return z0, total

    z0, total = expected(objective.held_out, range(2))
    evaluation = objective.evaluate()
    assert evaluation is not None
    assert evaluation.metrics["eval_row_loss"] == pytest.approx(total / 2, rel=1e-4)
    assert evaluation.metrics.get("eval_kto_z0", 0.0) == pytest.approx(z0, rel=1e-4)
    assert replace(objective, held_out=kto.Rows([], [])).evaluate() is None
    batch = objective.batch(1)
    _, total = expected(objective.rows, objective.steps[1])
    assert objective.loss(batch.items).total.item() == pytest.approx(total, rel=1e-4)
    assert batch.count == len(batch.items) == 4
    assert ("kto_z0" in batch.metrics) == bool(objective.rows.mismatched) == (loss_type == "kto")


def test_answers_of_another_model_are_refused_at_the_first_step_and_only_there(tmp_path: Path) -> None:
    policy = toy.policy_for("kto")
    objective = toy.METHODS["kto"].objective(policy, toy.METHODS["kto"].settings(), toy.place_in(tmp_path))
    nudge(policy)
    with pytest.raises(TrainingStopped, match="the reference is not the model this stage started from"):
        objective.loss(objective.batch(0).items)
    objective.evaluate()
    objective.loss(objective.batch(1).items)


def test_mismatched_answers_belong_to_other_prompts_and_fit() -> None:
    trunk = random_tree(1, 4).trunk_ids
    same = [replace(random_tree(i, 4, 3 + i), trunk_ids=trunk) for i in range(5)]
    trees = [*same, *(random_tree(10 + i, 3 + i, 9) for i in range(4))]
    for seed in range(6):
        found = kto.mismatched(trees, seed, max_length=12)
        assert [t.trunk_ids for t in found] == [t.trunk_ids for t in trees]
        for tree, own in zip(found, trees, strict=True):
            ids = tree.branches[0].token_ids
            prompts = [t.trunk_ids for t in trees if t.branches[0].token_ids[: len(ids)] == ids]
            assert prompts
            assert own.trunk_ids not in prompts
            assert len(tree.trunk_ids) + len(tree.branches[0].token_ids) <= 12
    assert kto.mismatched(trees, 1, 12) == kto.mismatched(trees, 1, 12) != kto.mismatched(trees, 2, 12)
    with pytest.raises(DataError, match="all 5 rows have the same prompt"):
        kto.mismatched(same, 0, 12)


def test_good_and_bad_rows_are_shuffled_together_and_weighed(tmp_path: Path) -> None:
    policy = toy.policy_for("kto")
    objective = toy.METHODS["kto"].objective(policy, toy.METHODS["kto"].settings(), toy.place_in(tmp_path))
    marks = [[objective.rows.rated[i].good for i in rows] for rows in objective.steps]
    assert sum(len(set(of_step)) == 2 for of_step in marks) >= len(marks) - 1, "nearly every step has both kinds"
    assert objective.weights == pytest.approx((1, (8 / 4) / (4 / 3))), "8 good, 4 bad: 8 · 1 / (4 · 1.5) = 4/3"
    s = toy.METHODS["kto"].settings(desirable_weight=2.0)
    stage = toy.stage_in(policy, toy.place_in(tmp_path))
    assert kto.weigh(stage, s, objective.rows.rated) == (2.0, 1.0)
    s = toy.METHODS["kto"].settings(undesirable_weight=3.0)
    assert kto.weigh(stage, s, objective.rows.rated) == (1.0, 3.0)
    with pytest.raises(DataError, match="all 8 answers are good"):
        kto.weigh(stage, s, [r for r in objective.rows.rated if r.good])


def test_a_pair_is_one_good_and_one_bad_answer_and_a_thumb_is_one() -> None:
    pair, single = random_tree(1, 3, 4, 2), random_tree(2, 3, 5)
    found = kto.rated_trees([pair, single], {single.id: False})
    assert [(r.tree.branches, r.good) for r in found] == [
        ((pair.branches[0],), True), ((pair.branches[1],), False), (single.branches, False)
    ]  # fmt: skip
    assert {r.tree.trunk_ids for r in found[:2]} == {pair.trunk_ids}


def test_a_rated_row_renders_like_the_chosen_side_of_a_pair() -> None:
    renderer = Renderer(byte_tokenizer(), "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
                        "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    prompt, answer = (Message("user", "Hi"),), (Message("assistant", "Hello."),)
    pair = renderer.pair(Pair("p", prompt, answer, (Message("assistant", "Go."),)))
    (rated,) = renderer.rated([Rated("p", prompt, answer, good=True)])
    assert rated == replace(pair, branches=pair.branches[:1])
    with pytest.raises(DataError, match="must begin with an assistant message"):
        renderer.rated([Rated("p", prompt, prompt, good=True)])


def test_a_file_of_thumbs_trains_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters good: the good answer gains on the bad one, and the weights say how the classes were balanced."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tiny_base(tmp_path / "base")
    small_data(tmp_path)
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    thumbs = [{"prompt": q, "completion": "now" if i % 4 else "ok", "label": bool(i % 4)} for i, q in enumerate(asked)]
    rows(tmp_path / "thumbs.jsonl", thumbs)
    stages = sft(), preference("kto", datasets=[{"path": "thumbs.jsonl"}], max_steps=20)
    report, said = go(recipe(tmp_path, *stages), tmp_path / "home")
    assert "2-kto: 45 good answers weigh 1 each, 15 bad ones 2.25: good over bad is 1.33" in said
    metrics = read_metrics(tmp_path / "home" / "runs" / "small" / report.outcomes[1].artefact.version / "metrics.jsonl")
    assert metrics[-1]["reward_good"] > metrics[-1]["reward_bad"] + 0.05
