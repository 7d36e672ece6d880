"""A model that has learned one template is trained, judged and asked with that one only. Planted: another one, whose
file fits its checksum, in the three places where a model meets a template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_run import Said, dpo, gate, go, recipe, refused, sft, small_data, tiny_base

from posttrain.cli import main
from posttrain.errors import ArtefactError
from posttrain.gate.suites import load_suite
from posttrain.models.load import LoadOptions
from posttrain.pipeline.answers import Answers
from posttrain.registry.files import MANIFEST, checksums

SAID = "was trained with another chat template"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after SFT in trained/, and the same with another template in swapped/."""
    folder = tmp_path_factory.mktemp("enforced")
    tiny_base(folder / "base")
    small_data(folder)
    report, _ = go(recipe(folder, sft(max_steps=1)), folder / "home")
    shutil.copytree(report.outcomes[0].artefact.path, folder / "trained")
    shutil.copytree(folder / "trained", folder / "swapped")
    template = folder / "swapped" / "chat_template.jinja"
    template.write_text("{{- ' ' -}}" + template.read_text())
    manifest = json.loads((folder / "swapped" / MANIFEST).read_text())
    manifest["files"] = {name: checksums(folder / "swapped")[name] for name in manifest["files"]}
    (folder / "swapped" / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_the_next_stage(place: Path) -> None:
    error = refused(place, dpo(allow_without_sft=True), model="./swapped", name="later")
    assert SAID in str(error)


def test_the_gate(place: Path) -> None:
    suite = load_suite(place / "ok.yaml", lambda name: place / name)
    answers = Answers(place / "home", suite, None, Said(), "auto")
    assert len(answers.of(str(place / "trained"), "trained", "trained", LoadOptions())) == 24
    with pytest.raises(ArtefactError, match=SAID):
        answers.of(str(place / "swapped"), "swapped", "swapped", LoadOptions())


@pytest.mark.parametrize(
    "command",
    [
        ["chat"],
        ["generate", "--prompt", "Is red with blue fine?"],
        ["eval", "--suite", "ok.yaml"],
        ["compare", "./trained", "--suite", "ok.yaml"],
    ],
)
def test_asking_it(
    place: Path, command: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert main([command[0], "./swapped", *command[1:]]) == 5
    assert SAID in capsys.readouterr().err
    if command[0] == "generate":
        assert main(["generate", "./trained", *command[1:]]) == 0


def test_a_gate_after_a_stage_still_judges(place: Path) -> None:
    """The comparison lets through what belongs together: an artefact and the recipe's own template."""
    report, _ = go(recipe(place, sft(max_steps=2, gate=gate(min_gain=-0.9)), name="judged"), place / "home")
    assert report.outcomes[0].report is not None
