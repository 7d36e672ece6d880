"""Adapters, the frozen reference, and what is saved. Planted: a reference that moves or is another model, targets that
match nothing, a saved model that equals its base or is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, mixed_trees, stock_logps, tiny_policy
from torch import Tensor

from posttrain.errors import ModelError, TrainingStopped
from posttrain.methods import against
from posttrain.models.adapters import add_lora, lora_targets
from posttrain.models.load import LoadOptions, load_policy, save_policy, saved_differs, weights_fingerprint
from posttrain.models.policy import Policy, disable_dropout
from posttrain.models.reference import Reference
from posttrain.records import Tree
from posttrain.settings import LoraSettings

TREES = mixed_trees(1)
LORA = LoraSettings(r=4, alpha=16, dropout=0.0)


def logps(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.score(TREES)[0].logp_N


def nudge(policy: Policy, size: float = 0.05) -> None:
    """What training does: every trainable weight moves."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=g))


def saved_parent(directory: Path, arch: str = "qwen3") -> Path:
    policy = tiny_policy(arch)
    policy.tokenizer = byte_tokenizer()
    directory.mkdir(parents=True)
    save_policy(policy, directory, stop_token_ids=(0, 2))
    return directory


# --- where adapters sit ------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    assert sorted({name.rsplit(".", 1)[-1] for name in lora_targets(tiny_policy("llama").model, "all-linear")}) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    assert len(lora_targets(tiny_policy("llama").model, "all-linear")) == 2 * 7
    gpt2 = lora_targets(tiny_policy("gpt2").model, "all-linear")
    assert {name.rsplit(".", 1)[-1] for name in gpt2} == {"c_attn", "c_proj", "c_fc"}
    policy = tiny_policy("qwen3")  # its head is the embedding
    add_lora(policy, LORA, seed=0)
    assert not [name for name in policy.trainable() if "lm_head" in name or "embed" in name]
    assert all(".lora_" in name for name in policy.trainable())


def test_a_target_that_matches_nothing_is_refused_and_the_layers_are_listed() -> None:
    with pytest.raises(ModelError, match="query, lm_head matches no linear layer") as refused:
        lora_targets(tiny_policy("llama").model, ["query", "v_proj", "lm_head"])
    assert refused.value.remedy == (
        "Layers that exist: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or use all-linear."
    )


def test_named_targets_match_the_end_of_a_path_and_nothing_less() -> None:
    model = tiny_policy("llama").model
    assert lora_targets(model, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert lora_targets(model, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ModelError, match="proj matches no"):
        lora_targets(model, ["proj"])


def test_a_new_adapter_changes_nothing_and_its_seed_fixes_it() -> None:
    plain = logps(tiny_policy("llama"))
    policies = [tiny_policy("llama") for _ in range(3)]
    for policy, seed in zip(policies, (1, 1, 2), strict=True):
        torch.manual_seed(seed * 100)  # the global generator must not matter
        add_lora(policy, LORA, seed=seed)
        assert torch.equal(logps(policy), plain)
    prints = [weights_fingerprint(policy) for policy in policies]
    assert prints[0] == prints[1] != prints[2]


# --- the reference -----------------------------------------------------------------------------------------------


def test_with_the_adapter_off_the_reference_is_the_base_exactly() -> None:
    policy = tiny_policy("gemma2")
    base = logps(policy)
    add_lora(policy, LORA, seed=0)
    reference = Reference(policy)
    nudge(policy)
    assert torch.equal(reference.logps(TREES)[0], base)
    assert float((logps(policy) - base).abs().max()) > 0.05, "and on again afterwards"
    reference.refuse_if_changed()


def test_a_frozen_copy_stays_where_it_is_while_the_policy_trains(tmp_path: Path) -> None:
    policy = toy.policy_for("sft")
    reference, before = Reference(policy), logps(policy)
    toy.run("sft", tmp_path, policy)
    assert torch.equal(reference.logps(TREES)[0], before)
    assert float((logps(policy) - before).abs().max()) > 0.05
    reference.refuse_if_changed()
    assert not reference._policy.trainable()


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_moved_is_noticed(lora: bool) -> None:
    policy = toy.policy_for("dpo", lora=lora)
    reference = Reference(policy)
    with torch.no_grad():
        reference._policy.model.model.norm.weight[3] += 1e-6
    with pytest.raises(AssertionError, match="the reference model's weights changed"):
        reference.refuse_if_changed()


@pytest.mark.parametrize("lora", [False, True])
def test_dpo_against_the_answers_of_another_model_is_refused_at_the_first_step(lora: bool, tmp_path: Path) -> None:
    s = toy.METHODS["dpo"].settings()
    place = toy.place_in(tmp_path)
    policy, other = toy.policy_for("dpo", lora=lora), tiny_policy("llama", seed=3)
    objective = toy.dpo_objective(policy, s, place)
    before = toy.weights(policy)
    other_place = toy.place_in(tmp_path / "other")
    objective.answers = toy.dpo_objective(other, s, other_place).answers
    with pytest.raises(TrainingStopped, match=r"differ by .* nats; the reference is not the model this stage started"):
        toy.train(policy, objective, s, place, toy.QUIET)
    assert toy.same_bits(toy.weights(policy), before)


def test_stored_reference_answers_belong_to_exact_weights_and_exact_rows() -> None:
    policy = tiny_policy("llama")
    tree = toy.random_tree(1, 3, 4, 5)
    reference = Reference(policy, still=True)
    key = against.question(reference, [tree])
    assert key == against.question(Reference(policy), [tree])
    unscored = Tree(tree.id, tree.trunk_ids, (first_unscored(tree.branches[0]), tree.branches[1]))
    assert key != against.question(reference, [unscored]), "the same tokens with other marks have other sums"
    assert key != against.question(reference, [tree, tree])
    assert key != against.question(reference, [tree], 0.5), "LD-DPO sums otherwise"
    nudge(policy, 1e-6)
    assert key != against.question(Reference(policy), [tree])


def first_unscored(branch: toy.Any) -> toy.Any:
    return type(branch)(branch.token_ids, (False, *branch.scored[1:]))


# --- dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "phi3", "llama", "opt"])
def test_without_dropout_training_mode_computes_what_evaluation_does(arch: str) -> None:
    rates = {"gpt2": {}, "phi3": {"resid_pdrop": 0.5}, "opt": {"dropout": 0.5}}.get(arch, {"attention_dropout": 0.5})
    policy = tiny_policy(arch, forest="off", **rates)
    add_lora(policy, LoraSettings(r=4, dropout=0.5), seed=0)
    nudge(policy)
    calm = logps(policy)
    policy.model.train()
    assert not torch.equal(logps(policy), calm)
    disable_dropout(policy.model)
    assert torch.equal(logps(policy), calm)


# --- what is saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "phi3"])
def test_saved_adapter_equals_merged_model_equals_trained_policy(arch: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    parent, child = saved_parent(tmp_path / "parent", arch), tmp_path / "child"
    base_logps = logps(load_policy(str(parent)))
    policy = load_policy(str(parent), LoadOptions(frozen_base=True))
    add_lora(policy, LORA, seed=0)
    nudge(policy, 0.1)
    trained, before = logps(policy), toy.weights(policy)
    save_policy(policy, child, stop_token_ids=(0, 2))

    assert toy.same_bits(toy.weights(policy), before), "never merged in place"
    merged = load_policy(str(child))
    torch.testing.assert_close(logps(merged), trained, atol=1e-5, rtol=0)
    assert float((logps(merged) - base_logps).abs().max()) > 0.05, "not the base again"
    assert sorted(merged.model.state_dict()) == sorted(load_policy(str(parent)).model.state_dict())
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parent), child / "adapter")
    with torch.no_grad():
        theirs = stock_logps(Policy(wrapped.get_base_model().eval(), None), TREES)
    torch.testing.assert_close(theirs, trained, atol=1e-5, rtol=0)
    assert saved_differs(policy, child) is None


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
def test_a_full_model_comes_back_bit_for_bit(arch: str, tmp_path: Path) -> None:
    parent = saved_parent(tmp_path / "parent", arch)
    policy = load_policy(str(parent))
    nudge(policy)
    save_policy(policy, tmp_path / "child", stop_token_ids=(2, 0))
    back = load_policy(str(tmp_path / "child"))
    assert toy.same_bits(toy.weights(back), toy.weights(policy))
    assert weights_fingerprint(back) == weights_fingerprint(policy)
    assert back.model.generation_config.eos_token_id == [2, 0]
    assert saved_differs(policy, tmp_path / "child") is None


def zero_a_layer(child: Path, _parent: Path) -> None:
    weights = load_file(child / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 0
    save_file(weights, child / "model.safetensors", metadata={"format": "pt"})


def forget_the_adapter(child: Path, parent: Path) -> None:
    shutil.copyfile(parent / "model.safetensors", child / "model.safetensors")


@pytest.mark.parametrize("damage", [zero_a_layer, forget_the_adapter])
def test_a_saved_model_that_is_not_the_trained_one_is_noticed(
    damage: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    parent, child = saved_parent(tmp_path / "parent"), tmp_path / "child"
    policy = load_policy(str(parent))
    add_lora(policy, LORA, seed=0)
    nudge(policy, 0.1)
    save_policy(policy, child, stop_token_ids=(0,))
    damage(child, parent)
    why = saved_differs(policy, child)
    assert why is not None
    assert "log-probs differ by" in why


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(str(tmp_path))


def test_a_fingerprint_reads_scalars_too() -> None:
    policy = tiny_policy("llama")
    before = weights_fingerprint(policy)
    policy.model.register_buffer("temperature", torch.tensor(1.0))
    assert weights_fingerprint(policy) != before
