"""QLoRA and 8-bit optimisers: refused with exit code 5 where they cannot run, and right where they can.

Planted: a machine without bitsandbytes, with an old or a broken one, without a GPU; layers that a loader left as they
are; and what bitsandbytes does on some CPUs, weights that change when they are first asked without gradients.

The second half needs bitsandbytes (`pip install -e .[quant]`) and is left out where it is not installed.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from small_run import Said, dpo, go, recipe, sft, small_data, tiny_base
from test_adapter_kinds import dies_after
from test_adapters import TREES, logps, nudge, saved_parent
from test_sampler import requests, sample, trainer_logps
from tiny import byte_tokenizer, tiny_policy

from posttrain.cli import main
from posttrain.errors import DoesNotFit, ModelError
from posttrain.models import quantised
from posttrain.models.adapters import add_lora
from posttrain.models.load import LoadOptions, load_policy, save_policy, saved_differs, weights_fingerprint
from posttrain.models.policy import Policy
from posttrain.models.quantised import full_weight, is_quantised, n_weights, refuse_unquantised
from posttrain.models.reference import Reference
from posttrain.pipeline import run
from posttrain.settings import LoraSettings, SFTSettings
from posttrain.train.optim import optimizer_class

LORA = LoraSettings(r=4, dropout=0.0)
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip

# --- where it cannot run -----------------------------------------------------------------------------------------


def absent(_name: str) -> str:
    raise PackageNotFoundError


def broken(name: str, *rest: Any) -> Any:
    if name == "bitsandbytes":
        raise OSError("libbitsandbytes_cpu.so: cannot open shared object file")
    return IMPORT(name, *rest)


IMPORT = builtins.__import__


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (absent, "bitsandbytes, which is not installed"),
        (lambda _: "0.45.5", "bitsandbytes 0.50 or newer; 0.45.5 is installed"),
        (lambda _: "0.50.2", "bitsandbytes, which does not load here: libbitsandbytes_cpu.so"),
    ],
)
def test_without_bitsandbytes_it_is_refused_before_any_stage_trains(
    version: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "version", version)
    monkeypatch.setattr(builtins, "__import__", broken)
    tiny_base(tmp_path / "base")
    small_data(tmp_path)
    asked = [
        ({"adapter": "qlora"}, "adapter: qlora", "use adapter: lora, which keeps the base in 16 or 32 bits"),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit", "use optim: adamw"),
        ({"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit", "use optim: adamw"),
    ]
    for settings, words, instead in asked:
        said = Said()
        with pytest.raises(DoesNotFit) as refused:
            run(recipe(tmp_path, sft(), sft(**settings)), tmp_path / "home", said)
        assert refused.value.exit_code == 5
        assert str(refused.value).startswith(f"2-sft: {words} needs {why}")
        assert refused.value.remedy == f"Install it: pip install 'posttrain[quant]'. Or {instead}."
        assert not (tmp_path / "home/runs/small/1-sft").exists()
        assert not [line for line in said.lines if "starts from" in line]


def test_paged_states_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes would warn and go on unpaged."""
    monkeypatch.setattr("posttrain.train.optim.bitsandbytes", lambda *_: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DoesNotFit, match=r"there is no NVIDIA GPU\. Use optim: adamw_8bit, or adamw") as refused:
        optimizer_class(SFTSettings(datasets=[{"path": "x"}], optim="paged_adamw_8bit"))
    assert refused.value.exit_code == 5


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("llama", "14 of 14 linear layers of llama were not quantised"),
        ("gpt2", "cannot quantise the Conv1D layers of gpt2"),
    ],
)
def test_layers_that_stay_as_they_are_are_refused(arch: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        refuse_unquantised(tiny_policy(arch).model)
    assert refused.value.remedy == "Use adapter: lora."


def test_stacked_experts_that_stay_as_they_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "is_quantised", lambda _: True)
    with pytest.raises(ModelError, match=r"would leave 12,288 weights of qwen3_moe as they are and quantise 6,144"):
        refuse_unquantised(tiny_policy("qwen3_moe").model)


# --- where it can ------------------------------------------------------------------------------------------------

there = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quant)")
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # inputs divisible by NF4's blocks of 64


def parent_of(folder: Path, arch: str = "llama") -> Path:
    policy = tiny_policy(arch, **WIDE)
    policy.tokenizer = byte_tokenizer()
    folder.mkdir()
    save_policy(policy, folder, stop_token_ids=(0, 2))
    return folder


def in_4_bits(folder: Path, dtype: str = "float32", forest: str = "on", *, frozen: bool = True) -> Policy:
    return load_policy(str(folder), LoadOptions(dtype, forest, frozen_base=frozen, quantised=True))


def in_full(folder: Path, dtype: str = "float32") -> Policy:
    return load_policy(str(folder), LoadOptions(dtype, frozen_base=True))


@there
def test_weights_are_the_nearest_of_sixteen_levels(tmp_path: Path) -> None:
    """NF4 by hand: blocks of 64 numbers, each scaled by its largest; the scales are rounded to 8 bits themselves."""
    parent = parent_of(tmp_path / "parent")
    policy, plain = in_4_bits(parent), in_full(parent).model
    levels = torch.tensor(NF4)
    layers = [(name, module) for name, module in policy.model.named_modules() if is_quantised(module)]
    assert len(layers) == 14
    for name, module in layers:
        blocks = plain.get_submodule(name).weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = levels[(blocks[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
        torch.testing.assert_close(full_weight(module).detach().reshape(-1, 64), nearest, atol=0.02, rtol=0)
        assert n_weights(module.weight) == blocks.numel() == 2 * module.weight.numel()


@there
def test_shapes_that_a_kernel_misreads_are_refused(tmp_path: Path) -> None:
    """On a CPU bitsandbytes 0.50 takes wrong scales where a layer's input is divisible by 16 and not by 64."""
    with pytest.raises(ModelError, match=r"misreads 4-bit weights of shape \(\d+, \d+\) on this device") as refused:
        in_4_bits(saved_parent(tmp_path / "parent"))  # of width 32
    assert "Use adapter: lora" in refused.value.remedy


@there
@dtypes
@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "gemma2"])
def test_it_starts_as_a_no_op_and_what_is_saved_is_what_trained(arch: str, dtype: str, tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent", arch)
    policy = in_4_bits(parent, dtype)
    before = logps(policy)
    counted = add_lora(policy, LORA, seed=0, kind="qlora")
    assert torch.equal(logps(policy), before)
    plain = add_lora(tiny_policy(arch, **WIDE), LORA, seed=0)
    assert (counted.kind, counted.n_trained, counted.n_frozen) == ("qlora", plain.n_trained, plain.n_frozen)
    nudge(policy)
    trained = logps(policy)
    assert float((trained - before).abs().max()) > 0.1
    assert torch.equal(Reference(policy).logps(TREES)[0], before)
    save_policy(policy, tmp_path / "child", stop_token_ids=(0,), base="parent")
    assert "quantization_config" not in json.loads((tmp_path / "child/config.json").read_text())
    merged = in_full(tmp_path / "child", dtype)
    torch.testing.assert_close(logps(merged), trained, atol=1e-5 if dtype == "float32" else 0.05, rtol=0)
    assert saved_differs(policy, tmp_path / "child", dtype) is None


@there
@dtypes
def test_weights_hold_still_whatever_is_asked(dtype: str, tmp_path: Path) -> None:
    """Sampling and scoring without gradients leave every byte, and every answer, as it was. On a CPU with AVX512-BF16
    bitsandbytes by itself would not."""
    policy = in_4_bits(parent_of(tmp_path / "parent"), dtype)
    add_lora(policy, LORA, seed=0, kind="qlora")
    nudge(policy)
    bytes_before = weights_fingerprint(policy)
    with_gradients = policy.score(TREES)[0].logp_N.detach()
    groups = sample(policy, requests(3))
    assert torch.equal(logps(policy), with_gradients)
    assert weights_fingerprint(policy) == bytes_before
    engine = torch.tensor([x for group in groups for c in group for x in c.logps])
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(engine, trainer_logps(policy, requests(3), groups, 1.0), atol=tolerance, rtol=0)


@there
def test_forest_and_padded_rows_agree(tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent")
    forest, padded = (in_4_bits(parent, forest=layout) for layout in ("on", "off"))
    for policy in (forest, padded):
        add_lora(policy, LORA, seed=0, kind="qlora")
        nudge(policy)
    torch.testing.assert_close(logps(forest), logps(padded), atol=1e-5, rtol=0)


@there
def test_eight_bit_states_learn_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """Weights of 4,096 numbers or more have their states in 8 bits: here the 160 × 32 ones."""
    changes: dict[str, Any] = {"optim": "adamw_8bit", "num_train_epochs": 2.0}

    def fresh() -> Policy:
        return tiny_policy("llama", seed=2, intermediate_size=160)

    whole, _ = toy.run("sft", tmp_path / "whole", fresh(), **changes)
    full, _ = toy.run("sft", tmp_path / "adamw", fresh(), num_train_epochs=2.0)
    eight, plain = (toy.weights(p)["model.layers.0.mlp.up_proj.weight"] for p in (whole, full))
    assert 0 < float((eight - plain).abs().max()) < 0.1, "8 bits are coarse, and not another optimiser"
    policy, s = fresh(), toy.METHODS["sft"].settings(**changes)
    objective = toy.METHODS["sft"].objective(policy, s, toy.place_in(tmp_path / "cut"))
    dies_after(objective, 3)
    with pytest.raises(KeyboardInterrupt):
        toy.train(policy, objective, s, toy.place_in(tmp_path / "cut"), toy.QUIET)
    assert torch.uint8 in set(types_in(torch.load(tmp_path / "cut/checkpoints/step-000003/state.pt")["optimizer"]))
    resumed, _ = toy.run("sft", tmp_path / "cut", fresh(), **changes)
    assert toy.same_bits(toy.weights(resumed), toy.weights(whole))


@there
def test_an_adapter_on_four_bits_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The base is quantised anew from its file, and the reference is that base."""
    parent = parent_of(tmp_path / "parent")
    changes: dict[str, Any] = {"adapter": "qlora", "lora": {"r": 4, "loraplus": True}}

    def fresh() -> Policy:
        policy = in_4_bits(parent)
        add_lora(policy, LORA, seed=0, kind="qlora")
        return policy

    whole, _ = toy.run("dpo", tmp_path / "whole", fresh(), **changes)
    policy, s = fresh(), toy.METHODS["dpo"].settings(**changes)
    objective = toy.METHODS["dpo"].objective(policy, s, toy.place_in(tmp_path / "cut"))
    dies_after(objective, 3)
    with pytest.raises(KeyboardInterrupt):
        toy.train(policy, objective, s, toy.place_in(tmp_path / "cut"), toy.QUIET)
    resumed, _ = toy.run("dpo", tmp_path / "cut", fresh(), **changes)
    assert toy.same_bits(toy.weights(resumed), toy.weights(whole))
    assert weights_fingerprint(resumed, frozen_only=True) == weights_fingerprint(whole, frozen_only=True)


def types_in(value: Any) -> Iterator[torch.dtype]:
    if torch.is_tensor(value):
        yield value.dtype
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from types_in(inner)


@there
def test_a_whole_recipe_and_its_merge(tmp_path: Path) -> None:
    """SFT and DPO in 4 bits; what is judged and stored is the model in full; the adapter merges on its 4-bit base."""
    tiny_base(tmp_path / "base", **WIDE)
    small_data(tmp_path)
    lora = {"r": 4, "loraplus": True}
    written = recipe(
        tmp_path,
        sft(adapter="qlora", lora=lora, optim="adamw_8bit", learning_rate=5e-3),
        dpo(adapter="qlora", lora=lora),
    )
    report, said = go(written, tmp_path / "home")
    assert any("qlora on 14 layers" in line for line in said)
    artefact = Path(report.outcomes[-1].artefact.path)
    assert "quantization_config" not in json.loads((artefact / "config.json").read_text())
    assert main(["merge", str(artefact), "--out", str(tmp_path / "whole")]) == 0
    torch.testing.assert_close(*(logps(in_full(f)) for f in (tmp_path / "whole", artefact)), atol=1e-5, rtol=0)


@there
def test_a_head_in_full_beside_four_bits(tmp_path: Path) -> None:
    policy = in_4_bits(parent_of(tmp_path / "parent"), "bfloat16", frozen=False)
    assert policy.autocast == torch.bfloat16
    add_lora(policy, LoraSettings(r=4, dropout=0.0, modules_to_save=["lm_head"]), seed=0, kind="qlora")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    nudge(policy)
    save_policy(policy, tmp_path / "child", stop_token_ids=(0,))
    assert saved_differs(policy, tmp_path / "child", "bfloat16") is None
