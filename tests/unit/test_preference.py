"""Preference methods on real models: losses of the whole batch, KTO's baseline, the reference in all its forms.

Planted: a whole-batch loss taken piece by piece, a baseline of each micro-batch, mismatched answers that match, the
answers of another model, a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from stepped import ALL_AT_ONCE, ONE_BY_ONE, nudge, step
from tiny import byte_tokenizer, largest_gap, random_tree, tiny_policy

from posttrain.errors import ModelError, TrainingStopped
from posttrain.losses.pairs import PairLogps
from posttrain.losses.preference import PREFERENCE_LOSSES
from posttrain.methods import against, dpo, kto
from posttrain.methods.stage import Stage
from posttrain.models import reference as reference_module
from posttrain.models.policy import Policy
from posttrain.models.reference import Reference
from posttrain.records import Branch
from posttrain.reporting import Reporter
from posttrain.settings import DPOSettings
from posttrain.train.loop import micro_batches
from posttrain.train.metrics import read_metrics


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", ["aot", "sft"], "sigmoid", "ipo", "apo_down"])
def test_however_a_step_is_cut_its_gradient_value_and_figures_stay(loss_type: Any, tmp_path: Path) -> None:
    changes = {"loss_type": loss_type, "beta": 0.3, "ld_alpha": 0.4}
    whole, parts = (step("dpo", budget, tmp_path / str(budget), **changes) for budget in (ALL_AT_ONCE, ONE_BY_ONE))
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert largest_gap(parts[1], whole[1]) <= 1e-5 * max(float(g.abs().max()) for g in whole[1].values())
    assert parts[2].keys() == whole[2].keys()
    for name, mean in whole[2].items():
        assert parts[2][name].total == pytest.approx(mean.total, rel=1e-4, abs=1e-4)
        assert parts[2][name].count == mean.count


def test_sorting_each_micro_batch_would_have_been_noticed(tmp_path: Path) -> None:
    """What a library does that calls the loss on each micro-batch: with one pair there is nothing to sort."""
    policy = toy.policy_for("dpo")
    s = toy.METHODS["dpo"].settings(per_device_train_batch_size=6, loss_type="aot", beta=0.3)
    objective = toy.METHODS["dpo"].objective(policy, s, toy.place_in(tmp_path))
    nudge(policy, 0.1)
    items = objective.batch(1).items
    whole = objective.loss(items).total.item()
    objective._n_batch = 1
    assert abs(sum(objective.loss([item]).total.item() for item in items) - whole) > 1e-2
    with pytest.raises(AssertionError, match="a part of a batch that must be whole"):
        objective.loss(items[:3])


# --- held-out rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "of"),
    [
        ("dpo-weighed", "pair_loss"),
        ("dpo-aot", "pair_loss"),
        ("kto", "row_loss"),
        ("reward_model", "pair_loss"),
        ("process_reward_model", "step_loss"),
    ],
)
def test_an_evaluation_is_the_loss_of_the_held_out_rows_and_less_is_better(
    method: str, of: str, tmp_path: Path
) -> None:
    policy = toy.policy_for(method)
    s = toy.METHODS[method].settings(per_device_train_batch_size=50, micro_batch_tokens=ONE_BY_ONE)
    objective = toy.METHODS[method].objective(policy, s, toy.place_in(tmp_path))
    alone = trained_on_held_out(method, objective, policy, s, tmp_path / "alone")
    nudge(policy)
    batch = alone.batch(1)  # the second epoch: before the first step both must agree
    with torch.no_grad():
        parts = [alone.loss(micro).total.item() for micro in micro_batches(batch.items, ONE_BY_ONE)]
    found = objective.evaluate()
    assert found.value == found.metrics[f"eval_{of}"] == pytest.approx(sum(parts) / batch.count, rel=1e-4)
    assert found.beats(found.value + 1)
    assert not found.beats(found.value - 1)


def trained_on_held_out(method: str, objective: Any, policy: Policy, s: Any, directory: Path) -> Any:
    """An objective that has for its training rows what the other one holds out."""
    stage = toy.stage_in(policy, toy.place_in(directory))
    if method == "kto":
        return replace(kto.kto_objective(stage, s, objective.held_out.rated, []), weights=objective.weights)
    if method.startswith("dpo"):
        return toy.pair_objective(stage, s, dpo.pair_loss(s), objective.held_out, [])
    return replace(objective, items=objective.held_out, held_out=(), steps=[tuple(range(len(objective.held_out)))] * 2)


# --- weights on tokens and pairs -----------------------------------------------------------------------------------


def test_wpo_and_ld_dpo_through_the_model(tmp_path: Path) -> None:
    """Worked again from the model's own logits, answer by answer."""
    policy, start = toy.policy_for("dpo"), toy.policy_for("dpo")
    s = toy.METHODS["dpo"].settings(per_device_train_batch_size=4, use_weighting=True, ld_alpha=0.25, beta=0.2)
    objective = toy.METHODS["dpo"].objective(policy, s, toy.place_in(tmp_path))
    nudge(policy)
    items = objective.batch(1).items
    expected = 0.0
    for item in items:
        shared = min(sum(b.scored) for b in item.tree.branches)
        sums, weight = [], 1.0
        for branch in item.tree.branches:
            now, excess = answer(policy, item.tree.trunk_ids, branch)
            before, _ = answer(start, item.tree.trunk_ids, branch)
            tail = torch.where(torch.arange(len(now)) < shared, 1.0, 0.25)
            sums.append(((now - before) * tail).sum())
            weight *= excess.mean().exp().item()
        expected += weight * -torch.nn.functional.logsigmoid(0.2 * (sums[0] - sums[1])).item()
    assert objective.loss(items).total.item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def answer(policy: Policy, trunk: tuple[int, ...], branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the scored tokens, and each less log Σ p² of its distribution."""
    ids = torch.tensor([[*trunk, *branch.token_ids]])
    policy.model.set_attn_implementation("eager")
    logps = policy.model(input_ids=ids).logits[0].float().log_softmax(-1)
    policy.model.set_attn_implementation("posttrain_forest")
    at = [len(trunk) + i for i, scored in enumerate(branch.scored) if scored]
    picked = torch.stack([logps[i - 1, ids[0, i]] for i in at])
    return picked, picked - torch.stack([logps[i - 1].exp().square().sum().log() for i in at])


# --- the reference -------------------------------------------------------------------------------------------------


def forbid_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_policy: Policy) -> Policy:
        raise AssertionError("a second copy of the weights")

    monkeypatch.setattr(reference_module, "_frozen_copy", refuse)


def test_with_kept_answers_no_second_copy_of_the_weights_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_copies(monkeypatch)
    policy = toy.policy_for("dpo")
    objective = toy.dpo_objective(policy, toy.METHODS["dpo"].settings(), toy.place_in(tmp_path))
    assert objective.against is not None
    assert objective.against.reference is None
    with pytest.raises(AssertionError, match="a second copy"):
        toy.dpo_objective(policy, toy.METHODS["dpo"].settings(precompute_ref_log_probs=False), toy.place_in(tmp_path))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_asked_once_or_at_every_step_training_is_the_same(method: str, lora: bool, tmp_path: Path) -> None:
    results = []
    for kept in (True, False):
        policy = toy.policy_for(method, lora=lora)
        settings = {"precompute_ref_log_probs": kept, "eval_steps": 2, **toy.SMOOTH}
        toy.run(method, tmp_path / str(kept), policy, **settings)
        results.append(toy.weights(policy))
        assert (tmp_path / str(kept) / "reference.json").exists() == kept
    assert largest_gap(*results) <= 1e-6
    lines = [read_metrics(tmp_path / str(kept) / "metrics.jsonl")[-1] for kept in (True, False)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)


def test_damaged_answers_are_asked_for_again(tmp_path: Path) -> None:
    policy, s, place = toy.policy_for("dpo"), toy.METHODS["dpo"].settings(), toy.place_in(tmp_path)
    right = toy.dpo_objective(policy, s, place).answers
    file = tmp_path / "reference.json"
    stored = json.loads(file.read_text())
    stored["logps"][3][1] += 1e-3
    file.write_text(json.dumps(stored))
    again = toy.dpo_objective(policy, s, place).answers
    assert right is not None
    assert again is not None
    assert torch.equal(right.logp_TB, again.logp_TB)
    again.logp_TB[0, 0] += 1
    with pytest.raises(AssertionError, match="answers changed during training"):
        again.refuse_if_changed()


def with_tokenizer(policy: Policy) -> Policy:
    policy.tokenizer = byte_tokenizer()
    return policy


def stage_against(policy: Policy, other: Policy, directory: Path) -> Stage:
    return replace(toy.stage_in(policy, toy.place_in(directory)), reference=lambda: other)


def test_another_model_as_reference_gives_its_log_ratios_from_the_first_step(tmp_path: Path) -> None:
    policy, other = with_tokenizer(toy.policy_for("dpo")), with_tokenizer(tiny_policy("llama", seed=3))
    s = toy.METHODS["dpo"].settings(beta=0.5)
    trees = toy.pair_trees()
    objective = toy.pair_objective(stage_against(policy, other, tmp_path), s, dpo.pair_loss(s), trees, trees[:3])
    batch = objective.batch(0)
    found = objective.loss(batch.items)
    with torch.no_grad():
        ratios = [
            [policy.score([one])[0].logp_N.sum() - other.score([one])[0].logp_N.sum() for one in alone(item.tree)]
            for item in batch.items
        ]
    expected = sum(-torch.nn.functional.logsigmoid(0.5 * (c - r)).item() for c, r in ratios)
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected - len(ratios) * 0.693) > 0.5, "not ln 2: it is another model"


def test_another_model_as_reference_answers_without_dropout(tmp_path: Path) -> None:
    policy, other = with_tokenizer(toy.policy_for("dpo")), with_tokenizer(tiny_policy("phi3", resid_pdrop=0.5))
    other.model.train()
    s, trees = toy.METHODS["dpo"].settings(precompute_ref_log_probs=False), toy.pair_trees()
    live = against.open_reference(stage_against(policy, other, tmp_path), s).live
    assert live is not None
    assert torch.equal(live.ask(trees), live.ask(trees))


def alone(tree: Any) -> list[Any]:
    return [replace(tree, branches=(branch,)) for branch in tree.branches]


def test_stored_answers_of_another_model_are_refused_when_a_probe_disagrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no step 0 at which both agree, so the reference itself is asked a few again. Planted: a key that does
    not depend on the weights."""
    policy, other, third = (with_tokenizer(tiny_policy("llama", seed=n)) for n in (2, 3, 4))
    monkeypatch.setattr(against, "question", lambda *_: "the same for all")
    s, trees = toy.METHODS["dpo"].settings(), toy.pair_trees()
    toy.pair_objective(stage_against(policy, other, tmp_path), s, dpo.pair_loss(s), trees, [])
    with pytest.raises(TrainingStopped, match=r"stored answers and its answers now differ by .* other weights or rows"):
        toy.pair_objective(stage_against(policy, third, tmp_path), s, dpo.pair_loss(s), trees, [])


def test_a_reference_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    policy, other = with_tokenizer(toy.policy_for("dpo")), with_tokenizer(tiny_policy("llama", seed=3))
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="the reference has another tokenizer"):
        against.open_reference(stage_against(policy, other, tmp_path), toy.METHODS["dpo"].settings())


def test_a_moving_reference_of_another_shape_is_refused_before_the_first_step(tmp_path: Path) -> None:
    policy, other = with_tokenizer(toy.policy_for("dpo")), with_tokenizer(tiny_policy("qwen3", seed=3))
    s = toy.METHODS["dpo-moving"].settings()
    with pytest.raises(ModelError, match=r"the reference is of another shape: .* differs"):
        against.open_reference(stage_against(policy, other, tmp_path), s)
    alike = with_tokenizer(tiny_policy("llama", seed=3))
    assert against.open_reference(stage_against(policy, alike, tmp_path), s).live is not None


def test_a_moving_reference_goes_where_tr_dpo_says_and_nowhere_else(tmp_path: Path) -> None:
    policy = toy.policy_for("dpo-moving")
    start = toy.weights(policy)
    s = toy.METHODS["dpo-moving"].settings(ref_model_sync_steps=2, ref_model_mixup_alpha=0.25)
    objective = toy.dpo_objective(policy, s, toy.place_in(tmp_path))
    assert not (tmp_path / "reference.json").exists()
    assert objective.against is not None
    assert objective.against.live is not None
    reference = objective.against.live.reference
    nudge(policy)
    moved = toy.weights(policy)
    for at in (0, 1):
        objective._first_step = False
        objective.batch(at)
        assert toy.same_bits(toy.weights(reference._policy), start)
    objective.batch(2)
    expected = {name: 0.75 * start[name] + 0.25 * moved[name] for name in start}
    assert largest_gap(toy.weights(reference._policy), expected) <= 1e-6
    reference.refuse_if_changed()
    Reference.move(reference, policy, 1.0)
    assert largest_gap(toy.weights(reference._policy), moved) <= 1e-7
    with torch.no_grad():
        reference._policy.model.model.norm.weight[0] += 1e-6
    with pytest.raises(AssertionError, match="the reference model's weights changed"):
        objective.against.refuse_if_changed()


def test_a_reference_that_would_never_move_is_said(tmp_path: Path) -> None:
    """Six steps: with a move after every sixth there is none left to see it."""
    for every, told in ((5, 0), (6, 1)):
        lines: list[str] = []
        s = toy.METHODS["dpo-moving"].settings(ref_model_sync_steps=every)
        stage = toy.stage_in(toy.policy_for("dpo-moving"), toy.place_in(tmp_path / str(every)))
        stage = replace(stage, reporter=type("Told", (), {"line": lambda _, text: lines.append(text)})())  # type: ignore[arg-type,misc]  # noqa: B023
        assert toy.pair_objective(stage, s, dpo.pair_loss(s), toy.pair_trees()[: toy.N_ROWS], []).n_steps == 6
        assert len(lines) == told
    assert "moves the reference after every 6 steps, and there are 6: it stays where it is" in lines[0]


def test_a_reference_of_another_shape_cannot_follow(tmp_path: Path) -> None:
    policy, other = with_tokenizer(toy.policy_for("dpo-moving")), with_tokenizer(tiny_policy("qwen3", seed=3))
    with pytest.raises(ModelError, match="sync_ref_model mixes the policy's weights into the reference's"):
        against.open_reference(stage_against(policy, other, tmp_path), toy.METHODS["dpo-moving"].settings())


# --- falling chosen answers ----------------------------------------------------------------------------------------


class Said(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        if "health" in text or "going on" in text:
            self.lines.append(text)


class Killed(Exception):
    pass


def train_falling(directory: Path, *, stop: int | None = None, **keys: Any) -> Said:
    """`stop`: the power goes after so many steps."""
    said, policy, place = Said(), toy.policy_for("dpo"), toy.place_in(directory)
    pairs = [random_tree(i, 3, 5, 4) for i in range(16)]
    s = toy.METHODS["dpo"].settings(
        loss_type="apo_down", beta=2.0, learning_rate=3e-3, num_train_epochs=10, save_steps=4, **keys
    )
    objective = toy.pair_objective(toy.stage_in(policy, place), s, dpo.pair_loss(s), pairs, [])
    batch = objective.batch

    def cut(step: int) -> Any:
        if step == stop:
            raise Killed
        return batch(step)

    objective.batch = cut  # type: ignore[method-assign]
    with contextlib.suppress(Killed):
        toy.train(policy, objective, s, place, said)
    return said


def test_a_run_that_pushes_chosen_down_is_told_of_it_with_one_setting(tmp_path: Path) -> None:
    """apo_down is made to push both answers down, rejected ones further."""
    told = train_falling(tmp_path)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[-1]["chosen_fallen_share"] > 0.8
    assert metrics[-1]["reward_margin"] > 0
    (said,) = told.lines
    assert "1-toy: health: warning at step " in said
    assert said.endswith("Add the SFT term: loss_type: [apo_down, sft].")
    (noted,) = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert (noted["rule"], noted["action"]) == ("chosen_falling", "warn")
    assert 16 <= noted["step"] <= 20, "64 answers must have been seen, four a step"


def test_it_is_told_at_the_same_step_after_a_restart_and_not_twice(tmp_path: Path) -> None:
    """Stopped within the window and after it was told: what was seen, and that it was told, is in the checkpoint."""
    whole = train_falling(tmp_path / "whole")
    for steps, before in ((12, 0), (20, 1)):
        place = tmp_path / f"stopped-{steps}"
        first = train_falling(place, stop=steps)
        assert len(first.lines) == before
        then = train_falling(place)
        assert "going on after step" in then.lines[0]
        assert [*first.lines, *then.lines[1:]] == whole.lines
        assert (place / "health.jsonl").read_text() == (tmp_path / "whole" / "health.jsonl").read_text()


def test_a_recipe_may_stop_a_run_whose_chosen_answers_fall(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="of the better answers are less likely") as stopped:
        train_falling(tmp_path, health={"chosen_falling": {"action": "stop", "steps": 16}})
    assert stopped.value.where == "1-toy health.chosen_falling"


# --- from keys to losses -------------------------------------------------------------------------------------------


def settings(**keys: Any) -> DPOSettings:
    return DPOSettings(datasets=[{"path": "x"}], **keys)


def test_defaults_are_those_of_the_papers() -> None:
    assert settings().beta == 0.1
    assert settings(loss_type="sigmoid_norm").beta == 5.0
    assert settings(loss_type="sppo_hard").beta == 1e-3
    assert settings(loss_type=["sppo_hard", "sft"]).beta == 1e-3
    assert settings(loss_type="exo_pair").label_smoothing == 1e-3
    assert settings(loss_type="robust").label_smoothing == 0.1
    assert settings().label_smoothing == 0.0
    simpo = toy.METHODS["simpo"].settings()
    assert (simpo.beta, simpo.gamma_beta_ratio, simpo.cpo_alpha) == (2.0, 0.5, 0.0)
    assert toy.METHODS["cpo"].settings().cpo_alpha == 1.0
    assert toy.METHODS["orpo"].settings().beta == 0.1


@pytest.mark.parametrize("name", sorted(set(PREFERENCE_LOSSES) - {"simpo", "alphapo", "cpo", "orpo"}))
def test_every_loss_a_recipe_may_name_gets_the_keys_it_reads(name: str) -> None:
    """None is missing and none is left over: each is called."""
    one = torch.tensor([1.0])
    pair = PairLogps(-one, -one, one, one)
    weighed = dpo.pair_loss(
        settings(loss_type=[name, "hinge"], loss_weights=[0.5, 2.0], f_divergence_type="js_divergence")
    )
    assert [(t.name, t.coefficient) for t in weighed.terms] == [(name, 0.5), ("hinge", 2.0)]
    for term in weighed.terms:
        PREFERENCE_LOSSES[term.name](pair, pair, **term.params)


def test_ipo_is_the_paper_s_unless_token_means_are_asked_for() -> None:
    assert dpo.pair_loss(settings(loss_type="ipo")).terms[0].params["length_normalized"] is False
    assert dpo.pair_loss(settings(loss_type="ipo", length_normalized=True)).terms[0].params["length_normalized"] is True
