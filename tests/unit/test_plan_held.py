"""What a stage holds, part by part: figures of public models worked out by hand, and the rules that add them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import ModelError, RecipeError
from posttrain.plan.beside import distribution_bytes
from posttrain.plan.gpus import GPUS, find
from posttrain.plan.held import Asking, Held, hold, sampling_parts, setup_of, weight_bytes
from posttrain.plan.rows import assumed_rows
from posttrain.plan.shape import Shape, read_shape
from posttrain.plan.target import Target, gpu_target, this_machine
from posttrain.plan.trace import count
from posttrain.settings import METHODS, StageSettings

CONFIGS = Path(__file__).parents[1] / "configs"
H100 = gpu_target("h100-80gb")
QWEN, LLAMA, MOE = (read_shape(str(CONFIGS / name)) for name in ("qwen3-8b", "llama-3-70b", "qwen3-30b-a3b"))
GIB = 1 << 30


def settings(method: str, **keys: Any) -> StageSettings:
    required: dict[str, Any] = {"datasets": [{"path": "rows.jsonl"}]}
    required |= {"rewards": ["exact"]} if "rewards" in METHODS[method].model_fields else {}
    required |= {"teacher": "./teacher"} if method == "distill" else {}
    return METHODS[method].model_validate(required | keys)


def held(method: str, shape: Shape = QWEN, target: Target = H100, **keys: Any) -> Held:
    s = settings(method, **({"gradient_checkpointing": True} | keys))
    return hold(shape, s, assumed_rows(s), target)


def parts(found: Held, phase: str) -> dict[str, int]:
    return dict(next(each for each in found.phases if each.name == phase).parts)


def by_hand(layers: int, width: int, inner: int, heads: int, kv: int, size: int, vocabulary: int, *, norms: int) -> int:
    """Attention, gated feed-forward, norms; embeddings and output layer apart."""
    attention = 2 * width * heads * size + 2 * width * kv * size
    return layers * (attention + 3 * width * inner + norms) + 2 * vocabulary * width + width


def test_parameters_of_public_models_are_counted_to_the_last() -> None:
    """Qwen3 has a norm over the head size on queries and keys; of a mixture every expert counts, and the router."""
    assert QWEN.n_params == by_hand(36, 4096, 12288, 32, 8, 128, 151936, norms=2 * 4096 + 2 * 128) == 8_190_735_360
    assert LLAMA.n_params == by_hand(80, 8192, 28672, 64, 8, 128, 128256, norms=2 * 8192) == 70_553_706_496
    norms = 2 * 2048 + 2 * 128 + 128 * 2048
    assert MOE.n_params == by_hand(48, 2048, 128 * 768, 32, 4, 128, 151936, norms=norms) == 30_532_122_624


def test_an_adapter_trains_r_numbers_per_input_and_output_of_every_linear_layer() -> None:
    setup = setup_of(settings("sft", adapter="lora", lora={"r": 16}), "cuda")
    around = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3
    counts = count(QWEN, setup)
    assert counts.n_trainable == 36 * 16 * around
    assert counts.weight_bytes == 2 * QWEN.n_params + 4 * counts.n_trainable, "frozen in bfloat16, adapters in float32"


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter_before_any_activation() -> None:
    """Weights, gradients and two moments, each in float32."""
    found = parts(held("sft"), "take a step")
    assert found.pop("process") == H100.overhead
    assert sum(found.values()) == 16 * QWEN.n_params
    assert found["optimiser"] == 2 * found["weights"] == 2 * found["gradients"]


def test_adapters_take_what_they_train_and_qlora_a_quarter_of_the_base() -> None:
    lora, qlora = held("sft", adapter="lora"), held("sft", adapter="qlora")
    assert parts(lora, "take a step")["optimiser"] == 8 * lora.counts.n_trainable
    base = parts(qlora, "take a step")["weights"] - 4 * qlora.counts.n_trainable
    outside = 2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096  # embeddings, head and norms stay in 16 bits
    packed = QWEN.n_params - outside
    assert base == int(packed * (0.5 + 1 / 64 + 4 / (64 * 256))) + 2 * outside
    assert 0.25 < packed * 0.516 / (2 * packed) < 0.26
    assert parts(qlora, "train")["a layer unpacked"] == 2 * 4096 * 12288
    eight = held("sft", adapter="lora", optim="adamw_8bit")
    assert parts(eight, "take a step")["optimiser"] == int(eight.counts.n_trainable * (2 + 8 / 256))


def test_a_mixture_in_four_bits_is_refused_as_loading_it_would_be() -> None:
    with pytest.raises(ModelError, match="experts are stacked"):
        held("sft", MOE, adapter="qlora")


@pytest.mark.parametrize(
    ("keys", "copies"),
    [
        ({}, 0),
        ({"precompute_ref_log_probs": False}, 1),
        ({"sync_ref_model": True}, 1),
        ({"precompute_ref_log_probs": False, "adapter": "lora"}, 0),
    ],
    ids=["asked before", "asked at every step", "moves", "the base under an adapter"],
)
def test_dpo_holds_a_copy_of_the_weights_only_where_the_reference_must_last(keys: dict[str, Any], copies: int) -> None:
    found = held("dpo", **keys)
    assert parts(found, "train").get("reference copy", 0) == copies * 4 * QWEN.n_params
    asked_first = any(phase.name == "ask the reference" for phase in found.phases)
    assert asked_first == ((not copies and "precompute_ref_log_probs" not in keys) or "adapter" in keys)


def test_another_reference_is_there_while_it_is_asked() -> None:
    s = settings("dpo", adapter="lora")
    found = hold(QWEN, s, assumed_rows(s), H100, other_reference=True)
    assert parts(found, "ask the reference")["reference"] == 2 * QWEN.n_params
    assert "reference" not in parts(found, "train")
    full = settings("dpo", gradient_checkpointing=True)
    found = hold(QWEN, full, assumed_rows(full), H100, other_reference=True)
    assert parts(found, "ask the reference")["reference"] == 2 * QWEN.n_params, "it is frozen, whatever trains"


def test_a_kl_term_keeps_a_copy_and_scores_between_forward_and_backward() -> None:
    plain, kl = held("grpo"), held("grpo", beta=0.04)
    assert parts(kl, "train")["reference copy"] == 4 * QWEN.n_params
    assert kl.training.flops > plain.training.flops
    assert kl.training.peak >= plain.training.peak


def test_a_kl_that_is_taken_off_the_reward_is_asked_with_the_rollouts() -> None:
    """Not between forward and backward pass: those are what they are without it."""
    plain, inside = held("grpo"), held("grpo", beta=0.04, kl_in="reward")
    assert parts(inside, "train")["reference copy"] == 4 * QWEN.n_params
    assert inside.training == plain.training


WITHOUT_HEAD = QWEN.n_params - 151936 * 4096 + 4096  # a score in place of the output layer


def test_reward_models_that_score_a_suite_lie_beside_the_saved_model_after_it_answered() -> None:
    s = settings("sft")
    asking = Asking(n_prompts=8, n_answers=1, prompt=100, answer=100)
    found = hold(QWEN, s, assumed_rows(s), H100, suite=asking, suite_judges=7)
    *_, gate, opinions = found.phases
    assert (gate.name, opinions.name) == ("gate", "gate: reward models")
    assert opinions.parts["reward models"] == 7
    assert opinions.parts["weights"] == gate.parts["weights"]
    assert hold(QWEN, s, assumed_rows(s), H100, suite=asking).phases[-1].name == "gate"


def test_ppo_has_four_models_of_which_two_learn() -> None:
    """Policy and critic: weights, gradients, two moments. The reference is a copy of what trains."""
    s = settings("ppo", gradient_checkpointing=True)
    found = hold(QWEN, s, assumed_rows(s), H100, judges=2 * QWEN.n_params)
    step = parts(found, "take a step")
    assert step["weights"] + step["gradients"] + step["optimiser"] == 16 * QWEN.n_params
    assert step["critic"] + step["critic's gradients"] + step["critic's optimiser"] == 16 * WITHOUT_HEAD
    assert step["reference copy"] == 4 * QWEN.n_params
    assert step["reward models"] == 2 * QWEN.n_params
    assert {"critic", "reward models", "reference copy"} <= parts(found, "sample").keys()


def test_a_critic_under_an_adapter_is_one_more_adapter_and_a_shared_one_a_head() -> None:
    lora = held("ppo", adapter="lora")
    step = parts(lora, "take a step")
    assert "reference copy" not in step, "the adapter switched off"
    own = lora.counts.n_trainable + 4096  # and a score
    assert (step["critic"], step["critic's gradients"], step["critic's optimiser"]) == (4 * own, 4 * own, 8 * own)
    shared = held("ppo", critic="shared")
    assert parts(shared, "take a step")["critic"] == 4 * (4096 + 1)
    assert shared.training.flops < 0.6 * held("ppo").training.flops


def test_a_critic_that_was_a_reward_model_trains_whole_whatever_the_policy_does() -> None:
    s = settings("ppo", adapter="lora", critic_init="reward_model", rewards=[{"reward_model": {"model": "judge"}}])
    found = hold(QWEN, s, assumed_rows(s), H100, scorer=QWEN)
    assert parts(found, "take a step")["critic"] == 4 * WITHOUT_HEAD
    assert parts(found, "take a step")["critic's optimiser"] == 8 * WITHOUT_HEAD


def test_policy_and_critic_keep_their_activations_together() -> None:
    policy, both = held("ppo", critic="shared").training, held("ppo").training
    assert both.kept > 1.5 * policy.kept
    assert both.peak > policy.peak


def test_a_teacher_is_frozen_beside_the_student_and_its_distributions_beside_the_students() -> None:
    s = settings("distill", gradient_checkpointing=True)
    rows = assumed_rows(s)
    found = hold(QWEN, s, rows, H100, teacher=LLAMA)
    assert parts(found, "train")["teacher"] == 2 * LLAMA.n_params
    assert parts(found, "sample")["teacher"] == 2 * LLAMA.n_params
    alone = hold(QWEN, settings("sft", gradient_checkpointing=True), rows, H100)
    n_tokens = sum(tree.n_tokens for tree in rows.worst)
    assert found.training.flops - alone.training.flops > 1.8 * LLAMA.n_params * n_tokens, "the teacher's forward pass"
    tile = 4 * (1 << 26)  # bytes of one model's logits at a time
    frozen = setup_of(settings("distill", adapter="lora"), "cuda")
    assert 6 * tile < distribution_bytes(QWEN, LLAMA, frozen, 1 << 20) < 14 * tile, "no gradient of an output layer"


def test_steps_per_generation_are_sampled_for_at_once() -> None:
    def keys_and_values(**keys: Any) -> str:
        return next(iter(name for name in parts(held("grpo", adapter="lora", **keys), "sample") if "keys" in name))

    common = {"per_device_train_batch_size": 4, "max_length": 512, "max_completion_length": 128}
    assert keys_and_values(**common) == "keys and values of 32 answers"
    assert keys_and_values(**common, steps_per_generation=3) == "keys and values of 96 answers"


def test_keys_and_values_of_rollouts_by_hand() -> None:
    """Two times 8 heads of 128 in 36 layers, in bfloat16; a prompt once, its 8 answers in steps of 32 tokens."""
    asking = Asking(n_prompts=16, n_answers=8, prompt=500, answer=100)
    cell = 2 * 8 * 128 * 36 * 2
    found = sampling_parts(QWEN, setup_of(settings("grpo", adapter="lora"), "cuda"), H100, asking)
    assert found["keys and values of 128 answers"] == cell * (16 * 500 + 128 * 128)


def test_no_more_answers_run_at_once_than_a_quarter_of_the_memory_holds() -> None:
    asking = Asking(n_prompts=1000, n_answers=8, prompt=2000, answer=2000)
    small = gpu_target("l4-24gb")
    found = sampling_parts(QWEN, setup_of(settings("grpo", adapter="lora"), "cuda"), small, asking)
    name, cache = next(iter(found.items()))
    assert name == "keys and values of 16 answers"
    assert cache < 0.26 * small.memory


def test_rows_longer_than_the_budget_go_alone_and_gradients_wait_for_them() -> None:
    s = settings("sft", max_length=8192, micro_batch_tokens=4096, per_device_train_batch_size=4)
    rows = assumed_rows(s)
    assert (len(rows.worst), rows.worst[0].n_tokens, rows.several) == (1, 8192, True)
    one = settings("sft", max_length=1024, micro_batch_tokens=4096, per_device_train_batch_size=4)
    rows = assumed_rows(one)
    assert (len(rows.worst), rows.several) == (4, False)
    assert "gradients" not in parts(hold(QWEN, one, rows, H100), "train"), "born during the only backward pass"


def test_reward_models_have_a_score_in_place_of_the_output_layer() -> None:
    counts = held("reward_model").counts
    assert counts.n_params == QWEN.n_params - 151936 * 4096 + 4096


def test_gpus_are_found_by_what_only_one_of_them_is_called() -> None:
    found = find("H100")
    assert found is not None
    assert found[0] == "h100-80gb"
    assert find("a100") is None, "there are two"
    assert find("rtx 4090") is not None
    with pytest.raises(RecipeError, match="not in the table"):
        gpu_target("h-1000")
    assert all(gpu.source and gpu.memory_gib > 10 for gpu in GPUS.values())


def test_this_machine_says_what_it_measured() -> None:
    here = this_machine()
    assert here.memory > here.overhead > 100 << 20
    assert here.flops > 1e9
    assert "measured just now" in here.said or "GPU" in here.name


def test_weights_of_a_frozen_base_are_kept_in_the_compute_type() -> None:
    setup = setup_of(settings("sft", adapter="lora", dtype="float32"), "cuda")
    assert setup.kept == torch.float32
    assert weight_bytes(setup, count(QWEN, setup)) > 4 * QWEN.n_params
    assert (
        setup_of(settings("sft", adapter="lora", lora={"modules_to_save": ["lm_head"]}), "cuda").kept == torch.float32
    )
