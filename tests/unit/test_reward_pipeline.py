"""Reward models in a recipe, as a reward and on the command line, on models that train in seconds.

Planted: a length bias in the training pairs, cut answers, a margin that is not there, a refused reward model that is
used all the same, suites of the wrong kind, answers that cannot be read.
"""

from __future__ import annotations

import json
import re
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import COMMON, WORDS, gate, go, grpo, linked, recipe, refused, rows, sft, small_data, tiny_base
from test_cli_models import call
from test_cli_models import refused as refused_call

from posttrain.data.render import Renderer
from posttrain.errors import DataError, GateRefused, PosttrainError, RecipeError
from posttrain.gate.pairs import report_of
from posttrain.gate.suites import load_suite
from posttrain.models.load import load_policy
from posttrain.records import Completion, Message, Outcome, Status, Stepwise, Task
from posttrain.registry.manifest import read_manifest
from posttrain.registry.store import ModelStore
from posttrain.rewards.mix import build
from posttrain.rollout.judges import Judges, ModelPart, open_judges
from posttrain.rollout.scorer import Answer, Scorer, Verdict, logit, open_scorer

ASKED = [f"Is {a} with {b} fine?" for a in WORDS for b in WORDS if a != b]


def suite_file(folder: Path, name: str, found: list[dict[str, Any]]) -> None:
    rows(folder / f"{name}.jsonl", found)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "kind": "pairs", "items": f"{name}.jsonl"}))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    tiny_base(folder / "base")
    small_data(folder)
    better = [{"prompt": q, "chosen": "now", "rejected": "ok"} for q in ASKED[84:108]]
    suite_file(folder, "agrees", better)
    suite_file(folder, "differs", [{**row, "chosen": "ok", "rejected": "now"} for row in better])
    said = [["now", "ok", "now"], ["ok", "now", "ok"]]
    steps = [
        {"prompt": q, "steps": said[i % 2], "labels": [word == "now" for word in said[i % 2]]}
        for i, q in enumerate(ASKED[:48])
    ]
    rows(folder / "steps.jsonl", steps)
    return folder


@pytest.fixture
def place(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return linked(material, tmp_path)


def reward_model(suite: str | None = "agrees", **changes: Any) -> dict[str, Any]:
    settings = COMMON | dict(datasets=[{"path": "dpo.jsonl"}], max_steps=8, learning_rate=1e-2, save_steps=4)
    return {"reward_model": settings | ({"gate": gate(suite)} if suite else {}) | changes}


def steps_model(**changes: Any) -> dict[str, Any]:
    settings = COMMON | dict(datasets=[{"path": "steps.jsonl"}], max_steps=30, learning_rate=1e-2)
    return {"process_reward_model": settings | changes}


def rewarded(model: str, **options: Any) -> dict[str, Any]:
    stage = grpo(max_steps=2)
    stage["grpo"]["rewards"].append({"reward_model": {"model": model, **options}})
    return stage


def test_the_next_stage_starts_where_this_one_did_and_is_paid_by_it(place: Path) -> None:
    written = recipe(place, sft(gate=gate()), reward_model(), rewarded("2-reward_model", weight=3.0), register="small")
    report, said = go(written, place / "home")
    first, scores, policy = report.outcomes
    assert read_manifest(Path(policy.artefact.path)).parent.fingerprint == first.artefact.fingerprint  # type: ignore[union-attr]
    assert (scores.artefact.name, first.artefact.name) == ("small-reward", "small")
    entries = {(e.name, e.version): e.aliases for e in ModelStore(place / "home").entries()}
    assert entries == {("small", 1): ("candidate",), ("small-reward", 1): ("candidate", "champion")}
    manifest = read_manifest(Path(scores.artefact.path))
    assert manifest.metrics["suite_accuracy"] == 1.0
    assert manifest.gate is not None
    assert (manifest.gate.kind, manifest.gate.parent_version) == ("pairs", "guessing")
    card = (Path(scores.artefact.path) / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "| suite accuracy | 1.000 |" in card
    assert any("the reward reward_model is the opinion of small-reward@2-reward_model" in line for line in said)
    log = (place / "home" / "runs" / "small" / policy.artefact.version / "metrics.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    assert last["cut_share"] < 1
    assert 0 < last["reward_reward_model"] < 1

    again, _ = go(written, place / "home")
    assert [o.artefact for o in again.outcomes] == [o.artefact for o in report.outcomes]
    assert [o.version for o in again.outcomes] == [1, 1, None]
    other, _ = go(
        recipe(
            place, sft(gate=gate()), reward_model(center_rewards_coefficient=0.1), rewarded("reward_model", weight=3.0)
        ),
        place / "home",
    )
    assert other.outcomes[2].artefact.version != policy.artefact.version, "another reward model is another stage"


def test_a_refused_reward_model_pays_nobody(place: Path) -> None:
    keep = reward_model("differs", gate=gate("differs", on_fail="keep_parent"))
    with pytest.raises(RecipeError, match=r"the reward model of 2-reward_model was not accepted by its gate"):
        go(recipe(place, sft(), keep, rewarded("2-reward_model")), place / "home")
    assert ModelStore(place / "home").entries() == []
    with pytest.raises(GateRefused, match="2-reward_model did not pass its gate"):
        go(recipe(place, sft(), reward_model("differs")), place / "home")


def test_a_recipe_of_a_reward_model_alone_with_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dict(adapter="lora", lora={"r": 4}, register_as="judge", learning_rate=2e-2)
    report, said = go(recipe(place, reward_model(**settings)), place / "home")
    assert report.champion is None
    assert [(e.name, e.aliases) for e in ModelStore(place / "home").entries()] == [("judge", ("candidate", "champion"))]
    assert "nothing promoted as a model that answers: no stage makes one" in said
    shapes = [(32, 32), (32, 32), (32, 16), (32, 16), (32, 48), (32, 48), (48, 32)] * 2
    trained = sum(4 * (i + o) for i, o in shapes) + 32  # of the adapter, and of the score
    assert any(f"1-reward_model: lora on 14 layers: {trained:,} parameters train" in line for line in said), said
    assert "its adapter is in its weights already" in refused_call(capsys, "merge", report.outcomes[0].artefact.path)[1]
    opened = open_scorer(report.outcomes[0].artefact.path, "judge")
    better, worse = opened.answers([Answer((Message("user", ASKED[100]),), text) for text in ("now", "ok")])
    assert better.value is not None
    assert worse.value is not None
    assert better.value > worse.value


def test_embeddings_that_train_beside_an_adapter_are_in_the_saved_reward_model(place: Path) -> None:
    """The base's head shares its weights with them; the score has taken its place."""
    lora = {"r": 4, "modules_to_save": ["embed_tokens"]}
    report, _ = go(recipe(place, reward_model(None, adapter="lora", lora=lora, max_steps=2)), place / "home")
    saved = open_scorer(report.outcomes[0].artefact.path, "embedded").model
    before = load_policy(str(place / "base")).model.get_input_embeddings().weight
    after = saved.model.get_input_embeddings().weight
    assert (after - before).abs().max() > 1e-4
    assert not any("modules_to_save" in name for name in saved.model.state_dict())


def test_an_adapter_on_a_base_in_half_precision(place: Path) -> None:
    report, _ = go(recipe(place, reward_model(None, adapter="dora", dtype="bfloat16", max_steps=2)), place / "home")
    saved = open_scorer(report.outcomes[0].artefact.path, "dora").model
    assert not any("lora" in name for name in saved.model.state_dict())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((sft(gate=gate("agrees")),), "agrees is a suite of kind pairs, but sft makes a model that writes answers"),
        ((reward_model("ok"),), "ok is a suite of kind accuracy, but reward_model makes a model that scores"),
        ((reward_model(gate=gate("agrees", min_gain=0.5)),), "min_gain = 0.5 can never be reached"),
        ((reward_model(on_overflow="truncate"),), "a score is read at the end of an answer, and a cut one has none"),
        ((sft(), rewarded("1-reward_model")), "names the reward model of 1-reward_model, which must be a stage before"),
        ((sft(), rewarded("x", weight=0.0)), r"rewards: reward_model\.weight = 0 must be"),
        ((sft(), rewarded("x", margin=1.0)), r"reward_model\.margin is not a key here"),
        ((sft(), rewarded("never-made@1")), "no model 'never-made' is registered"),
        ((reward_model(margin="column"),), "has no number in a column `margin`"),
        (
            (reward_model(adapter="lora", lora={"modules_to_save": ["score"]}),),
            "names score, which trains in full",
        ),
        (
            (steps_model(adapter="dora", lora={"modules_to_save": ["lm_head"]}),),
            "names lm_head, the output layer",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(place: Path, stages: Any, message: str) -> None:
    assert re.search(message, str(refused(place, *stages)))


def test_margins_of_rows_reach_training_and_evaluation(place: Path) -> None:
    """Scores of a new model are around 0, so the loss is about the margin: 100 of the one file, 50 of the other."""
    for name, margin, asked in (("train", 100.0, ASKED[:8]), ("even", 50.0, ASKED[60:68])):
        found = [{"prompt": q, "chosen": "now", "rejected": "ok", "margin": margin} for q in asked]
        rows(place / f"{name}.jsonl", found)
    datasets = {"datasets": [{"path": "train.jsonl"}], "eval_datasets": [{"path": "even.jsonl"}]}
    stage = reward_model(None, **datasets, margin="column", max_steps=1, learning_rate=1e-5)
    report, _ = go(recipe(place, stage), place / "home")
    run = place / "home" / "runs" / "small" / report.outcomes[0].artefact.version
    (line,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert (line["pair_loss"], line["eval_pair_loss"]) == (pytest.approx(100, abs=5), pytest.approx(50, abs=5))


def test_cut_answers_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's rule keeps them out; this is what stands behind it."""
    monkeypatch.setattr("posttrain.recipe.rules.RULES", ())
    rows(place / "some.jsonl", [{"prompt": "Hm?", "chosen": "now " * n, "rejected": "ok " * n} for n in (1, 60)])
    cut = reward_model(None, datasets=[{"path": "some.jsonl"}], max_length=40, on_overflow="truncate")
    said = refused(place, cut)
    assert isinstance(said, DataError)
    assert "2 of 4 answers do not end with <|im_end|>, where a reward model is read" in str(said)


def test_a_planted_length_bias_is_found_by_the_probes(place: Path) -> None:
    """Trained where chosen is the longer one, judged where length says nothing."""
    words = "fine good well right sure true".split()
    long, short = " ".join(words), words[0]
    rows(place / "biased.jsonl", [{"prompt": q, "chosen": long, "rejected": short} for q in ASKED[:60]])
    shown = [{"prompt": q, "chosen": c, "rejected": r} for i, q in enumerate(ASKED[84:124])
             for c, r in [(long, short) if i % 2 else (short, long)]]  # fmt: skip
    suite_file(place, "even", shown)
    stage = reward_model(None, datasets=[{"path": "biased.jsonl"}])
    report, _ = go(recipe(place, stage), place / "home")
    scorer = open_scorer(report.outcomes[0].artefact.path, "biased")
    pairs = load_suite(place / "even.yaml", Path).pairs
    found = report_of(pairs, scorer.pairs(pairs), scorer)
    assert found.length is not None
    assert (found.length.model.value, found.length.labels.value) == (1.0, 0.5)
    assert "length" in found.found


# --- steps -------------------------------------------------------------------------------------------------------


def test_steps_are_marked_at_their_last_token(place: Path) -> None:
    renderer = Renderer(load_policy(str(place / "base")).tokenizer)
    row = Stepwise("r", (Message("user", "Sum?"),), ("1 + 1 = 2", " so 2 "), (True, True))
    (tree,) = renderer.stepwise([row])
    (branch,) = tree.branches
    ends = [i + 1 for i, marked in enumerate(branch.scored) if marked]
    assert [renderer.decode(branch.token_ids[:end]) for end in ends] == ["1 + 1 = 2\n", "1 + 1 = 2\nso 2<|im_end|>"]
    assert tree.trunk_ids == renderer.prompt_ids(row.prompt)


def test_an_answer_s_logit_by_hand() -> None:
    """Of several steps ln p/(1 − p) of their aggregate: ¾ is ln 3. A single score is the logit itself."""
    assert logit(Verdict(0.75, (1.0, 2.0))) == pytest.approx(log(3))
    assert logit(Verdict(0.25, (1.0, 2.0))) == pytest.approx(-log(3))
    assert logit(Verdict(0.75, (-7.5,))) == -7.5
    assert logit(Verdict(1.0, (99.0, 99.0))) == pytest.approx(12 * log(10), rel=1e-4)
    assert logit(Verdict(0.0, (-999.0, 1.0))) == pytest.approx(-12 * log(10))
    with pytest.raises(PosttrainError, match="an answer of a pair could not be scored: too long"):
        logit(Verdict(None, detail="too long"))


def test_a_process_reward_model_scores_each_step(place: Path) -> None:
    """Of the steps it trains on one half is right, of the held-out ones a third."""
    held_out = [{"prompt": q, "steps": ["ok", "now", "ok"], "labels": [False, True, False]} for q in ASKED[60:64]]
    rows(place / "more.jsonl", held_out)
    report, said = go(recipe(place, steps_model(eval_datasets=[{"path": "more.jsonl"}])), place / "home")
    scorer = open_scorer(report.outcomes[0].artefact.path, "steps", aggregate="product")
    assert scorer.steps
    (found,) = scorer.answers([Answer((Message("user", ASKED[100]),), "now\nok\nnow")])
    right = [1 / (1 + torch.tensor(-s).exp().item()) for s in found.scores]
    assert right[0] > 0.5 > right[1]
    assert right[2] > 0.5
    assert found.value == pytest.approx(right[0] * right[1] * right[2])
    assert any("step_accuracy 1.000" in line for line in said), said
    run = place / "home" / "runs" / "small" / report.outcomes[0].artefact.version
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["eval_right_share"] for line in lines if "eval_right_share" in line]
    assert shares
    assert shares == pytest.approx([1 / 3] * len(shares))
    pairs = load_suite(place / "agrees.yaml", Path).pairs
    assert all(now > ok for now, ok in scorer.pairs(pairs)), "pairs are judged by the steps together"
    (least,) = Scorer(scorer.model, scorer.renderer, "s", "min").answers([Answer((Message("user", "Hm?"),), "now\nok")])
    assert least.value == pytest.approx(min(1 / (1 + torch.tensor(-s).exp().item()) for s in least.scores))


# --- as a reward -------------------------------------------------------------------------------------------------


class Opinion:
    label = "by-hand"

    def answers(self, asked: list[Answer]) -> list[Verdict]:
        return [Verdict(None, detail="unreadable") if a.text == "?" else Verdict(len(a.text) / 10) for a in asked]


def completion(text: str, status: Status = Status.FINISHED) -> Completion:
    return Completion("t", 0, (1,), (0.0,), status, 1, text)


def test_checkers_and_models_are_weighed_together_and_failures_are_no_zeros() -> None:
    """(1 · 1 + 3 · 0.3) / 4; the checker says 1 to 'now'."""
    part = ModelPart("reward_model", Opinion(), 3.0)  # type: ignore[arg-type]
    asked = [completion("now"), completion("x" * 5), completion("?"), completion("cut", Status.CUT),
             completion("", Status.FAILED)]  # fmt: skip
    tasks = [Task("t", (), "now")] * 5
    with open_judges(["exact"], None) as plain, Judges(plain.checkers, (part,)) as judges:
        found = judges.score(asked, tasks)
    values = [f.total.value for f in found]
    assert values == [pytest.approx((1 + 3 * 0.3) / 4), pytest.approx(3 * 0.5 / 4), None, 0.0, None]
    assert [f.total.outcome for f in found[2:]] == [Outcome.CHECKER_FAILED, Outcome.CUT, Outcome.CHECKER_FAILED]
    assert found[2].total.detail == "reward_model: unreadable"
    assert all(set(f.parts) == {"exact", "reward_model"} for f in found)
    alone = Judges(None, (part,)).score(asked, tasks)
    assert [f.total.value for f in alone] == [pytest.approx(0.3), pytest.approx(0.5), None, 0.0, None]


def test_a_penalty_is_added_to_what_a_model_says_and_a_cut_answer_is_worth_least() -> None:
    """'now' costs nothing; of 'x x x x x' every run of two words but the first was said before: 3 of 4."""
    part = ModelPart("reward_model", Opinion(), 3.0)  # type: ignore[arg-type]
    penalty = {"repetition": {"n": 2, "weight": 0.4}}
    asked = [completion("now"), completion("x x x x x"), completion("cut", Status.CUT)]
    with build([penalty], alone=False) as checkers:
        found = Judges(checkers, (part,)).score(asked, [Task("t", ())] * 3)
    said = [Opinion().answers([Answer((), c.text)])[0].value for c in asked[:2]]
    assert [f.total.value for f in found] == [said[0], pytest.approx(said[1] - 0.4 * 0.75), -0.4]
    assert found[2].total.outcome is Outcome.CUT


def test_a_rubric_counts_once_by_its_own_weight() -> None:
    rubric = {"rubric": {"weight": 2.0, "criteria": ["exact", {"repetition": {"weight": 0.5}}]}}
    with open_judges([rubric, {"repetition": {"n": 2, "weight": 0.25}}], None) as judges:
        assert judges.weights == {"rubric": 2.0, "repetition": 0.25}
        assert judges.penalties == {"rubric.repetition", "repetition"}
        (found,) = judges.score([completion("now")], [Task("t", (), "now")])
    assert set(judges.weights) <= set(found.parts)


def test_what_cannot_be_read_gets_no_value(place: Path) -> None:
    report, _ = go(recipe(place, reward_model(None)), place / "home")
    scorer = open_scorer(report.outcomes[0].artefact.path, "rm")
    asked = (Message("user", "Hm?"),)
    texts = ["now", "a <|im_end|> b", "now " * 200, "ok", "now"]
    found = scorer.answers([Answer(asked, text) for text in texts])
    assert [v.value is None for v in found] == [False, True, True, False, False]
    assert "control token" in found[1].detail
    assert "knows 128" in found[2].detail
    assert found[0].scores == pytest.approx(found[4].scores)
    alone = scorer.answers([Answer(asked, "ok")])
    assert found[3].scores == pytest.approx(alone[0].scores, abs=1e-5), "company changes nothing"


# --- command line ------------------------------------------------------------------------------------------------


def test_eval_and_best_of_n_on_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    go(recipe(place, sft(gate=gate()), reward_model()), place / "home")
    home = ("--home", str(place / "home"))
    shown = call(capsys, "eval", "small-reward", "--suite", "agrees.yaml", *home)
    assert "accuracy 100.0 % [86.2, 100.0] of 24 pairs" in shown
    found = json.loads(call(capsys, "eval", "small-reward@1", "--suite", "agrees.yaml", "--json", *home))
    assert (found["accuracy"]["numerator"], found["length"]["labels_prefer_longer"]["value"]) == (24, 1.0)
    asked = ("--prompt", "Is red with blue fine?", "--temperature", "1.2", "--best-of", "6", "--reward", "small-reward")
    answers = json.loads(call(capsys, "generate", "small@1", *asked, "--json", *home))["answers"]
    assert len(answers) == 6
    scored = [a for a in answers if a["value"] is not None]
    (best,) = [a for a in answers if a["best"]]
    assert best["value"] == max(a["value"] for a in scored)
    assert best["status"] == "finished"
    assert all(a["status"] == "finished" for a in scored)
    shown = call(capsys, "generate", "small@1", *asked, *home)
    assert f"best of 6 by small-reward: {best['value']:.3f}" in shown
    assert shown.count("[finished") == 1
    for words, said in [
        ((*asked[:4], "--best-of", "6"), "--best-of and --reward go together. Add --reward NAME"),
        ((*asked, "--samples", "2"), "both say how many answers"),
        ((*asked[:2], *asked[4:]), "--best-of 6 at temperature 0 would be 6 times the same"),
        ((*asked[:6], "--reward", "small@1"), "is a language model, not a reward model"),
    ]:
        assert said in refused_call(capsys, "generate", "small@1", *words, *home)[1]
    assert "is a reward model: it scores answers" in refused_call(capsys, "chat", "small-reward", *home)[1]
    assert "is a language model" in refused_call(capsys, "eval", "small@1", "--suite", "agrees.yaml", *home)[1]
