"""`posttrain merge`: what it writes, what it proves, and that it writes nothing where the proof fails.

Planted: a merge that forgets the adapter, or half of it; another base; another template; a folder in its place; and
adapters whose training a sum of two matrices does not hold. And a home that was moved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import go, recipe, sft, small_data, tiny_base
from test_adapters import logps, nudge
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.models import merge as merging
from posttrain.models.adapters import add_lora
from posttrain.models.load import load_policy, save_policy
from posttrain.models.merge import round_trip
from posttrain.models.quantised import full_weight
from posttrain.registry.artefact import load_ref
from posttrain.registry.manifest import read_manifest
from posttrain.settings import LoraSettings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A home with a full SFT stage and a DoRA stage on it, and the adapter's artefact."""
    folder = tmp_path_factory.mktemp("merge")
    tiny_base(folder / "base")
    small_data(folder)
    lora = {"r": 4, "loraplus": True, "modules_to_save": ["norm"]}
    written = recipe(folder, sft(max_steps=4), sft(adapter="dora", lora=lora, max_steps=4, learning_rate=5e-3))
    report, said = go(written, folder / "home")
    shapes = [(32, 32), (32, 32), (32, 16), (32, 16), (32, 48), (32, 48), (48, 32)] * 2
    trained = sum(4 * (i + o) + o for i, o in shapes) + 32
    assert any(f"2-sft: dora on 14 layers: {trained:,} parameters train" in line for line in said)
    return folder, Path(report.outcomes[-1].artefact.path)


@pytest.fixture
def place(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The home at another place: nothing in it may depend on where it lay."""
    folder, artefact = made
    shutil.copytree(folder / "home", tmp_path / "moved")
    return tmp_path, tmp_path / "moved" / artefact.relative_to(folder / "home")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["merge", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_an_artefact_names_no_place(made: tuple[Path, Path]) -> None:
    folder, artefact = made
    stored = json.loads((artefact / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(read_manifest(artefact).parent)
    assert stored["base_model_name_or_path"].startswith("small@1-sft-")
    for file in (p for p in artefact.rglob("*") if p.suffix in {".json", ".md", ".jinja"}):
        assert str(folder) not in file.read_text(encoding="utf-8"), file


def test_a_merged_model_is_proved_and_can_be_opened(
    place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, artefact = place
    before = {p: p.read_bytes() for p in (folder / "moved").rglob("*") if p.is_file()}
    code, out, err = run(capsys, str(artefact), "--out", str(folder / "whole"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"Next: posttrain chat {folder / 'whole'}"
    assert {p: p.read_bytes() for p in (folder / "moved").rglob("*") if p.is_file()} == before
    ref = load_ref(folder / "whole")
    assert (ref.name, ref.version) == ("small", f"{load_ref(artefact).version}-merged")
    report = json.loads((folder / "whole/merge.json").read_text())
    assert report["prompts"] == 32
    assert report["error_max"] < 1e-4 < report["moved_mean"]
    assert f"{report['n_tokens']} tokens of 32 held-out prompts" in out
    torch.testing.assert_close(*(logps(load_policy(str(f))) for f in (folder / "whole", artefact)), atol=1e-5, rtol=0)
    assert main(["generate", str(folder / "whole"), "--prompt", "Is red with blue fine?"]) == 0


def test_as_json_and_by_registered_folder(place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, artefact = place
    code, out, _ = run(capsys, str(artefact), "--out", str(folder / "whole"), "--json")
    told = json.loads(out)
    assert (code, told["model"], told["bound"]) == (0, str((folder / "whole").resolve()), 1e-3)
    again, _, err = run(capsys, str(artefact), "--out", str(folder / "whole"))
    assert (again, "exists already. Choose a new folder with --out" in err) == (5, True)
    inside, _, err = run(capsys, str(artefact), "--out", str(artefact))
    assert (inside, "nothing is merged in place" in err) == (5, True)


def forget(layer: Any) -> torch.Tensor:
    return full_weight(layer.get_base_layer())


def halve(layer: Any) -> torch.Tensor:
    return (MERGED(layer) + forget(layer)) / 2


MERGED = merging._merged_weight


@pytest.mark.parametrize("fault", [forget, halve])
def test_a_merge_that_loses_the_adapter_writes_nothing(
    fault: Callable[[Any], torch.Tensor],
    place: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, artefact = place
    monkeypatch.setattr(merging, "_merged_weight", fault)
    code, _, err = run(capsys, str(artefact), "--out", str(folder / "whole"))
    assert code == 5
    assert "the merged model is not the adapter on small@1-sft-" in err
    assert not (folder / "whole").exists()
    assert not list(folder.glob(".*whole*"))


def test_a_merge_under_another_template_writes_nothing(
    place: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.pipeline import merging as pipeline

    folder, artefact = place
    write = pipeline.save_merged

    def other_template(policy: Any, directory: Path, **more: Any) -> None:
        write(policy, directory, **more)
        file = directory / "chat_template.jinja"
        file.write_text("Hello. " + file.read_text())

    monkeypatch.setattr(pipeline, "save_merged", other_template)
    code, _, err = run(capsys, str(artefact), "--out", str(folder / "whole"))
    assert code == 5
    assert "tokenizer writes prompts otherwise than the adapter's" in err
    assert not (folder / "whole").exists()


def test_another_base_is_refused(place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, artefact = place
    other = tiny_base(folder / "other", seed=1)
    code, _, err = run(capsys, str(artefact), "--out", str(folder / "whole"), "--base", str(other))
    assert code == 2
    parent = Path(read_manifest(artefact).parent.path)  # type: ignore[union-attr]
    shutil.rmtree(artefact / parent)
    gone, _, missing = run(capsys, str(artefact), "--out", str(folder / "whole"))
    assert (gone, "is not there. Name that model with --base." in missing) == (2, True)
    assert "the adapter belongs to small@1-sft-" in err


# --- adapters that posttrain did not make ------------------------------------------------------------------------


def foreign(folder: Path, **config: Any) -> tuple[Path, Path]:
    """A base, and an adapter that plain peft wrote for it."""
    base = tiny_base(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **wanted))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=g)
    wrapped.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def test_an_adapter_of_plain_peft_is_merged_as_peft_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = foreign(tmp_path)
    code, _, err = run(capsys, str(adapter), "--out", str(tmp_path / "whole"))
    assert (code, err) == (0, "")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    ours = load_file(tmp_path / "whole/model.safetensors")
    assert all(torch.allclose(t, ours[n], atol=1e-6) for n, t in theirs.state_dict().items() if n in ours)
    manifest = read_manifest(tmp_path / "whole")
    assert str(manifest.parent) == str(base)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bias": "all", "use_dora": False}, "the adapter uses bias, which this version cannot merge"),
        ({"target_modules": ["embed_tokens"]}, "the adapter sits on a Embedding, which this version cannot merge"),
        ({"trainable_token_indices": [1, 2]}, "the adapter uses trainable_token_indices"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    config: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = foreign(tmp_path, **config)
    code, _, err = run(capsys, str(adapter), "--out", str(tmp_path / "whole"))
    assert (code, says in err) == (2, True), err


def test_an_untrained_adapter_cannot_be_told_from_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base(tmp_path / "base")
    policy = load_policy(str(base))
    add_lora(policy, LoraSettings(r=4), seed=0)
    save_policy(policy, tmp_path / "child", stop_token_ids=(0,), base=str(base))
    code, _, err = run(capsys, str(tmp_path / "child/adapter"), "--out", str(tmp_path / "whole"))
    assert (code, "it cannot be told from the base" in err) == (5, True), err
    nudge(policy)
    save_policy(policy, tmp_path / "trained", stop_token_ids=(0,), base=str(base))
    assert run(capsys, str(tmp_path / "trained/adapter"), "--out", str(tmp_path / "whole"))[0] == 0


def test_no_adapter_and_one_that_does_not_fit(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, artefact = made
    full = next(p for p in artefact.parent.iterdir() if p.name.startswith("1-sft"))
    assert "holds no adapter: all its weights were trained" in run(capsys, str(full))[2]
    assert "has no adapter_config.json, so it is no adapter" in run(capsys, str(folder / "base"))[2]
    base, adapter = foreign(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: torch.cat([t, t]) for n, t in weights.items()}, adapter / "adapter_model.safetensors")
    code, _, err = run(capsys, str(adapter), "--base", str(base), "--out", str(tmp_path / "whole"))
    assert (code, "the adapter does not fit this model" in err) == (2, True), err
    code, _, err = run(capsys, str(adapter), "--dtype", "int8")
    assert (code, "must be auto, float32 or bfloat16" in err) == (2, True)


def test_a_proof_by_hand() -> None:
    adapter, base = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -5.0])
    proof = round_trip(adapter, torch.tensor([-1.0, -2.25, -3.0]), base, bound=0.5)
    assert (proof.n_tokens, proof.error_max, proof.error_mean) == (3, 0.25, pytest.approx(0.25 / 3))
    assert (proof.moved_max, proof.moved_mean) == (2.0, pytest.approx((1 + 0.25 + 2) / 3))
    assert proof.fault() is None
    assert "differ from the adapter's on the base by up to 0.25, more than 0.2" in str(
        round_trip(adapter, torch.tensor([-1.0, -2.25, -3.0]), base, bound=0.2).fault()
    )
    assert "cannot be told from the base" in str(round_trip(base, base, base, bound=0.5).fault())
    nan = torch.tensor([float("nan"), 0.0, 0.0])
    assert "differ from the adapter's" in str(round_trip(adapter, nan, base, bound=0.5).fault())
    with pytest.raises(AssertionError, match="the same tokens"):
        round_trip(adapter, adapter[:1], base, bound=0.5)
