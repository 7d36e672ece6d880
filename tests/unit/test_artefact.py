"""An artefact opens with the stock loaders, proves itself, and means one model for ever."""

import hashlib
import json
from pathlib import Path

import pytest
from registry_samples import a_manifest, a_report, an_artefact, write_weights

from posttrain.errors import ArtefactError
from posttrain.registry.artefact import attach_gate, load_ref, save_artefact
from posttrain.registry.manifest import read_manifest


def test_saved_artefact_lists_everything_and_loads_back(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 0.5}\n')
    ref = save_artefact(tmp_path / "sft", a_manifest(), write_weights(), metrics)
    assert load_ref(tmp_path / "sft") == ref
    assert str(ref) == "helper-sft@1"
    manifest = read_manifest(tmp_path / "sft")
    assert sorted(manifest.files) == ["config.json", "metrics.jsonl", "model.safetensors"]
    assert manifest.weights_sha256 == hashlib.sha256(b"weights").hexdigest()
    card = (tmp_path / "sft" / "README.md").read_text()
    for fact in (
        "base_model: acme/tiny-base",
        "license: unknown",
        "da7a" * 16,
        "Not judged",
        "118 trained",
        "AutoModelFor",
    ):
        assert fact in card


def test_saving_the_same_again_is_fine_and_keeps_the_verdict(tmp_path: Path) -> None:
    first = an_artefact(tmp_path / "sft")
    attach_gate(tmp_path / "sft", a_report())
    again = an_artefact(tmp_path / "sft", created="2027-01-01T00:00:00+00:00")
    assert again == first
    assert read_manifest(tmp_path / "sft").gate == a_report()
    assert [p.name for p in tmp_path.iterdir()] == ["sft"]


def test_another_model_under_the_same_name_and_version_is_refused(tmp_path: Path) -> None:
    ref = an_artefact(tmp_path / "sft")
    with pytest.raises(ArtefactError, match="A name and version mean one model for ever"):
        an_artefact(tmp_path / "sft", content=b"other weights")
    with pytest.raises(ArtefactError, match="mean one model"):
        an_artefact(tmp_path / "sft", stage_fingerprint="0" * 64)
    assert load_ref(tmp_path / "sft") == ref


@pytest.mark.parametrize("written", [[], ["config.json"], ["model.safetensors"], ["config.json", "pytorch_model.bin"]])
def test_a_directory_no_loader_would_open_is_not_an_artefact(tmp_path: Path, written: list[str]) -> None:
    def save(directory: Path) -> None:
        for name in written:
            (directory / name).write_text("{}")

    with pytest.raises(ArtefactError, match="an artefact needs"):
        save_artefact(tmp_path / "sft", a_manifest(), save)
    assert list(tmp_path.iterdir()) == []


def test_sharded_weights_have_one_hash_that_sees_every_shard(tmp_path: Path) -> None:
    def save(last: bytes):
        def write(directory: Path) -> None:
            (directory / "config.json").write_text("{}")
            (directory / "model-1.safetensors").write_bytes(b"one")
            (directory / "model-2.safetensors").write_bytes(last)

        return write

    one = save_artefact(tmp_path / "one", a_manifest(), save(b"two"))
    other = save_artefact(tmp_path / "other", a_manifest(), save(b"2"))
    assert one.fingerprint != other.fingerprint


def test_verdict_is_added_to_manifest_and_card(tmp_path: Path) -> None:
    ref = an_artefact(tmp_path / "sft")
    attach_gate(tmp_path / "sft", a_report(passed=False, child=str(ref)))
    assert load_ref(tmp_path / "sft") == ref, "the verdict changes neither files nor meaning"
    assert read_manifest(tmp_path / "sft").gate == a_report(passed=False, child=str(ref))
    card = (tmp_path / "sft" / "README.md").read_text()
    assert "**refused**" in card
    assert "| this model helper-sft@1 | 45.0 % | 90 / 200 | [38.0, 52.0] % |" in card
    assert "- the lower bound -0.0100" in card


def test_a_verdict_about_another_model_is_refused(tmp_path: Path) -> None:
    an_artefact(tmp_path / "sft")
    with pytest.raises(ArtefactError, match="judged 'helper-sft@2'"):
        attach_gate(tmp_path / "sft", a_report(child="helper-sft@2"))


def test_corrupt_weights_are_refused_on_load(tmp_path: Path) -> None:
    an_artefact(tmp_path / "sft")
    (tmp_path / "sft" / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtefactError, match=r"model\.safetensors is corrupt"):
        load_ref(tmp_path / "sft")


def test_parent_path_is_relative_so_that_a_home_can_move(tmp_path: Path) -> None:
    sft = an_artefact(tmp_path / "runs" / "sft")
    an_artefact(tmp_path / "runs" / "dpo", parent=sft)
    raw = json.loads((tmp_path / "runs" / "dpo" / "manifest.json").read_text())
    assert raw["parent"]["path"] == "../sft"


def test_stock_loaders_open_a_model_and_an_adapter(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens).logits
    ref = save_artefact(tmp_path / "full", a_manifest(), model.save_pretrained)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(ref.path).eval()(tokens).logits, expected)

    base = AutoModelForCausalLM.from_pretrained(ref.path)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = adapted(tokens).logits
    adapter = save_artefact(tmp_path / "adapter", a_manifest(parent=ref), adapted.save_pretrained)
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter.path).eval()
    assert torch.equal(loaded(tokens).logits, expected)
    assert "AutoPeftModelForCausalLM" in (tmp_path / "adapter" / "README.md").read_text()
    assert load_ref(tmp_path / "adapter") == adapter
