"""The loop under faults: NaN, interruption, crash and resume, damaged checkpoints; and the best evaluation is kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from posttrain.errors import EXIT_INTERRUPTED, ArtefactError, Interrupted, TrainingStopped
from posttrain.losses.terms import LossSum
from posttrain.models.policy import Policy
from posttrain.train.loop import Place, train
from posttrain.train.metrics import read_metrics
from posttrain.train.objective import Evaluation

TIMES = {"seconds", "seconds_sampling", "tokens_per_second", "reward_seconds"}
N_STEPS = 6


class Killed(Exception):
    """Stands for power going: nothing after it runs."""


def build(method: str, directory: Path, *, lora: bool = False, **settings: Any) -> tuple[Policy, Any, Any, Place]:
    policy = toy.policy_for(method, lora=lora)
    s, place = toy.METHODS[method].settings(**settings), toy.place_in(directory)
    return policy, toy.METHODS[method].objective(policy, s, place), s, place


def before_step(objective: Any, step: int, do: Callable[[], None]) -> None:
    """Plant something at the beginning of optimiser step `step` (from 0)."""
    batch = objective.batch

    def planted(at: int) -> Any:
        if at == step:
            do()
        return batch(at)

    objective.batch = planted


def killed() -> None:
    raise Killed


def lines(place: Place) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(place.metrics)]


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "lora"),
    # A reference moves in full weights only.
    [(m, lora) for m in toy.METHODS for lora in (False, True) if (m, lora) != ("dpo-moving", True)],
)
def test_killed_and_resumed_equals_never_killed_bit_for_bit(method: str, lora: bool, tmp_path: Path) -> None:
    """Killed in step 5, after the checkpoint of step 3: with two iterations a batch, in the middle of one."""
    settings = {"save_steps": 3, "eval_steps": 2}
    policy, objective, s, whole = build(method, tmp_path / "whole", lora=lora, **settings)
    train(policy, objective, s, whole, toy.QUIET)
    assert [line["step"] for line in lines(whole)] == list(range(1, N_STEPS + 1))

    victim, objective, s, place = build(method, tmp_path / "killed", lora=lora, **settings)
    before_step(objective, 4, killed)
    with pytest.raises(Killed):
        train(victim, objective, s, place, toy.QUIET)
    with place.metrics.open("a") as f:
        f.write('{"step": 5, "loss": 0.')  # the line being written when the power went
    assert [p.name for p in place.checkpoints.iterdir()] == ["step-000003"]

    again, objective, s, place = build(method, tmp_path / "killed", lora=lora, **settings)
    trained = train(again, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(again), toy.weights(policy))
    assert lines(place) == lines(whole)
    assert trained.steps == N_STEPS


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path)
    train(policy, objective, s, place, toy.QUIET)
    again, objective, s, place = build("sft", tmp_path)
    before_step(objective, 0, killed)
    trained = train(again, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(again), toy.weights(policy))
    assert trained.metrics["step"] == N_STEPS


# --- faults ------------------------------------------------------------------------------------------------------


def nan_loss(loss: LossSum, _p: torch.Tensor) -> LossSum:
    return replace(loss, total=loss.total * float("nan"))


def infinite_gradient(loss: LossSum, p: torch.Tensor) -> LossSum:
    """The loss stays finite; the slope of a square root at 0 does not."""
    return replace(loss, total=loss.total + (p - p.detach()).sum().abs().sqrt())


@pytest.mark.parametrize("fault", [nan_loss, infinite_gradient])
@pytest.mark.parametrize("method", ["sft", "dpo", "dpo-aot", "kto", "simpo", "grpo"])
def test_a_step_that_is_not_finite_is_refused_and_its_batch_kept(
    method: str, fault: Callable[..., LossSum], tmp_path: Path
) -> None:
    policy, objective, s, place = build(method, tmp_path)
    loss = objective.loss
    before: dict[str, torch.Tensor] = {}

    def plant() -> None:
        before.update(toy.weights(policy))
        objective.loss = lambda items: fault(loss(items), next(iter(policy.trainable().values())))

    before_step(objective, 2, plant)
    with pytest.raises(TrainingStopped, match="at step 3 of 1-toy; the step was not taken") as stopped:
        train(policy, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), before)
    kept = tmp_path / "refused-step-3.jsonl"
    assert stopped.value.where == str(kept)
    batch = objective.batch(2).items
    trees = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [tree["id"] for tree in trees] == [item.tree.id for item in batch]
    assert tuple(trees[0]["branches"][0]) == batch[0].tree.branches[0].token_ids
    assert [p.name for p in place.checkpoints.iterdir()] == ["step-000002"]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_finishes_the_step_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    whole, _ = toy.run("sft", tmp_path / "whole")
    policy, objective, s, place = build("sft", tmp_path / "cut", save_steps=100)
    before_step(objective, 2, interrupt)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="1-toy is saved after step 3 of 6") as interrupted:
        train(policy, objective, s, place, toy.QUIET)
    assert interrupted.value.exit_code == EXIT_INTERRUPTED == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in place.checkpoints.iterdir()] == ["step-000003"]
    again, objective, s, place = build("sft", tmp_path / "cut", save_steps=100)
    train(again, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(again), toy.weights(whole))


def test_a_second_ctrl_c_stops_at_once_and_one_in_the_last_step_saves_and_stops(tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path / "twice")
    before_step(objective, 1, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        train(policy, objective, s, place, toy.QUIET)
    policy, objective, s, place = build("sft", tmp_path / "last")
    before_step(objective, N_STEPS - 1, interrupt)
    with pytest.raises(Interrupted, match=f"saved after step {N_STEPS} of {N_STEPS}"):
        train(policy, objective, s, place, toy.QUIET)
    policy, objective, s, place = build("sft", tmp_path / "last")
    assert train(policy, objective, s, place, toy.QUIET).steps == N_STEPS


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path)
    before_step(objective, 3, killed)
    with pytest.raises(Killed):
        train(policy, objective, s, place, toy.QUIET)
    path = place.checkpoints / "step-000003" / name
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(damaged)
    policy, objective, s, place = build("sft", tmp_path)
    before = toy.weights(policy)
    with pytest.raises(ArtefactError, match=f"step-000003: {name} is corrupt"):
        train(policy, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), before)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    toy.run("sft", tmp_path)
    with pytest.raises(ArtefactError, match=r"holds other weights than this stage trains, first lm_head.weight"):
        toy.run("sft", tmp_path, toy.policy_for("sft", lora=True))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    toy.run("sft", tmp_path)
    with pytest.raises(ArtefactError, match=r"first model\.layers\.0\.mlp\.down_proj\.weight \[32, 40\]"):
        toy.run("sft", tmp_path, toy.tiny_policy("llama", intermediate_size=40))


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("higher", "best_step"), [(False, 4), (True, 2)])
def test_the_best_evaluation_is_what_a_stage_ends_with(higher: bool, best_step: int, tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path, eval_steps=2, load_best_model_at_end=True)
    scores = iter([3.0, 1.0, 2.0])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate() -> Evaluation:
        seen.append(toy.weights(policy))
        score = next(scores)
        return Evaluation({"eval_made_up": score}, score, higher_is_better=higher)

    objective.evaluate = evaluate
    trained = train(policy, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), seen[best_step // 2 - 1])
    assert not toy.same_bits(seen[0], seen[1])
    assert [line.get("eval_made_up") for line in lines(place)] == [None, 3.0, None, 1.0, None, 2.0]
    assert (trained.metrics["best_eval_step"], trained.metrics["best_eval_value"]) == (best_step, 3.0 if higher else 1)


def test_without_asking_for_the_best_the_last_weights_stay(tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path, eval_steps=2)
    scores = iter([1.0, 2.0, 3.0])
    objective.evaluate = lambda: Evaluation({}, next(scores), higher_is_better=False)
    train(policy, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), toy.weights(toy.run("sft", tmp_path / "plain")[0]))
    assert not (tmp_path / "best").exists()


def test_the_best_so_far_survives_a_kill(tmp_path: Path) -> None:
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "save_steps": 2}
    for crash in (3, None):
        policy, objective, s, place = build("sft", tmp_path, **settings)
        # best at step 2; after the kill steps 3 to 6 are evaluated, none of them better
        values = iter([2.0, 1.0, 5.0] if crash else [5.0, 4.0, 3.0, 2.0])
        objective.evaluate = lambda values=values: Evaluation({}, next(values), higher_is_better=False)
        if crash:
            before_step(objective, crash, killed)
            with pytest.raises(Killed):
                train(policy, objective, s, place, toy.QUIET)
        else:
            assert train(policy, objective, s, place, toy.QUIET).metrics["best_eval_step"] == 2
    stopped, objective, s, place = build("sft", tmp_path / "two")
    before_step(objective, 2, killed)
    with pytest.raises(Killed):
        train(stopped, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), toy.weights(stopped))


def test_logging_steps_thin_the_lines_but_never_lose_the_last_or_an_evaluation(tmp_path: Path) -> None:
    policy, objective, s, place = build("sft", tmp_path, logging_steps=4, eval_steps=3)
    train(policy, objective, s, place, toy.QUIET)
    assert [line["step"] for line in lines(place)] == [3, 4, 6]
    assert {"loss", "grad_norm", "learning_rate", "nll", "entropy", "tokens"} <= lines(place)[1].keys()
    assert "eval_nll" in lines(place)[0]
