"""Planted: allocators that refuse, in training, in the optimiser, in sampling and while loading. Exit code 5, with the
first setting to change; and an error of another kind stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from test_adapters import saved_parent
from test_sampler import requests, sample
from tiny import tiny_policy

from posttrain.errors import DoesNotFit
from posttrain.models.load import choose_layout, load_policy
from posttrain.models.policy import Policy
from posttrain.models.reference import Reference

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …")
FAULTS = [GPU, "cpu", MemoryError()]


def refuse(fault: Any) -> None:
    if fault == "cpu":
        torch.empty(1 << 50)  # torch's own words
    raise fault


@pytest.fixture(params=FAULTS, ids=["gpu", "cpu", "python"])
def fault(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "Lower micro_batch_tokens, now 8192: the gradient stays the same."),
        ({"micro_batch_tokens": 8}, "One row alone has 16 tokens. Set gradient_checkpointing: true."),
        (
            {"micro_batch_tokens": 8, "gradient_checkpointing": True},
            "One row alone has 16 tokens. Set adapter: lora, or lower max_length, now 2048.",
        ),
        (
            {"micro_batch_tokens": 8, "gradient_checkpointing": True, "adapter": "lora"},
            "One row alone has 16 tokens. Lower max_length, now 2048.",
        ),
    ],
)
def test_a_pass_that_does_not_fit_names_the_first_setting_to_change(
    settings: dict[str, Any], remedy: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = toy.policy_for("sft")
    monkeypatch.setattr(Policy, "score", lambda *_, **__: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"out of memory while training on .* tokens") as said:
        toy.run("sft", tmp_path, policy, **settings)
    assert said.value.exit_code == 5
    assert said.value.remedy.split(" tokens.")[-1] == remedy.split(" tokens.")[-1]
    assert (": 20.00 MiB more were asked for" in said.value.what) == (fault is GPU)
    assert (": 4503599627370496 bytes more were asked for" in said.value.what) == (fault == "cpu")


def test_an_optimiser_that_does_not_fit(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"while taking an optimiser step.*Set adapter: lora"):
        toy.run("sft", tmp_path / "full")
    with pytest.raises(DoesNotFit, match=r"Set optim: adamw_8bit, or lower lora\.r, now 8"):
        toy.run("sft", tmp_path / "lora", toy.policy_for("sft", lora=True), adapter="lora", lora={"r": 8})


def test_sampling_that_does_not_fit(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = tiny_policy("llama"), requests(2)
    monkeypatch.setattr(Policy, "hidden_forest", lambda *_: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"while sampling 3 answers.*max_completion_length.*now 12; then num_gener"):
        sample(policy, asked)


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_does_not_fit(lora: bool, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(toy.policy_for("dpo", lora=lora))
    monkeypatch.setattr(Policy, "logps", lambda *_, **__: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"while asking the reference.*Lower micro_batch_tokens"):
        reference.logps([])


def test_a_model_that_does_not_fit(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = saved_parent(tmp_path / "parent")
    monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **__: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"does not fit into this device's memory.*adapter: qlora"):
        load_policy(str(parent))


def test_another_error_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy.policy_for("sft")
    monkeypatch.setattr(Policy, "score", lambda *_, **__: refuse(RuntimeError("mat1 and mat2 cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        toy.run("sft", tmp_path, policy)


def test_a_probe_that_does_not_fit_is_no_reason_to_fall_back(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("llama")
    monkeypatch.setattr(Policy, "hidden_forest", lambda *_: refuse(fault))
    with pytest.raises(DoesNotFit, match=r"out of memory while comparing forest and padded rows"):
        choose_layout(policy, "auto")
