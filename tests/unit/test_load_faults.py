"""Model folders with something wrong: transformers warns or stays silent, posttrain refuses or says it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model

from posttrain.errors import ModelError
from posttrain.models.load import LoadOptions, load_policy

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_not_invented(folder: Path) -> None:
    edit(folder, lambda weights: weights.pop(NAME))
    with pytest.raises(ModelError, match=rf"lacks 1 of its weights, e\.g\. {NAME}"):
        load_policy(str(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({NAME: torch.zeros(5, 48)}))
    with pytest.raises(ModelError, match=rf"{NAME} has shape \(5, 48\), but config.json describes \(32, 48\)"):
        load_policy(str(folder))


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="cannot be loaded: Error while deserializing header"):
        load_policy(str(folder))


def test_weights_without_a_place_are_told(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({"tower.weight": torch.zeros(2)}))
    assert load_policy(str(folder)).notes == [
        f"{folder} holds weights without a place in this model: 1, e.g. tower.weight"
    ]


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_policy(str(folder))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_hub_name_without_a_network_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object) -> None:
        raise socket.gaierror("Name or service not known")

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    started = time.monotonic()
    with pytest.raises(ModelError, match="couldn't connect"):
        load_policy("acme/no-such-model")
    assert time.monotonic() - started < 5, "no retries"
    assert capfd.readouterr().err == ""


def test_checkpointing_a_model_that_cannot_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="gradient_checkpointing: true, but llama cannot") as refused:
        load_policy(str(folder), LoadOptions(gradient_checkpointing=True))
    assert "micro_batch_tokens" in refused.value.remedy
