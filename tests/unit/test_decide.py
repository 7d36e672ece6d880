"""Suites are strict, denominators fixed, failures never a gain, and reports say the numbers."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.errors import DataError, PosttrainError
from posttrain.gate import report as reports
from posttrain.gate.answer import read_answers, write_answers
from posttrain.gate.decide import compared, judge, measure, too_many_failed
from posttrain.gate.suites import ItemResult, Suite, grade, load_suite
from posttrain.records import Completion, GateReport, Message, Outcome, Sampling, Status, Task
from posttrain.rewards.mix import build
from posttrain.settings import DatasetSettings, GateSettings


def suite(n: int = 100, kind: str = "accuracy", must_finish: bool = True) -> Suite:
    items = tuple(Task(f"items.jsonl:{i + 1}", (Message("user", f"{i} + 1 = ?"),), str(i + 1)) for i in range(n))
    return Suite("arith", kind, items, ("math",), must_finish, Sampling(96, 0.0), "f" * 64)


def results(values: Sequence[float | None], outcome: Outcome | None = None, version: int = 1) -> list[ItemResult]:
    found = []
    for i, value in enumerate(values):
        default = Outcome.CHECKER_FAILED if value is None else Outcome.SCORED
        found.append(ItemResult(f"items.jsonl:{i + 1}", value, outcome or default, "text", version))
    return found


def shares(k: int, n: int = 100) -> list[float | None]:
    return [1.0] * k + [0.0] * (n - k)


def verdict(
    before: list[ItemResult], after: list[ItemResult], *, of: Suite | None = None, **settings: object
) -> GateReport:
    gate = GateSettings(suite="arith.yaml", **settings)
    return judge(of or suite(len(before)), before, after, gate, 12.5, "base@1", "sft@1")


# --- verdict ------------------------------------------------------------------------------------------------------


def test_a_clear_gain_passes_with_its_numbers() -> None:
    found = verdict(results(shares(3, 200)), results(shares(192, 200), version=2))
    assert found.passed
    assert (found.before.numerator, found.before.denominator) == (3, 200)
    assert found.gain == pytest.approx(0.945)
    assert "Newcombe" in found.method
    low, high = 100 * found.gain_interval.low, 100 * found.gain_interval.high
    assert found.reasons == (f"The lower bound of the gain of +94.5 points [{low:.1f}, {high:.1f}] lies above "
                             "the required 0.0.",)  # fmt: skip


def test_min_gain_is_compared_with_the_lower_bound_not_with_the_gain() -> None:
    before, after = results(shares(20)), results(shares(40))
    low = verdict(before, after).gain_interval.low
    assert 0.05 < low < 0.15
    assert verdict(before, after, min_gain=low - 1e-9).passed
    assert not verdict(before, after, min_gain=low).passed
    refused = verdict(before, after, min_gain=0.15)
    assert not refused.passed
    assert "does not lie above the required 15.0" in refused.reasons[0]


def test_no_gain_does_not_pass() -> None:
    same = results(shares(50))
    assert not verdict(same, same).passed
    assert not verdict(results(shares(0)), results(shares(0))).passed
    assert not verdict(results(shares(100)), results(shares(100))).passed
    assert not verdict(results(shares(60)), results(shares(40))).passed
    assert verdict(same, same, min_gain=-0.2).passed  # "no worse than" is a choice of the recipe


def test_a_handful_of_items_shows_nothing() -> None:
    """5 of 5 turned right: Newcombe's interval lies above 0, and yet chance does it once in 16 (McNemar, two-sided)."""
    refused = verdict(results(shares(0, 5)), results(shares(5, 5)))
    assert refused.gain_interval.low > 0
    assert refused.p_value == pytest.approx(2 / 2**5)
    assert not refused.passed
    assert "So few items cannot show it: p = 0.062" in refused.reasons[0]
    assert verdict(results(shares(0, 6)), results(shares(6, 6))).passed  # p = 2 / 2**6
    assert verdict(results(shares(0, 5)), results(shares(5, 5)), min_gain=-0.1).passed  # no gain was asked for


def test_every_look_at_the_same_items_has_its_share_of_the_five_percent() -> None:
    before, after = results(shares(0, 6)), results(shares(6, 6))
    back = {"retry": {"stage": "sft", "max": 1}}
    twice = verdict(before, after, on_fail=back)
    assert (twice.looks, twice.passed) == (2, False)
    assert "at most 0.025 (0.05 over 2 looks at the same items) passes" in twice.reasons[0]
    assert verdict(results(shares(0, 8)), results(shares(8, 8)), on_fail=back).passed  # p = 2 / 2**8


def test_equals_are_treated_alike_where_a_check_failed() -> None:
    """B's right answer to an item whose check failed for A is no gain, and A's none over B."""
    wide = suite(40)
    a = results([None, 1.0, *[0.0] * 38])
    b = results([1.0, None, *[0.0] * 38])
    settings = GateSettings(suite="arith.yaml")
    assert judge(wide, a, b, settings, 1.0, "A", "B", as_equals=True).gain == 0.0
    assert judge(wide, a, b, settings, 1.0, "A", "B").gain == pytest.approx(-1 / 40)


def test_min_score_is_a_second_condition() -> None:
    before, after = results(shares(10)), results(shares(60))
    assert verdict(before, after, min_score=0.6).passed
    refused = verdict(before, after, min_score=0.61)
    assert not refused.passed
    assert refused.reasons == ("The score 60.0 % is below the required 61.0 %.",)


def test_partial_credit_is_judged_by_bootstrap_and_always_alike() -> None:
    before = results([0.2 + 0.001 * i for i in range(100)])
    after = results([0.3 + 0.002 * i for i in range(100)])
    found = verdict(before, after)
    assert found.passed
    assert "bootstrap" in found.method
    assert found == verdict(before, after)


def test_win_rate_counts_ties_half() -> None:
    before = results([0.5] * 60)
    after = results([1.0] * 30 + [0.5] * 20 + [0.0] * 10)
    found = verdict(before, after, of=suite(60, "win_rate"))
    assert (found.before.numerator, found.after.numerator, found.after.denominator) == (20, 40, 60)
    assert found.gain == pytest.approx(40 / 60 - 0.5)
    assert found.passed
    assert not verdict(after, before, of=suite(60, "win_rate")).passed


# --- denominators and failures ------------------------------------------------------------------------------------


def test_the_denominator_never_shrinks() -> None:
    found = verdict(results(shares(10)), results([1.0] * 50 + [None] * 4 + [0.0] * 46))
    assert (found.after.numerator, found.after.denominator) == (50, 100)
    assert found.counts["child_checker_failed"] == 4
    assert found.counts["child_scored"] == 96
    assert found.passed


def test_a_failed_check_of_the_parent_is_no_gain_of_the_child() -> None:
    """Five items both get right; the parent's checks fail there. Nothing was gained."""
    before = results([None] * 5 + [0.0] * 95)
    found = verdict(before, results([1.0] * 5 + [0.0] * 95))
    assert found.gain == 0.0
    assert found.counts["parent_checker_failed"] == 5
    assert not found.passed
    won = verdict(before, results([1.0] * 5 + [0.0] * 95), of=suite(kind="win_rate"))
    assert won.gain == 0.0


@pytest.mark.parametrize("outcome", [Outcome.CHECKER_FAILED, Outcome.TIMED_OUT])
@pytest.mark.parametrize("side", ["parent", "child"])
def test_too_many_failures_refuse_whatever_the_gain(outcome: Outcome, side: str) -> None:
    def failing(values: list[float | None], n: int) -> list[ItemResult]:
        judged = results(values)
        return [*judged[:-n], *(dataclasses.replace(r, value=None, outcome=outcome) for r in judged[-n:])]

    def run(n: int) -> GateReport:
        before, after = shares(5), shares(90)
        if side == "parent":
            return verdict(failing(before, n), results(after))
        return verdict(results(before), failing(after, n))

    assert run(5).passed
    refused = run(6)
    assert not refused.passed
    assert refused.reasons == (
        f"Of the {side}'s 100 checks 6 failed or ran out of time, more than the 5% that still allow a verdict.",
    )


def test_a_cut_answer_counts_0_where_it_must_finish() -> None:
    cut = results([1.0] * 100, Outcome.CUT)
    assert verdict(results(shares(0)), cut).after.value == 0.0
    assert verdict(results(shares(0)), cut).counts["child_cut"] == 100
    assert verdict(results(shares(0)), cut, of=suite(must_finish=False)).after.value == 1.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:-1], "99 results"),
        (lambda r: [r[1], r[0], *r[2:]], "in order"),
        (lambda r: [r[0], r[0], *r[2:]], "in order"),
        (lambda r: [dataclasses.replace(r[0], weight_version=9), *r[1:]], r"weight versions: \[1, 9\]"),
        (lambda r: [dataclasses.replace(r[0], value=None), *r[1:]], "outcome scored"),
        (lambda r: [dataclasses.replace(r[0], value=1.5), *r[1:]], r"1\.5"),
        (lambda r: [dataclasses.replace(r[0], outcome=Outcome.TIMED_OUT), *r[1:]], "timed_out"),
    ],
)
def test_results_that_are_not_the_suite_are_refused(spoil: object, message: str) -> None:
    good = results(shares(50))
    for before, after in [(spoil(good), good), (good, spoil(good))]:
        with pytest.raises(PosttrainError, match=message):
            verdict(before, after, of=suite(100))


# --- report -------------------------------------------------------------------------------------------------------


def test_a_report_survives_json_unchanged() -> None:
    partial = verdict(results([1 / 3, 0.1]), results([2 / 3, 0.7]))
    for found in (partial, verdict(results(shares(3)), results([*shares(96)[:-1], None]), min_gain=0.1, min_score=0.5)):
        assert reports.from_json(reports.to_json(found)) == found
        assert reports.from_dict(json.loads(json.dumps(reports.as_dict(found)))) == found


def test_the_line_says_it_all() -> None:
    found = verdict(results(shares(3, 200)), results(shares(192, 200)))
    assert reports.line(found) == (
        "arith: 3/200 (1.5 %, 0.5–4.3) → 192/200 (96.0 %, 92.3–98.0); gain +94.5 points [89.9, 96.7]; passed"
    )
    won = verdict(results([0.0] * 3), results([1.0, 0.0, 0.0]), of=suite(3, "win_rate"))
    assert reports.line(won).startswith("arith: the child wins 2/3 (66.7 %, ")
    assert reports.line(won).endswith("; refused")
    assert "1.5/3" in reports.share(verdict(results([0.5, 0.75, 0.25]), results([0, 0, 0])).before)


def test_table_and_model_card_show_every_gate() -> None:
    from rich.console import Console

    passed = verdict(results(shares(3)), results(shares(96)))
    refused = verdict(results(shares(3)), results([*shares(3)[:-2], None, None]))
    console = Console(width=80, record=True, file=io.StringIO())
    stages = [
        reports.Judged("1-sft", passed, 61.0),
        reports.Judged("2-dpo", refused, 5.0),
        reports.Judged("x", None, 1),
    ]
    console.print(reports.table(stages))
    shown = console.export_text()
    assert "no gate" in shown
    card = reports.markdown([passed, refused])
    for text in (shown, card):
        assert "passed" in text
        assert "refused" in text
    assert "…" not in shown, "nothing is cut at 80 columns"
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert any(line.startswith("1-sft 3/100 (3.0 %) 96/100 (96.0 %) +93.0") for line in lines)
    assert any(line.startswith("arith 1.0–8.5 90.2–98.4 [") and line.endswith("1 min 01 s") for line in lines)
    assert "3/100 (3.0 %, 1.0–8.5)" in card
    assert "96/100 (96.0 %, 90.2–98.4)" in card
    assert "base@1 → sft@1" in card
    assert "2 child checker failed" in card
    assert card.count("\n|") == 3


# --- one model by itself, and two as equals -----------------------------------------------------------------------


def test_one_score_counts_every_item_whatever_became_of_its_check() -> None:
    found = measure(suite(10), results([1.0] * 6 + [0.0] * 3 + [None]))
    assert (found.numerator, found.denominator) == (6.0, 10)
    assert (round(found.interval.low, 3), round(found.interval.high, 3)) == (0.313, 0.832)  # Wilson, 6 of 10
    cut = [*results(shares(5, 5)), ItemResult("items.jsonl:6", 1.0, Outcome.CUT, "text", 1)]
    assert measure(suite(6), cut).numerator == 5.0
    assert measure(suite(6, must_finish=False), cut).numerator == 6.0
    assert measure(suite(2), results([0.25, 0.5])).value == 0.375
    with pytest.raises(PosttrainError, match="not the 10 items"):
        measure(suite(10), results(shares(3, 9)))


def test_failed_checks_are_counted_against_a_verdict() -> None:
    assert too_many_failed(results([1.0] * 95 + [None] * 5)) == ""
    assert "100 checks 6 failed" in too_many_failed(results([1.0] * 94 + [None] * 6))


def test_two_models_as_equals() -> None:
    low, high = results(shares(20)), results(shares(60))
    assert compared(verdict(low, high)) == "B is better"
    assert compared(verdict(high, low)) == "B is worse"
    assert compared(verdict(low, low)) == "no difference shown"
    broken = results([1.0] * 80 + [None] * 20)
    assert compared(verdict(low, broken)) == "no verdict: too many checks of B failed or ran out of time"
    assert compared(verdict(broken, high)) == "no verdict: too many checks of A failed or ran out of time"


# --- suites -------------------------------------------------------------------------------------------------------

SUITE = """\
name: arith-heldout
kind: accuracy
items: rows.jsonl
columns: {prompt: question, answer: answer}
limit: 2
score: [math]
sampling: {temperature: 0.0, max_new_tokens: 96}
"""


def reader(rows: Sequence[Task] | None = None) -> object:
    def read_tasks(datasets: Sequence[DatasetSettings], resolve: object) -> Sequence[Task]:
        (source,) = datasets
        reader.seen = source
        assert resolve is Path
        return suite(3).items[: source.limit] if rows is None else rows

    return read_tasks


def load(tmp_path: Path, text: str = SUITE, rows: Sequence[Task] | None = None, name: str = "s.yaml") -> Suite:
    (tmp_path / name).write_text(text)
    return load_suite(tmp_path / name, Path, reader(rows))


def test_a_suite_is_read_whole(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (found.name, found.kind, len(found.items), found.must_finish) == ("arith-heldout", "accuracy", 2, True)
    assert found.sampling == Sampling(max_new_tokens=96, temperature=0.0)
    assert reader.seen.path == str(tmp_path / "rows.jsonl")
    assert (reader.seen.format, reader.seen.columns["prompt"]) == ("task", "question")
    load(tmp_path, SUITE.replace("rows.jsonl", "builtin:data/arith-test.jsonl"))
    assert reader.seen.path == "builtin:data/arith-test.jsonl"


def test_the_fingerprint_is_of_the_meaning(tmp_path: Path) -> None:
    first = load(tmp_path)
    assert load(tmp_path, "# a remark\n" + SUITE, name="other.yaml").fingerprint == first.fingerprint
    changed = [
        load(tmp_path, SUITE.replace("96", "97")),
        load(tmp_path, SUITE.replace("[math]", "[exact]")),
        load(tmp_path, SUITE + "must_finish: false\n"),
        load(tmp_path, rows=[first.items[0], dataclasses.replace(first.items[1], answer="3")]),
        load(tmp_path, rows=first.items[:1]),
    ]
    assert len({first.fingerprint, *(s.fingerprint for s in changed)}) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUITE + "limits: 3\n", r"s\.yaml:8: limits is not a key here. Did you mean limit\?"),
        (
            SUITE.replace("max_new_tokens", "max_tokens"),
            r"s\.yaml:7: sampling\.max_tokens is not a key.*max_new_tokens",
        ),
        (SUITE + "limit: 3\n", r"s\.yaml:8: limit is set twice in one section, first on line 5"),
        (SUITE.replace("items: rows.jsonl\n", ""), "items is missing"),
        (SUITE.replace("accuracy", "f1"), r"s\.yaml:2: kind = .f1. must be"),
        (SUITE.replace("limit: 2", "limit: 0"), r"s\.yaml:5: limit = 0"),
        (SUITE.replace("0.0", "-1"), r"s\.yaml:7: sampling\.temperature = -1"),
        (SUITE.replace("[math]", "[maths]"), r"s\.yaml: rewards\[0\]: there is no reward 'maths'. Did you mean 'math'"),
        ("- a\n- b\n", "a section of keys"),
        ("", "a section of keys"),
        ("name: [", "not YAML"),
    ],
)
def test_a_wrong_suite_is_refused_at_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text)


def test_a_suite_without_items_or_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no items"):
        load(tmp_path, rows=[])
    with pytest.raises(DataError, match=r"items\.jsonl:9: the reward `math` needs a gold answer"):
        load(tmp_path, rows=[Task("items.jsonl:9", ())])
    with pytest.raises(DataError, match=r"gone\.yaml: the suite cannot be read"):
        load_suite(tmp_path / "gone.yaml", Path, reader())


def completion(item: Task, text: str, status: Status = Status.FINISHED) -> Completion:
    return Completion(item.id, 0, (), (), status, weight_version=4, text=text)


def test_grading_keeps_order_outcome_and_version() -> None:
    arith = suite(4)
    asked = [
        completion(arith.items[0], "Answer: 1"),
        completion(arith.items[1], "Answer: 7"),
        completion(arith.items[2], "Answer: 3", Status.CUT),
        completion(arith.items[3], "", Status.FAILED),
    ]
    with build(list(arith.score)) as mix:
        found = grade(arith, asked, mix)
        lenient = grade(dataclasses.replace(arith, must_finish=False), asked, mix)
        with pytest.raises(PosttrainError, match=r"items\.jsonl:1: an answer to items\.jsonl:2"):
            grade(arith, [asked[1], asked[0], *asked[2:]], mix)
    assert [(r.value, r.outcome.value) for r in found] == [
        (1.0, "scored"), (0.0, "scored"), (0.0, "cut"), (None, "checker_failed"),
    ]  # fmt: skip
    assert (lenient[2].value, lenient[2].outcome) == (1.0, Outcome.CUT)
    assert {r.weight_version for r in found} == {4}
    assert found[1].text == "Answer: 7"


def test_the_gate_never_loads_torch() -> None:
    import os
    import subprocess
    import sys

    code = "import sys, posttrain.gate.decide, posttrain.gate.report; print({'torch', 'sympy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "set()"


def test_answers_are_read_back_whatever_line_ends_they_hold(tmp_path: Path) -> None:
    """U+2028 and its like end a line for some readers; JSON leaves them as they are."""
    texts = ["one\u2028two", "a\x85b\u2029c", "x\x0b\x0c\x1c\x1d\x1e\r\ny", "", "plain"]
    given = [ItemResult(f"items.jsonl:{i}", 1.0, Outcome.SCORED, text, 1) for i, text in enumerate(texts)]
    write_answers(tmp_path / "answers.jsonl", given)
    assert read_answers(tmp_path / "answers.jsonl") == given
    write_answers(tmp_path / "answers.jsonl", [])
    assert read_answers(tmp_path / "answers.jsonl") == []
