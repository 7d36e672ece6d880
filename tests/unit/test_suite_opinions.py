"""A reward model as the judge of a suite: what it must show first, what is said of it, and what it may not be.

Planted: a judge that says the same of everything, one that prefers disorder, one that does not look at the question,
one that failed its gate, one that was trained from the model it judges or pays it, another model's tokenizer, answers
that cannot be read, a suite that calls its opinion accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from small_run import COMMON, WORDS, dpo, gate, go, grpo, linked, recipe, refused, rows, sft, small_data, tiny_base
from test_cli_models import call
from test_cli_models import refused as refused_call

from posttrain.cli import main
from posttrain.errors import DataError, ModelError
from posttrain.gate import report as reports
from posttrain.gate.ahead import prove_scores
from posttrain.gate.decide import judge
from posttrain.gate.opinions import ANOTHER, DISORDER, EMPTY, hold_against, in_disorder, prove_opinion, wrong_answers
from posttrain.gate.suites import Suite, grade, judged_by, load_suite
from posttrain.pipeline import opinions as pipeline_opinions
from posttrain.pipeline.identity import Parent
from posttrain.pipeline.scoring import RewardModel
from posttrain.records import Completion, GateReport, Message, Opinion, Outcome, Sampling, Status, Task
from posttrain.registry.card import verdict
from posttrain.registry.manifest import from_json, read_manifest
from posttrain.registry.store import ModelStore
from posttrain.reporting import Reporter
from posttrain.rollout.judges import Judges, ModelPart
from posttrain.rollout.scorer import Answer, Scorer, Verdict, open_scorer
from posttrain.settings import GateSettings

ASKED = [f"Is {a} with {b} fine?" for a in WORDS for b in WORDS if a != b]
OPINION = Opinion("judge@1", "a" * 64, "gold answers score higher than the empty answer in 9 of 9 items", ("Young.",))


class ByHand:
    """Gives an answer the value of a function of prompt and text; None: it cannot be read."""

    label = "by-hand"

    def __init__(self, value: Callable[[str, str], float | None]) -> None:
        self.value = value

    def answers(self, asked: Sequence[Answer]) -> list[Verdict]:
        values = [self.value(a.prompt[0].content, a.text) for a in asked]
        return [Verdict(v, detail="" if v is not None else "unreadable") for v in values]


def suite(gold: Sequence[str | None], kind: str = "mean_score") -> Suite:
    items = tuple(Task(f"i:{n}", (Message("user", f"q{n}"),), answer) for n, answer in enumerate(gold))
    score = ({"reward_model": {"model": "judge@1"}},)
    return Suite("liked", kind, items, score, True, Sampling(), "f" * 64)  # type: ignore[arg-type]


# --- the suite file ----------------------------------------------------------------------------------------------

FILE = "name: liked\nkind: win_rate\nitems: rows.jsonl\nscore: [{reward_model: {model: judge@1}}]\n"


def load(folder: Path, text: str) -> Suite:
    (folder / "s.yaml").write_text(text)
    rows(folder / "rows.jsonl", [{"prompt": "q", "answer": "1"}])
    return load_suite(folder / "s.yaml", Path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("kind: win_rate\n", ""), r"s\.yaml:3: score names a reward model, and kind: accuracy would call"),
        (FILE + "must_finish: false\n", r"s\.yaml:5: must_finish = false would have a reward model read answers that"),
        (FILE.replace("judge@1}", "judge@1, weight: 0.0}"), r"s\.yaml:4: score: reward_model\.weight = 0 must be"),
        (FILE.replace("{model: judge@1}", "judge"), r"s\.yaml:4: score holds reward_model without a model"),
        (FILE.replace("{model: judge@1}", "{model: j}, math: {}"), r"math stands beside reward_model"),
        (FILE.replace("[{reward_model: {model: judge@1}}]", "[math]").replace("win_rate", "mean_score"),
         r"s\.yaml:2: kind = mean_score is for suites that a reward model scores"),
        (FILE.replace("judge@1", "./nowhere"), r"nowhere does not exist"),
        (FILE.replace("judge@1", "."), r"s\.yaml: score: the reward model \. is no model folder"),
        (FILE.replace("{reward_model", "{length: {target: 3}}, {reward_model"), r"s\.yaml: "),
    ],
)  # fmt: skip
def test_a_suite_that_would_say_something_false_of_an_opinion_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text)


def test_the_name_of_a_judge_means_nothing_and_its_content_does(tmp_path: Path) -> None:
    one = load(tmp_path, FILE)
    other = load(tmp_path, FILE.replace("judge@1", "jury@7"))
    assert one.fingerprint == other.fingerprint, "which one it is comes by its content"
    assert judged_by(one, {"judge@1": "x"}).fingerprint == judged_by(other, {"jury@7": "x"}).fingerprint
    assert judged_by(one, {"judge@1": "y"}).fingerprint != judged_by(one, {"judge@1": "x"}).fingerprint
    heavier = load(tmp_path, FILE.replace("[", "[math, ").replace("judge@1", "judge@1, weight: 2.0"))
    assert heavier.fingerprint != load(tmp_path, FILE.replace("[", "[math, ")).fingerprint
    assert prove_scores({"a": one}) == [], "no checker, nothing to prove without a model"
    assert heavier.checkers == ["math"]


# --- its proof on gold answers -----------------------------------------------------------------------------------


def test_wrong_answers_by_hand() -> None:
    found = wrong_answers(suite(["one two three four", "now", None, "  "]).items)
    assert [(w.item.id, w.case, w.text) for w in found] == [
        ("i:0", EMPTY, ""),
        ("i:0", DISORDER, "four three two one"),
        ("i:0", ANOTHER, "now"),
        ("i:1", EMPTY, ""),
        ("i:1", DISORDER, "won"),
        ("i:1", ANOTHER, "one two three four"),
    ]
    assert in_disorder("noon") == "noon"
    same = [w.case for w in wrong_answers(suite(["11", "11"]).items)]
    assert same == [EMPTY, EMPTY], "11 backwards is 11, and nobody else has another answer"
    assert len({w.item.id for w in wrong_answers(suite([f"a{n}" for n in range(200)]).items)}) == 50, "spread evenly"


GOLD = [f"gold {n}" for n in range(12)]


def knows(asked: str, text: str) -> float:
    """The gold answer of this very item."""
    return 1.0 if text == f"gold {asked[1:]}" else 0.0


def test_a_judge_that_knows_the_gold_answers_passes_with_its_figures() -> None:
    shown, doubts = prove_opinion(suite(GOLD), ByHand(knows), passed_elsewhere=False)  # type: ignore[arg-type]
    assert shown == (
        "gold answers score higher than the empty answer in 12 of 12, its own text in disorder in 12 of 12, "
        "another item's gold answer in 12 of 12 items"
    )
    assert doubts == ()
    few = prove_opinion(suite(GOLD[:5]), ByHand(knows), passed_elsewhere=False)  # type: ignore[arg-type]
    assert few[1] == ("It was shown 5 different gold answers only.",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda _q, _t: 0.5,
            "scores the gold answer higher than the empty answer in 0 of 12 items, which is not",
        ),
        (lambda _q, t: 1.0 / (1 + len(t)), "higher than the empty answer in 0 of 12"),
        (lambda _q, t: float(bool(t)), "higher than its own text in disorder in 0 of 12"),
        (lambda q, t: 0.5 + 0.5 * (t[:4] == "gold") - 0.4 * knows(q, t), "prefers another item's gold answer"),
        (
            lambda _q, t: None if t[:4] == "gold" else 0.1,
            r"12 gold answers could not be read, the first of i:0: unread",
        ),
        (lambda _q, _t: None, "could read no wrong answer, so nothing shows that it tells gold"),
        (lambda q, t: knows(q, t) if t[:4] == "gold" else None, "could read no wrong answer"),
    ],
)
def test_a_judge_that_cannot_tell_gold_from_wrong_is_refused(
    value: Callable[[str, str], float | None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prove_opinion(suite(GOLD), ByHand(value), passed_elsewhere=True)  # type: ignore[arg-type]


def test_a_judge_that_does_not_look_at_the_question_is_told() -> None:
    """Any gold answer is as good to it as the item's own: ties, of which none is higher."""
    blind = ByHand(lambda _q, t: 0.9 - 0.01 * (int(t[5:]) % 3) if t[:4] == "gold" else 0.1)
    shown, doubts = prove_opinion(suite(GOLD), blind, passed_elsewhere=False)  # type: ignore[arg-type]
    assert "another item's gold answer in 8 of 12 items" in shown, "2 of 3 neighbours are worse by a hundredth"
    assert doubts == (
        "It hardly looks at the question: of 12 items, another item's gold answer scores lower in 8 only.",
    )


def test_chance_is_not_enough_and_what_is_little_is_told() -> None:
    """Of 50 gold answers, 31 (Wilson's interval from 0.48) or 33 (from 0.52) score higher than their disorder."""
    gold = [f"w{n} x y z" for n in range(50)]

    def right_in(most: int) -> ByHand:
        value = {text: 0.9 if n < most else 0.4 for n, text in enumerate(gold)}
        own = {f"q{n}": text for n, text in enumerate(gold)}
        return ByHand(lambda q, t: value.get(t, 0.5 if t else 0.1) - 0.39 * (t in value and own[q] != t))

    with pytest.raises(DataError, match="own text in disorder in 31 of 50 items, which is not more than half beyond"):
        prove_opinion(suite(gold), right_in(31), passed_elsewhere=True)  # type: ignore[arg-type]
    _, doubts = prove_opinion(suite(gold), right_in(33), passed_elsewhere=True)  # type: ignore[arg-type]
    hardly = "It hardly tells good answers from bad: of 50 items, its own text in disorder scores lower in 33 only."
    assert doubts[0] == hardly


def test_some_gold_answers_that_cannot_be_read_are_told_and_never_count_as_higher() -> None:
    found = hold_against(wrong_answers(suite(GOLD).items), ByHand(lambda q, t: None if t == "gold 0" else knows(q, t)))  # type: ignore[arg-type]
    assert found.higher == {EMPTY: (11, 12), DISORDER: (11, 12), ANOTHER: (10, 11)}, "as a wrong answer it is left out"
    assert found.unread == "1 gold answers could not be read, the first of i:0: unreadable."


def test_without_gold_answers_only_a_gate_that_was_passed_speaks_for_it() -> None:
    with pytest.raises(DataError, match="no item has a gold answer, and by-hand has passed no gate here"):
        prove_opinion(suite([None] * 9), ByHand(knows), passed_elsewhere=False)  # type: ignore[arg-type]
    shown, (doubt,) = prove_opinion(suite([None] * 9), ByHand(knows), passed_elsewhere=True)  # type: ignore[arg-type]
    assert shown == ""
    assert "nothing shows that it tells good answers to these items from bad ones" in doubt


def test_a_proof_is_not_kept_for_a_judge_whose_gate_says_no_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content is the same, so are suite and answers: only the verdict on itself is another."""
    found = suite([None] * 9)
    models = {"judge@1": RewardModel("judge", "judge@1", "a" * 64)}
    panel = pipeline_opinions.with_models(found, models, "float32")
    monkeypatch.setattr(pipeline_opinions, "opener", lambda *_: lambda _: ByHand(knows))
    monkeypatch.setattr(pipeline_opinions, "passed_gate", lambda _: True)
    reporter = Reporter(quiet=True)
    assert len(panel.opinions(tmp_path, reporter, {})) == 1
    monkeypatch.setattr(pipeline_opinions, "passed_gate", lambda _: False)
    with pytest.raises(DataError, match="has passed no gate here"):
        panel.opinions(tmp_path, reporter, {})


# --- the verdict and what is said of it --------------------------------------------------------------------------


def graded(found: Suite, texts: Sequence[str], status: Status = Status.FINISHED) -> list[Any]:
    part = ModelPart("reward_model", ByHand(lambda _q, t: None if t == "?" else len(t) / 10), 1.0)  # type: ignore[arg-type]
    said = [Completion(f"i:{n}", 0, (1,), (0.0,), status, 1, text) for n, text in enumerate(texts)]
    return grade(found, said, Judges(None, (part,)))


def test_means_and_wins_by_hand() -> None:
    """Scores 0.2 before and 0.5 after on 20 items, but for one that stays: means 0.2 and 0.485, 19½ wins of 20."""
    before, after = ["xx"] * 20, ["xxxxx"] * 19 + ["xx"]
    for kind, figures in (("mean_score", (4.0, 9.7, 0.285)), ("win_rate", (0.5, 19.5, 0.475))):
        found = suite(["x"] * 20, kind)
        asked = GateSettings(suite="s")
        report = judge(found, graded(found, before), graded(found, after), asked, 1.0, "a", "b")
        assert (report.before.numerator, report.after.numerator, report.gain) == pytest.approx(figures)
        assert report.passed
        assert report.kind == kind


@pytest.mark.parametrize("scores", [(float("nan"),), (0.5, float("-inf"))])
def test_a_score_that_is_no_number_is_no_verdict(scores: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "_tree", lambda *_: SimpleNamespace(n_tokens=1))
    monkeypatch.setattr(Scorer, "room", 9)
    monkeypatch.setattr(Scorer, "trees", lambda *_: [(scores,), ((0.0,),)])
    asked = [Answer((Message("user", "q"),), text) for text in ("a", "b")]
    broken, sound = Scorer(None, None, "judge@1").answers(asked)  # type: ignore[arg-type]
    assert (broken.value, sound.value) == (None, 0.5)
    assert broken.detail.startswith("judge@1 scores it ")


def test_answers_that_cannot_be_read_have_no_score_and_are_counted() -> None:
    found = suite(["x"] * 20)
    results = graded(found, ["?", "?", *["xxxxx"] * 18])
    assert [r.value for r in results[:3]] == [None, None, 0.5]
    assert results[0].outcome is Outcome.CHECKER_FAILED
    report = judge(found, graded(found, ["xx"] * 20), results, GateSettings(suite="s"), 1.0, "a", "b")
    assert not report.passed
    assert report.counts["child_checker_failed"] == 2
    assert report.reasons[0].startswith("Of the child's 20 checks 2 failed or ran out of time, more than the 5%")
    cut = graded(found, ["xxxxx"] * 20, Status.CUT)
    assert {(r.value, r.outcome) for r in cut} == {(0.0, Outcome.CUT)}


def report_with(*opinions: Opinion) -> GateReport:
    found = suite(["x"] * 20)
    report = judge(found, graded(found, ["x"] * 20), graded(found, ["xxx"] * 20), GateSettings(suite="s"), 1, "a", "b")
    return dataclasses.replace(report, opinions=opinions)


def test_wherever_the_figures_stand_they_are_called_an_opinion() -> None:
    report = report_with(OPINION)
    assert reports.from_json(reports.to_json(report)) == report
    assert "in the opinion of judge@1 (aaaaaaaaaaaa…); " in reports.line(report)
    assert "in the opinion of judge@1" in reports.markdown([report])
    assert verdict(report).endswith("(a model's opinion)")
    cells = reports._cells(reports.Judged("2-dpo", report, 1.0))
    assert cells[0] == "2-dpo\nliked\n(a model's opinion)"
    assert "opinion" not in reports.line(report_with()) + verdict(report_with())


# --- recipes -----------------------------------------------------------------------------------------------------


def opinion_suite(folder: Path, model: str, name: str = "liked", kind: str = "win_rate", gold: bool = True) -> None:
    items = [{"prompt": q} | ({"answer": "now"} if gold else {}) for q in ASKED[60:84]]
    rows(folder / f"{name}.jsonl", items)
    found = {"name": name, "kind": kind, "items": f"{name}.jsonl", "score": [{"reward_model": {"model": model}}]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(found | {"sampling": {"max_new_tokens": 4}}))


def reward_model(**changes: Any) -> dict[str, Any]:
    """Learns that "now" is better than other words."""
    settings = COMMON | dict(datasets=[{"path": "judge.jsonl"}], max_steps=16, learning_rate=1e-2, save_steps=8)
    return {"reward_model": settings | changes}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a registered reward model, trained from the base; and the folder of one that failed its gate."""
    folder = tmp_path_factory.mktemp("opinions")
    tiny_base(folder / "base")
    small_data(folder)
    worse = ["ok", "won", "no"]
    rows(
        folder / "judge.jsonl",
        [{"prompt": q, "chosen": "now", "rejected": worse[i % 3]} for i, q in enumerate(ASKED[:60])],
    )
    for name, (chosen, rejected) in {"agrees": ("now", "ok"), "differs": ("ok", "now")}.items():
        rows(folder / f"{name}.jsonl", [{"prompt": q, "chosen": chosen, "rejected": rejected} for q in ASKED[84:108]])
        pairs = {"name": name, "kind": "pairs", "items": f"{name}.jsonl"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(pairs))
    good, _ = go(recipe(folder, reward_model(register_as="judge", gate=gate("agrees"))), folder / "trained")
    kept = gate("differs", on_fail="keep_parent")
    bad, _ = go(recipe(folder, reward_model(gate=kept)), folder / "trained")
    for name, report in (("judge", good), ("failed", bad)):
        (folder / name).symlink_to(report.outcomes[0].artefact.path)
    return folder


@pytest.fixture
def place(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    linked(material, tmp_path)
    (tmp_path / "trained").unlink()
    shutil.copytree(material / "trained", tmp_path / "home")
    return tmp_path


def test_a_gate_judged_by_a_registered_reward_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opinion_suite(place, "judge@1")
    written = recipe(place, sft(), dpo(gate=gate("liked")))
    report, said = go(written, place / "home")
    made = report.outcomes[1]
    assert made.accepted
    assert made.report is not None
    assert (made.report.kind, made.report.after.numerator) == ("win_rate", 24.0)
    (opinion,) = made.report.opinions
    assert opinion.fingerprint == read_manifest(place / "judge").fingerprint
    assert opinion.doubts == ("It was shown 1 different gold answer only.",)
    assert opinion.shown.startswith("gold answers score higher than the empty answer in 24 of 24")
    told = next(line for line in said if "is the opinion of" in line)
    assert told.startswith("2-dpo: warning: the score is the opinion of judge@1-reward_model")
    card = (Path(made.artefact.path) / "README.md").read_text()
    assert "Scored by a model, so this is its opinion and no check" in card
    assert f"`{opinion.model}`, `{opinion.fingerprint}`" in card
    assert "sum of scores / items" in card

    def asked_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("the same model is asked the same again")

    monkeypatch.setattr(pipeline_opinions, "prove_opinion", asked_again)
    monkeypatch.setattr("posttrain.pipeline.answers.answer_suite", asked_again)
    again, _ = go(written, place / "home")
    assert again.outcomes[1].artefact == made.artefact
    monkeypatch.undo()
    opinion_suite(place, "./failed")
    other, said = go(written, place / "home")
    assert other.outcomes[1].artefact.version != made.artefact.version, "another judge is another suite"
    assert any("FAILED its own gate: The lower bound of the gain" in line for line in said)
    plain = read_manifest(Path(made.artefact.path)).to_json()
    del plain["gate"]["opinions"]
    assert from_json(plain).gate is not None, "manifests from before there were opinions are read"


def test_a_judge_that_pays_the_policy_or_was_trained_from_a_side_is_told(place: Path) -> None:
    opinion_suite(place, "reward_model", kind="mean_score")
    paid = grpo(max_steps=1, gate=gate("liked", on_fail="keep_parent", min_gain=-0.9))
    paid["grpo"]["rewards"].append({"reward_model": {"model": "2-reward_model"}})
    report, _ = go(recipe(place, sft(), reward_model(gate=gate("agrees")), paid), place / "home")
    found = report.outcomes[2].report
    assert found is not None
    (opinion,) = found.opinions
    assert [doubt.split(":")[0] for doubt in opinion.doubts[:2]] == [
        "A model that is judged was trained to please this very reward model",
        "It was trained from the parent, which is judged here, and may like what sounds like itself.",
    ]


def test_a_side_that_was_trained_against_a_registered_judge_in_another_run_is_told(place: Path) -> None:
    paid = grpo(max_steps=1)
    paid["grpo"]["rewards"].append({"reward_model": {"model": "judge@1"}})
    report, _ = go(recipe(place, sft(max_steps=1), paid), place / "home")
    source = str(ModelStore(place / "home").find("judge@1"))
    sides = {"model": Parent(report.outcomes[1].artefact.path, report.outcomes[1].artefact, had_sft=True)}
    doubts = pipeline_opinions.doubts_about(RewardModel(source, "any", "a" * 64), sides, pays=False)
    assert [doubt.split(":")[0] for doubt in doubts] == [
        "A model that is judged was trained to please this very reward model"
    ]


def test_a_judge_that_was_not_accepted_judges_nobody(place: Path) -> None:
    opinion_suite(place, "2-reward_model")
    kept = reward_model(gate=gate("differs", on_fail="keep_parent"))
    said = refused(place, sft(max_steps=1), kept, dpo(gate=gate("liked")))
    assert "was not accepted by its gate, so nothing may be trained against it, or judged by it" in str(said)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("never-made@1", r"suite liked: score: no model 'never-made' is registered"),
        ("3-reward_model", r"recipe\.yaml.*gate\.suite: the suite liked is scored by 3-reward_model, which must be a"),
        ("./base", r"base is a language model, not a reward model"),
    ],
)
def test_a_judge_that_is_not_there_is_missed_before_anything_trains(place: Path, model: str, message: str) -> None:
    opinion_suite(place, model)
    said = refused(place, sft(), dpo(gate=gate("liked")))
    assert re.search(message, str(said))
    assert not (place / "home" / "artefacts" / "small" / "1-sft").exists()
    assert not list((place / "home" / "runs").glob("small/1-sft*")), "nothing was trained"


def test_another_models_tokenizer_is_noticed(place: Path) -> None:
    """One with more tokens by their number; one of the same size by what the judge then says of gold answers."""
    foreign = place / "foreign"
    shutil.copytree((place / "judge").resolve(), foreign, ignore=shutil.ignore_patterns("manifest.json"))
    assert open_scorer(str(foreign), "as it was")
    tokens = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = vocabulary | {"now": vocabulary["o"], "o": vocabulary["now"]}
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    opinion_suite(place, "./foreign")
    said = refused(place, sft(), dpo(gate=gate("liked")))
    assert isinstance(said, DataError)
    assert "scores the gold answer higher than" in str(said)
    assert "look at its tokenizer" in str(said)
    last = max(vocabulary.values()) + 1
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": last, "content": "<|one more|>"})
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match="It is another model's"):
        open_scorer(str(foreign), "more")


# --- command line ------------------------------------------------------------------------------------------------


def test_eval_compare_and_check(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    home = ("--home", str(place / "home"))
    opinion_suite(place, "./failed", kind="mean_score")
    assert main(["eval", "./base", "--suite", "liked.yaml", "--json", *home]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    (opinion,) = found["opinions"]
    assert opinion["fingerprint"] == read_manifest(place / "failed").fingerprint
    assert "warning: the score is the opinion of small-reward@1-reward_model" in printed.err
    assert "FAILED its own gate" in printed.err
    assert "It was trained from the model, which is judged here" in printed.err
    opinion_suite(place, "judge")
    shown = call(capsys, "compare", "./base", "./base", "--suite", "liked.yaml", *home)
    assert "in the opinion of judge@1-reward_model-" in shown
    assert shown.rstrip().splitlines()[-1].startswith("Next")
    opinion_suite(place, "2-reward_model")
    _, said = refused_call(capsys, "compare", "./base", "./base", "--suite", "liked.yaml", *home)
    assert "is scored by the stage 2-reward_model, and no recipe is run here" in said
    recipe(place, sft(), reward_model(), dpo(gate=gate("liked")))
    program = (
        f"import sys; from posttrain.cli import main; code = main(['check', '{place / 'recipe.yaml'}']); "
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "0 []"
