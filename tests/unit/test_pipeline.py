"""The walk over a recipe: what is trained again and what is not, where a failed gate leads, who becomes champion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import dpo, gate, go, grpo, linked, preference, recipe, rows, sft, small_data, tiny_base

from posttrain.errors import (
    EXIT_GATE,
    EXIT_USAGE,
    ArtefactError,
    GateRefused,
    PosttrainError,
    RecipeError,
    TrainingStopped,
)
from posttrain.gate import answer
from posttrain.methods.registry import METHODS
from posttrain.models.quantised import full_weight
from posttrain.pipeline import RunReport
from posttrain.pipeline import stage as pipeline_stage
from posttrain.registry.artefact import load_ref, save_artefact
from posttrain.registry.manifest import BaseRef, read_manifest
from posttrain.registry.store import ModelStore, lineage_of
from posttrain.train.metrics import read_metrics

REFUSED = gate("never", on_fail="keep_parent")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and data of all tests here, and a home whose registry is already set up."""
    folder = tmp_path_factory.mktemp("material")
    tiny_base(folder / "base")
    small_data(folder)
    return folder


@pytest.fixture
def place(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return linked(material, tmp_path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that were really trained, in order."""
    names: list[str] = []
    for method, real in METHODS.items():

        def spy(stage: Any, settings: Any, real: Any = real) -> Any:
            names.append(stage.name)
            return real(stage, settings)

        monkeypatch.setitem(METHODS, method, spy)
    return names


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the models that really answered a suite, in order."""
    names: list[str] = []
    real = answer.answer_suite

    def spy(policy: Any, renderer: Any, suite: Any, label: str, *rest: Any, **options: Any) -> Any:
        names.append(f"{label} on {suite.name}")
        return real(policy, renderer, suite, label, *rest, **options)

    monkeypatch.setattr("posttrain.pipeline.answers.answer_suite", spy)
    return names


def keys(report: RunReport) -> list[tuple[str, bool]]:
    return [(o.key, o.accepted) for o in report.outcomes]


def test_a_passed_gate_registers_and_a_second_run_trains_and_asks_nothing(
    place: Path, trained: list[str], asked: list[str]
) -> None:
    written = recipe(place, sft(gate=gate()), dpo(gate=gate("now")))
    first, said = go(written, place / "home")
    assert keys(first) == [("1-sft", True), ("2-dpo", True)]
    assert trained == ["1-sft", "2-dpo"]
    one, two = (o.artefact for o in first.outcomes)
    assert asked == ["./base on ok", f"{one.version} on ok", f"{one} on now", f"{two.version} on now"]
    store = ModelStore(place / "home")
    assert [(e.version, e.aliases) for e in store.entries()] == [(2, ("candidate", "champion")), (1, ())]
    assert first.champion == two
    assert first.champion_version == 2
    assert any("1-sft: ok: 0/24 (0.0 %" in line and "→ 24/24" in line and "passed" in line for line in said)

    again, said = go(written, place / "home")
    assert trained == ["1-sft", "2-dpo"], "nothing is trained again"
    assert len(asked) == 4, "nobody is asked again"
    assert [o.artefact for o in again.outcomes] == [one, two]
    assert [(e.version, e.aliases) for e in store.entries()] == [(2, ("candidate", "champion")), (1, ())]
    assert "1-sft: finished before, as " + one.version in said
    assert not any("changed since the last run" in line for line in said)


def test_a_changed_stage_is_named_and_redone_and_the_one_before_it_is_not(
    place: Path, trained: list[str], asked: list[str]
) -> None:
    first, _ = go(recipe(place, sft(gate=gate()), dpo(gate=gate("now"))), place / "home")
    second, said = go(recipe(place, sft(gate=gate()), dpo(gate=gate("now"), beta=0.2)), place / "home")
    assert "changed since the last run: 2-dpo.beta: 0.1 → 0.2" in said
    assert trained == ["1-sft", "2-dpo", "2-dpo"]
    assert asked[4:] == [f"{second.outcomes[1].artefact.version} on now"], "the parent's answers are remembered"
    assert first.outcomes[0].artefact == second.outcomes[0].artefact
    assert first.outcomes[1].artefact.version != second.outcomes[1].artefact.version
    assert second.champion_version == 3


def test_changed_data_under_the_same_name_is_other_data(place: Path, trained: list[str]) -> None:
    """A file's content counts, not what it is called."""
    written = recipe(place, sft())
    go(written, place / "home")
    (place / "sft.jsonl").unlink()
    rows(place / "sft.jsonl", [{"prompt": f"Is {n} fine?", "completion": "no"} for n in range(20)])
    go(written, place / "home")
    assert trained == ["1-sft", "1-sft"]


def test_a_changed_base_tokenizer_is_another_base(place: Path, trained: list[str]) -> None:
    (place / "base").unlink()
    tiny_base(place / "base")
    written = recipe(place, sft())
    go(written, place / "home")
    template = place / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("'assistant\\n'", "'assistant:\\n'"))
    template.write_text("{#- another -#}" + template.read_text())
    go(written, place / "home")
    assert trained == ["1-sft", "1-sft"]


def test_a_gate_that_asks_for_more_judges_again_without_training(place: Path, trained: list[str]) -> None:
    go(recipe(place, sft(gate=gate(min_gain=0.1))), place / "home")
    with pytest.raises(GateRefused, match=r"does not lie above the required 99\.0"):
        go(recipe(place, sft(gate=gate(min_gain=0.99))), place / "home")
    relaxed, _ = go(recipe(place, sft(gate=gate(min_gain=0.2, on_fail="keep_parent"))), place / "home")
    assert trained == ["1-sft"]
    assert relaxed.outcomes[0].report is not None
    assert relaxed.outcomes[0].report.min_gain == 0.2
    manifest = read_manifest(Path(relaxed.outcomes[0].artefact.path))
    assert manifest.gate == relaxed.outcomes[0].report


def test_stop_ends_the_run_with_the_reason_and_the_answers(place: Path, trained: list[str]) -> None:
    stages = sft(gate=gate("never")), dpo(gate=gate("now"))
    with pytest.raises(GateRefused) as caught:
        go(recipe(place, *stages), place / "home")
    assert caught.value.exit_code == EXIT_GATE
    assert "1-sft did not pass its gate: The lower bound of the gain of +0.0 points" in str(caught.value)
    assert Path(caught.value.where).read_text().count("\n") == 24, "`where` is the file with the judged answers"
    assert trained == ["1-sft"], "the next stage was not begun"
    assert ModelStore(place / "home").entries() == []


def test_keep_parent_goes_on_from_the_parent_and_promotes_what_passed(place: Path) -> None:
    report, said = go(recipe(place, sft(gate=gate()), dpo(gate=REFUSED), grpo(gate=REFUSED)), place / "home")
    assert keys(report) == [("1-sft", True), ("2-dpo", False), ("3-grpo", False)]
    assert report.champion == report.outcomes[0].artefact
    assert f"2-dpo: going on from its parent, {report.champion}" in said
    steps = lineage_of(Path(report.outcomes[2].artefact.path))
    assert [s.method for s in steps] == ["grpo", "sft", ""], (
        "GRPO starts from SFT's weights, not from the refused DPO's"
    )
    assert [e.version for e in ModelStore(place / "home").entries()] == [1]


def test_when_every_gate_says_no_nothing_is_promoted_and_every_reason_is_told(place: Path) -> None:
    stages = sft(gate=REFUSED), dpo(gate=REFUSED, allow_without_sft=True)
    with pytest.raises(GateRefused, match=r"nothing was promoted\. 1-sft: .*; 2-dpo: .* does not lie above"):
        go(recipe(place, *stages), place / "home")
    assert ModelStore(place / "home").entries() == []
    parents = [read_manifest(path).parent for path in (place / "home/artefacts/small").iterdir()]
    assert [str(parent) for parent in parents] == ["./base", "./base"], "DPO starts from the base model as well"
    assert all(isinstance(parent, BaseRef) for parent in parents)


def test_dpo_on_a_model_whose_sft_was_refused_is_refused(place: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        go(recipe(place, sft(gate=REFUSED), dpo(gate=gate("now"))), place / "home")
    assert caught.value.exit_code == EXIT_USAGE
    assert "2-dpo would start from ./base, a model that never had SFT" in str(caught.value)
    assert "dpo.allow_without_sft: true" in caught.value.remedy


def test_without_a_gate_nothing_is_registered(place: Path) -> None:
    report, said = go(recipe(place, sft()), place / "home")
    assert keys(report) == [("1-sft", True)]
    assert report.champion is None
    assert report.outcomes[0].version is None
    assert "nothing promoted: 1-sft has no gate" in said
    assert any("stage 1-sft has no gate: it will not be promoted" in line for line in said)
    assert ModelStore(place / "home").entries() == []


def test_an_ungated_last_stage_promotes_nothing_though_the_one_before_passed(place: Path) -> None:
    report, said = go(recipe(place, sft(gate=gate()), dpo()), place / "home")
    assert report.champion is None
    assert "nothing promoted: 2-dpo has no gate" in said
    assert [e.aliases for e in ModelStore(place / "home").entries()] == [("candidate",)]


def test_retry_goes_back_with_another_seed_and_gives_up_after_max(
    place: Path, trained: list[str], asked: list[str]
) -> None:
    retry = {"retry": {"stage": "sft", "max": 2}}
    written = recipe(place, sft(gate=gate()), dpo(gate=gate("never", on_fail=retry)))
    with pytest.raises(
        GateRefused, match="2-dpo did not pass its gate, also after going back 2 times: The lower bound"
    ):
        go(written, place / "home")
    assert trained == ["1-sft", "2-dpo"] * 3
    made = [read_manifest(path) for path in (place / "home/artefacts/small").iterdir()]
    for method in ("sft", "dpo"):
        ours = [m for m in made if m.method == method]
        assert len({m.seed for m in ours}) == len({m.weights_sha256 for m in ours}) == 3, "each attempt is a new one"
    assert sum(name.startswith("./base") for name in asked) == 1, "the base is asked once for all attempts"
    store = ModelStore(place / "home")
    assert [e.version for e in store.entries()] == [3, 2, 1], "three SFT models passed their gate"
    assert not any("champion" in e.aliases for e in store.entries())

    with pytest.raises(GateRefused, match="also after going back 2 times"):
        go(written, place / "home")
    assert len(trained) == 6, "a second run walks the same way and finds everything finished"


def test_two_gates_that_go_back_never_repeat_an_attempt(place: Path, trained: list[str]) -> None:
    """The second gate's retry must not find the attempt that the first gate's retry has already made."""
    first, second = ({"retry": {"stage": "sft", "max": 1}} for _ in range(2))
    stages = [
        sft(gate=gate()),
        dpo(gate=gate("now", on_fail=first)),
        grpo(gate=gate("never", on_fail=second)),
    ]
    verdicts = iter([False, True, True])  # of DPO: once refused, then passed
    real = pipeline_stage.judge

    def judge(suite: Any, *rest: Any) -> Any:
        from dataclasses import replace

        report = real(suite, *rest)
        return replace(report, passed=next(verdicts)) if suite.name == "now" else report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_stage, "judge", judge)
        with pytest.raises(GateRefused, match="3-grpo did not pass its gate, also after going back 1 times"):
            go(recipe(place, *stages), place / "home")
    assert trained == ["1-sft", "2-dpo", "1-sft", "2-dpo", "3-grpo", "1-sft", "2-dpo", "3-grpo"]
    assert len({read_manifest(p).seed for p in (place / "home/artefacts/small").iterdir()}) == 8


def test_a_retry_that_was_interrupted_goes_on_where_it_was(
    place: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = recipe(place, sft(), dpo(gate=gate("never", on_fail={"retry": {"stage": "sft", "max": 1}})))
    real = pipeline_stage.save_artefact

    def die_at_the_third(final: Path, *rest: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(final, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline_stage, "save_artefact", die_at_the_third)
        go(written, place / "home")
    with pytest.raises(GateRefused, match="also after going back 1 times"):
        go(written, place / "home")
    assert trained == ["1-sft", "2-dpo", "1-sft", "1-sft", "2-dpo"], "the third is taken up again from its checkpoint"
    assert len(list((place / "home/artefacts/small").iterdir())) == 4


def test_the_same_name_and_version_with_other_content_is_refused(place: Path) -> None:
    """Two recipes of one name share a registry; a directory that was replaced by another model is noticed."""
    report, _ = go(recipe(place, sft(gate=gate())), place / "home")
    ours = Path(report.outcomes[0].artefact.path)
    other, _ = go(recipe(place, sft(gate=gate()), seed=9), place / "home")
    theirs = Path(other.outcomes[0].artefact.path)
    assert ours != theirs
    with pytest.raises(ArtefactError, match=r"A name and version mean one model for ever"):
        save_artefact(ours, read_manifest(theirs), lambda d: _copy_model(theirs, d), theirs / "metrics.jsonl")
    load_ref(ours)


def _copy_model(source: Path, target: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())


def test_a_run_from_a_registered_model_keeps_its_history(place: Path) -> None:
    """had SFT, and the parent in the lineage: both come from the manifest, not from this recipe."""
    first, _ = go(recipe(place, sft(gate=gate())), place / "home")
    later = recipe(place, dpo(gate=gate("now"), allow_without_sft=True), model="small@champion", name="later")
    second, said = go(later, place / "home")
    assert f"1-dpo: starts from {first.champion}" in said
    steps = lineage_of(Path(second.outcomes[0].artefact.path))
    assert [s.method for s in steps] == ["dpo", "sft", ""]


def test_every_preference_round_is_measured_against_the_sft_model(place: Path) -> None:
    """Two rounds: the second starts from the first, whose own log-ratios stay in its reward."""
    written = recipe(place, sft(gate=gate()), dpo(), dpo())
    report, said = go(written, place / "home")
    names = [str(o.artefact) for o in report.outcomes]
    assert f"2-dpo: log-ratios are measured against {names[0]}" in said
    assert f"3-dpo: starts from {names[1]}" in said
    assert f"3-dpo: log-ratios are measured against {names[0]}" in said
    assert first_reward(place, report, 1) == pytest.approx(0.0, abs=1e-4)
    assert first_reward(place, report, 2) > 0.05, "the first round's gain is still there"

    last, said = go(recipe(place, sft(gate=gate()), dpo(), dpo(reference="parent")), place / "home")
    assert f"3-dpo: log-ratios are measured against {names[1]}" in said
    assert first_reward(place, last, 2) == pytest.approx(0.0, abs=1e-4)

    named = recipe(place, sft(gate=gate()), dpo(), dpo(reference="small@1"))
    again, said = go(named, place / "home")
    assert f"3-dpo: log-ratios are measured against {names[0]}" in said
    assert first_reward(place, again, 2) == first_reward(place, report, 2)

    second = f"./home/artefacts/small/{report.outcomes[1].artefact.version}"
    later = recipe(place, dpo(allow_without_sft=True), model=second, name="later")
    _, said = go(later, place / "home")
    assert f"1-dpo: log-ratios are measured against {names[0]}" in said, "the lineage knows"


def first_reward(place: Path, report: RunReport, stage: int) -> float:
    """The margin before the first step."""
    version = report.outcomes[stage].artefact.version
    lines = read_metrics(place / "home" / "runs" / report.recipe / version / "metrics.jsonl")
    return float(lines[0]["reward_margin"])


def test_a_reference_that_is_not_there_is_said_so(place: Path) -> None:
    with pytest.raises(PosttrainError) as caught:
        go(recipe(place, dpo(reference="small@7", allow_without_sft=True)), place / "home")
    assert "1-dpo.reference" in str(caught.value)


def test_dpo_may_follow_orpo_which_teaches_to_answer(place: Path) -> None:
    report, said = go(recipe(place, preference("orpo", learning_rate=2e-2), dpo()), place / "home")
    assert f"2-dpo: log-ratios are measured against {report.outcomes[0].artefact}" in said


def test_a_merge_that_loses_the_adapter_is_refused_and_never_gets_a_name(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = recipe(place, sft(adapter="lora", lora={"r": 4}, learning_rate=2e-2))
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.models.merge._merged_weight", lambda layer: full_weight(layer.get_base_layer()))
        with pytest.raises(ArtefactError, match=r"the saved model is not the trained one: its log-probs differ by"):
            go(written, place / "home")
        assert not list((place / "home/artefacts/small").iterdir())
        with pytest.raises(ArtefactError, match="the saved model is not the trained one"):
            go(written, place / "home")
    report, _ = go(written, place / "home")
    assert (Path(report.outcomes[0].artefact.path) / "adapter/adapter_model.safetensors").exists()


def test_training_that_changed_nothing_is_refused(place: Path) -> None:
    """No group had any spread, so every step was skipped: that is the parent under another name."""
    written = recipe(place, grpo(rewards=[{"format": {"pattern": "never"}}], allow_without_sft=True, max_steps=3))
    for _ in range(2):
        with pytest.raises(TrainingStopped, match=r"1-grpo ended with the very weights it started from"):
            go(written, place / "home")
    assert not list((place / "home/artefacts/small").iterdir())


def test_an_instruct_model_is_declared_once(place: Path, trained: list[str]) -> None:
    """allow_without_sft on the first stage speaks for the model, so the stages after it need not say it again."""
    go(recipe(place, dpo(allow_without_sft=True), dpo()), place / "home")
    assert trained == ["1-dpo", "2-dpo"]
    with pytest.raises(RecipeError, match=r"grpo\.allow_without_sft is set but never read: the first stage says it"):
        recipe(place, dpo(allow_without_sft=True), grpo(allow_without_sft=True))
