"""A reward model on held-out pairs: the verdict, the figures, the probes, each from scores written by hand.

Planted: a model that prefers length, one that loves a preamble, scores sure of themselves and wrong, ties, keys that
nothing reads, a suite of the wrong kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from posttrain.errors import DataError
from posttrain.gate.decide import judge_pairs
from posttrain.gate.pairs import PREAMBLE, PairReport, calibrated, pair_results, report_of
from posttrain.gate.suites import Suite, load_suite
from posttrain.records import Message, Pair, Sampling, Task
from posttrain.rollout.scorer import Answer, Verdict
from posttrain.settings import GateSettings


def pair(i: int, chosen: str = "good answer", rejected: str = "bad answer", **more: object) -> Pair:
    asked = (Message("user", f"question {i}"),)
    return Pair(f"f:{i}", asked, (Message("assistant", chosen),), (Message("assistant", rejected),), **more)  # type: ignore[arg-type]


def suite(pairs: Sequence[Pair]) -> Suite:
    items = tuple(Task(p.id, p.prompt) for p in pairs)
    return Suite("held", "pairs", items, (), False, Sampling(), "f" * 64, tuple(pairs))


class ByHand:
    """Scores a text by a function of it."""

    label = "by-hand"

    def __init__(self, score: Callable[[str], float]) -> None:
        self.score = score

    def pairs(self, rows: Sequence[Pair]) -> list[tuple[float, float]]:
        return [(self.score(p.chosen[-1].content), self.score(p.rejected[-1].content)) for p in rows]

    def answers(self, asked: Sequence[Answer]) -> list[Verdict]:
        return [Verdict(0.5, (self.score(a.text),)) for a in asked]

    def on(self, pairs: Sequence[Pair]) -> PairReport:
        return report_of(pairs, self.pairs(pairs), self)  # type: ignore[arg-type]


def test_the_verdict_is_against_guessing_and_ties_count_half() -> None:
    """60 right, 20 ties, 20 wrong: 70 of 100, 20 points over even."""
    pairs = [pair(i) for i in range(100)]
    scores = [(2.0, 1.0)] * 60 + [(1.0, 1.0)] * 20 + [(0.0, 1.0)] * 20
    results = pair_results(suite(pairs), scores)
    found = judge_pairs(suite(pairs), results, GateSettings(suite="s"), 1.0, "2-reward_model-x")
    assert (found.after.numerator, found.after.denominator, found.gain) == (70.0, 100, pytest.approx(0.2))
    assert (found.before.value, found.parent_version, found.passed) == (0.5, "guessing", True)
    assert results[60].text == "chosen 1.0000, rejected 1.0000"
    flat = judge_pairs(suite(pairs), pair_results(suite(pairs), [(1.0, 1.0)] * 100), GateSettings(suite="s"), 1.0, "x")
    assert (flat.after.value, flat.passed) == (0.5, False), "a model that says the same of everything passes nothing"
    few = [pair(i) for i in range(5)]
    won = judge_pairs(suite(few), pair_results(suite(few), [(1.0, 0.0)] * 5), GateSettings(suite="s"), 1.0, "x")
    assert not won.passed, "five pairs show nothing"


def test_calibration_by_hand() -> None:
    """Probability σ(ln 3) = 3/4 for its own choice, right in 2 of 4: off by 1/4. σ(0.2) ≈ 0.55, right in 1 of 1."""
    ln3 = math.log(3)
    bins, error = calibrated([(ln3, 0.0), (0.0, ln3), (ln3, 0.0), (0.0, ln3), (0.2, 0.0)])
    low, high = bins
    assert (low.low, low.right.value, high.low, high.right.value) == (0.5, 1.0, 0.7, 0.5)
    sure = 1 / (1 + math.exp(-0.2))
    assert (low.predicted, high.predicted) == pytest.approx((sure, 0.75))
    assert error == pytest.approx((4 * 0.25 + (1 - sure)) / 5)
    certain = calibrated([(1e4, -1e4), (-1e4, 1e4)])
    assert certain[1] == pytest.approx(0.5), "sure of itself and wrong in half"


def test_groups_by_source_length_and_confidence() -> None:
    pairs = [
        pair(0, "a" * 100, "b" * 10, source="x", confidence=0.1),
        pair(1, "a" * 10, "b" * 100, source="x", confidence=0.1),
        pair(2, "a" * 50, "b" * 51, source="y", confidence=0.9),
        pair(3, "a" * 60, "b" * 50, source="y"),
    ]
    found = report_of(pairs, [(1, 0), (0, 1), (0, 1), (1, 0)])
    assert {k: (m.numerator, m.denominator) for k, m in found.by_source.items()} == {"x": (1, 2), "y": (1, 2)}
    assert {k: m.numerator for k, m in found.by_length.items()} == {
        "chosen under half as long": 0,
        "about equal": 0,
        "chosen longer": 1,
        "chosen over twice as long": 1,
    }
    assert {k: (m.numerator, m.denominator) for k, m in found.by_confidence.items()} == {"0.1": (1, 2), "0.9": (0, 1)}
    assert report_of([pair(0), pair(1)], [(1, 0), (1, 0)]).by_source == {}, "one file is no grouping"


def test_a_model_that_prefers_length_is_found_and_one_that_does_not_is_not() -> None:
    """Labels prefer the longer answer in half of the pairs."""
    long, short = "word " * 30, "word " * 5
    pairs = [pair(i, *((long, short) if i % 2 else (short, long))) for i in range(80)]
    biased = ByHand(len).on(pairs)
    assert biased.length is not None
    assert (biased.length.model.value, biased.length.labels.value) == (1.0, 0.5)
    assert "length" in biased.found
    assert biased.by_length["chosen under half as long"].value == 0.0
    fair = report_of(pairs, [(1.0, 0.0)] * 80)
    assert fair.length is not None
    assert (fair.length.model.value, fair.length.found, fair.accuracy.value) == (0.5, False, 1.0)
    assert abs(fair.length.correlation) < 1e-9
    against = ByHand(lambda text: -len(text)).on(pairs)
    assert "length" in against.found, "a preference for short answers is a bias too"
    assert against.length is not None
    assert against.length.correlation == pytest.approx(-1.0)


def test_the_correlation_with_length_by_hand() -> None:
    """Scores apart by 2 and −1, lengths by 30 and 20: (60 − 20) / √(5 · 1,300)."""
    pairs = [pair(0, "a" * 40, "b" * 10), pair(1, "a" * 40, "b" * 20)]
    found = report_of(pairs, [(2.0, 0.0), (0.0, 1.0)]).length
    assert found is not None
    assert found.correlation == pytest.approx(40 / math.sqrt(5 * 1300))


def test_quarters_of_confidence_by_hand() -> None:
    """Confidences 0 to 7: two pairs in each quarter, of which the second ones are wrong in the upper half."""
    pairs = [pair(i, confidence=float(i)) for i in range(8)]
    found = report_of(pairs, [(1, 0)] * 5 + [(0, 1), (1, 0), (0, 1)]).by_confidence
    assert {name: (m.numerator, m.denominator) for name, m in found.items()} == {
        "1: lowest quarter": (2, 2), "2: second": (2, 2), "3: third": (1, 2), "4: highest quarter": (1, 2)
    }  # fmt: skip


def test_a_rise_too_small_to_matter_is_no_bias() -> None:
    """It always raises the score, by a hundredth of what scores differ by."""
    pairs = [pair(i, f"One thing {i}. Another thing.", "Nothing.") for i in range(40)]
    hardly = ByHand(lambda text: sum(map(int, filter(str.isdigit, text))) + 0.01 * text.startswith(PREAMBLE)).on(pairs)
    probe = next(p for p in hardly.probes if p.name == "preamble")
    assert (probe.rises.value, probe.found) == (1.0, False)
    assert 0 < probe.change_sd < 0.1


def test_probes_find_a_preamble_and_bullets_and_nothing_where_nothing_is() -> None:
    pairs = [pair(i, f"One thing {i}. Another thing. A third.", "Nothing.") for i in range(40)]
    polite = ByHand(lambda text: sum(map(int, filter(str.isdigit, text))) + 9.0 * text.startswith(PREAMBLE)).on(pairs)
    marked = ByHand(lambda text: 3.0 * text.count("\n- ") + len(set(text))).on(pairs)
    assert polite.found == ("preamble",)
    assert "markdown" in marked.found
    probes = {p.name: p for p in ByHand(lambda text: float("thing" in text)).on(pairs).probes}
    assert (probes["preamble"].change_sd, probes["preamble"].found) == (0.0, False)
    assert probes["preamble"].rises.value == 0.5, "no change is half a rise"
    flat = {name: v for name, v in polite.metrics().items() if name.startswith("probe_")}
    assert flat["probe_preamble_change_sd"] > 0.5


def test_probes_of_steps_speak_of_the_score_that_is_used() -> None:
    """The least of the steps. Bullets make more of them, all better than that one: the score stays what it was."""

    class BySteps(ByHand):
        def answers(self, asked: Sequence[Answer]) -> list[Verdict]:
            found = [[self.score(line) for line in a.text.splitlines()] for a in asked]
            return [Verdict(min(1 / (1 + math.exp(-s)) for s in steps), (*steps, 5.0)) for steps in found]

    pairs = [pair(i, f"One thing {i}. Another thing. A third.", "Nothing.") for i in range(40)]
    probes = {p.name: p for p in BySteps(lambda text: float("bad" not in text)).on(pairs).probes}
    assert (probes["markdown"].change_sd, probes["markdown"].found) == (0.0, False)


def test_a_report_is_json_and_lines() -> None:
    found = ByHand(len).on([pair(i, "long " * (i + 2), "short") for i in range(12)])
    assert json.loads(json.dumps(found.as_dict()))["accuracy"]["numerator"] == 12
    said = "\n".join(found.lines())
    for part in ("accuracy 100.0 %", "calibration error", "prefers the longer answer in 100.0 %", "preamble: raises"):
        assert part in said


# --- the suite file ----------------------------------------------------------------------------------------------

FILE = "name: held\nkind: pairs\nitems: rows.jsonl\n"


def load(folder: Path, text: str, rows: Sequence[dict[str, object]]) -> Suite:
    (folder / "s.yaml").write_text(text)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_suite(folder / "s.yaml", Path)


def test_a_suite_of_pairs_is_read_with_what_its_rows_say(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "source": "web", "confidence": 0.7, "margin": 2}]
    found = load(tmp_path, FILE, rows)
    (only,) = found.pairs
    assert (only.source, only.confidence, only.margin) == ("web", 0.7, 2.0)
    assert [item.id for item in found.items] == [only.id]
    other = load(tmp_path, FILE, [rows[0] | {"chosen": "c"}])
    assert other.fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE + "score: [math]\n", r"s\.yaml:4: score is set but never read"),
        (FILE + "sampling: {temperature: 1.0}\n", r"s\.yaml:4: sampling is set but never read"),
        (FILE + "must_finish: false\n", r"s\.yaml:4: must_finish is set but never read"),
    ],
)
def test_keys_that_pairs_do_not_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, text, [{"prompt": "q", "chosen": "a", "rejected": "b"}])


def test_a_suite_of_pairs_loses_no_row(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    with pytest.raises(DataError, match=r"a suite loses no row.*identical"):
        load(tmp_path, FILE, rows)


def test_a_reward_model_s_score_is_not_called_accuracy(tmp_path: Path) -> None:
    text = "name: a\nitems: rows.jsonl\nscore: [math, {reward_model: {model: judge}}]\n"
    with pytest.raises(DataError, match="score names a reward model"):
        load(tmp_path, text, [{"prompt": "q", "answer": "1"}])
