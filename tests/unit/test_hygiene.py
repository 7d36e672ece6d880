"""Faults planted here: rows that repeat others, labels that contradict each other, length bias."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import datasketch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.hygiene.duplicates import Content, Rules, content, find_duplicates
from posttrain.data.hygiene.labels import conflicts
from posttrain.data.hygiene.minhash import rows_per_band, shingles
from posttrain.data.hygiene.screens import Repetition
from posttrain.data.ledger import Bucket, Entry
from posttrain.data.prepare import Lost, _screened
from posttrain.errors import DataError
from posttrain.methods.screens import PairLengths
from posttrain.records import Example, Message, Pair, Rated, Row, Stepwise, Task


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def pair(row_id: str, chosen: str, rejected: str, prompt: str = "Hi") -> Pair:
    return Pair(row_id, user(prompt), said(chosen), said(rejected))


def rated(row_id: str, answer: str, good: bool) -> Rated:
    return Rated(row_id, user("Hi"), said(answer), good)


def example(row_id: str, prompt: str, answer: str) -> Example:
    return Example(row_id, user(prompt) + said(answer))


def duplicates(rows: Sequence[Row], **rules: object) -> dict[str, str]:
    found = find_duplicates(lambda: map(content, rows), Rules(**rules))  # type: ignore[arg-type]
    return {row_id: str(one) for row_id, one in found.items()}


def texts(*said: str) -> list[Content]:
    return [Content(f"f:{i}", "f", (text,)) for i, text in enumerate(said)]


def test_exact_duplicates_differ_in_white_space_and_composition_only() -> None:
    rows = [
        example("f:1", "Où est le café ?", "Ici."),
        example("f:2", "Où  est le\n cafe\u0301 ?", " Ici."),
        example("f:3", "où est le café ?", "Ici."),
        example("f:4", "Où est le café ?", "Là."),
        example("f:5", "Où est le café ?", "Ici."),
    ]
    assert duplicates(rows, near=None) == {"f:2": "duplicate of f:1", "f:5": "duplicate of f:1"}
    assert set(duplicates(rows, near=None, ignore_case=True)) == {"f:2", "f:3", "f:5"}


def test_what_makes_two_rows_the_same_depends_on_their_kind() -> None:
    steps = ("one", "two")
    rows: list[Row] = [
        pair("p:1", "a", "b"), pair("p:2", "b", "a"), pair("p:3", "a", "b"),
        Rated("r:1", user("q"), said("a"), True), Rated("r:2", user("q"), said("a"), False),
        Rated("r:3", user("q"), said("a"), True),
        Stepwise("s:1", user("q"), steps, (True, False)), Stepwise("s:2", user("q"), steps, (True, True)),
        Stepwise("s:3", user("q"), steps, (True, False)),
        Task("t:1", user("q"), "1", {"id": 1}), Task("t:2", user("q"), "2"), Task("t:3", user("q"), "1", {"id": 3}),
        Example("e:1", text="q"), Example("e:2", user("q") + said("a")), Example("e:3", text="q"),
    ]  # fmt: skip
    by_kind = [[row for row in rows if row.id.startswith(kind)] for kind in "prste"]
    assert [set(duplicates(kind)) for kind in by_kind] == [{"p:3"}, {"r:3"}, {"s:3"}, {"t:3"}, {"e:3"}]


def test_within_and_across_sources() -> None:
    long = "The quick brown fox jumps over the lazy dog near the old mill by the river every single morning"
    rows = [example(i, long + end, "ok") for i, end in (("a:1", ""), ("b:1", ""), ("b:2", "!"), ("a:2", "?"))]
    assert duplicates(rows) == {
        "b:1": "duplicate of a:1",
        "b:2": "near-duplicate of a:1 (0.94)",
        "a:2": "near-duplicate of a:1 (0.94)",
    }
    assert duplicates(rows, across=False) == {
        "b:2": "near-duplicate of b:1 (0.94)",
        "a:2": "near-duplicate of a:1 (0.94)",
    }


def test_the_jaccard_index_by_hand_at_the_threshold() -> None:
    # Shingles of two words: ab bc cd de | ab bc cd dx: 3 shared of 5 = 0.6.
    one, other = texts("a b c d e", "a b c d x")
    assert find_duplicates(lambda: [one, other], Rules(near=0.6, shingle=2))["f:1"].jaccard == pytest.approx(0.6)
    assert not find_duplicates(lambda: [one, other], Rules(near=0.61, shingle=2))


def test_every_part_must_be_near() -> None:
    long = "Read the following text with great care and then answer in one word what its author would have said. " * 3
    rows = [
        example("f:1", long, "yes"),
        example("f:2", long + "Please.", "no"),
        pair("g:1", long, "b"),
        pair("g:2", "b", long),
    ]
    assert duplicates(rows[:2], near=0.5) == {}
    assert duplicates(rows[2:], near=0.5) == {}, "the opposite of a pair is no duplicate of it"
    assert set(duplicates([rows[0], example("f:3", long + "Please.", "Yes")], near=0.8)) == {"f:3"}


def test_the_first_stays_and_a_chain_does_not_pull_in_what_is_far_from_it() -> None:
    word = [f"{first}{second}" for first in "abcdefgh" for second in "abcdefghi"]  # 72 of them
    a, b, c = word[:60], word[6:66], word[12:]
    found = find_duplicates(lambda: texts(*map(" ".join, (a, b, c, b))), Rules(near=0.75, shingle=1))
    assert {i: (d.of, round(d.jaccard or 1, 2)) for i, d in found.items()} == {
        "f:1": ("f:0", 0.82),  # 54 of 66
        "f:3": ("f:1", 1),
    }, "c is near b, which goes, and not near a (48 of 72), which stays"


def planted(rng: Random, jaccard: float, n: int = 120) -> tuple[str, str]:
    """Two texts of words of their own whose sets of words have this Jaccard index."""
    shared = round(2 * n * jaccard / (1 + jaccard))
    words = [f"{rng.getrandbits(40):x}g" for _ in range(2 * n - shared)]
    words = ["".join(chr(97 + int(c, 36) % 26) for c in word) for word in words]
    one, other = words[:n], words[n - shared :]
    rng.shuffle(one)
    rng.shuffle(other)
    return " ".join(one), " ".join(other)


@pytest.mark.parametrize("jaccard", [0.8, 0.9])
def test_recall_of_planted_near_duplicates(jaccard: float) -> None:
    rng = Random(jaccard)
    rows = texts(*(text for _ in range(400) for text in planted(rng, jaccard)))
    indices = [set(a.parts[0].split()) for a in rows]
    true = {
        rows[i + 1].id
        for i in range(0, 800, 2)
        if len(indices[i] & indices[i + 1]) / len(indices[i] | indices[i + 1]) >= 0.8
    }
    found = set(find_duplicates(lambda: rows, Rules(near=0.8, shingle=1)))
    assert len(true) >= 150
    assert len(found & true) / len(true) >= 0.97
    assert found <= true, "what is less alike stays"


def test_nothing_below_the_threshold_goes() -> None:
    rng = Random(7)
    rows = texts(*(text for _ in range(300) for text in planted(rng, 0.76)))
    assert not find_duplicates(lambda: rows, Rules(near=0.8, shingle=1))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_promise_recall_at_any_threshold(threshold: float) -> None:
    r = rows_per_band(threshold)
    assert 1 - (1 - threshold**r) ** (128 // r) >= 0.99
    assert r == 128 or 1 - (1 - threshold ** (r + 1)) ** (128 // (r + 1)) < 0.99


def test_the_same_pairs_as_datasketch_finds() -> None:
    """Somebody else's MinHash and its LSH, at the same banding, verified with sets."""
    rng = Random(11)
    rows = texts(*(text for j in (0.5, 0.7, 0.85, 0.95) for _ in range(20) for text in planted(rng, j, 60)))
    lsh = datasketch.MinHashLSH(num_perm=128, params=(18, 7))
    kept: dict[str, set[str]] = {}
    theirs = set()
    for row in rows:
        words = set(row.parts[0].split())
        sketch = datasketch.MinHash(num_perm=128)
        sketch.update_batch([word.encode() for word in words])
        if any(len(words & kept[i]) / len(words | kept[i]) >= 0.8 for i in lsh.query(sketch)):
            theirs.add(row.id)
        else:
            kept[row.id] = words
            lsh.insert(row.id, sketch)
    assert set(find_duplicates(lambda: rows, Rules(near=0.8, shingle=1))) == theirs
    assert len(theirs) == 40


def test_signs_count_in_near_duplicates_of_code() -> None:
    assert set(shingles("f(a) < b", 2).tolist()) != set(shingles("f[a] > b", 2).tolist())
    assert len(shingles("", 3)) == len(shingles("!", 3)) == 1
    assert shingles("!", 3) != shingles("?", 3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab ", min_size=0, max_size=12), max_size=30))
def test_what_stays_holds_no_duplicates_and_what_goes_has_one_that_stays(said: list[str]) -> None:
    rows = texts(*said)
    found = find_duplicates(lambda: rows, Rules(near=0.8, shingle=2))
    again = [row for row in rows if row.id not in found]
    assert not find_duplicates(lambda: again, Rules(near=None))
    assert {" ".join(row.parts[0].split()) for row in again} <= {" ".join(text.split()) for text in said}
    chain = {d.of for d in found.values() if d.jaccard is not None}
    assert chain.isdisjoint(found)


def test_conflicts_of_each_kind_are_found_on_both_sides() -> None:
    rows: list[Row] = [
        pair("p:1", "a", "b"), pair("p:2", "b", " a"), pair("p:3", "a", "c"), pair("p:4", "a", "b", "Hey"),
        Rated("r:1", user("q"), said("a"), True), Rated("r:2", user("q"), said("a"), True),
        Rated("r:3", user("q"), said("a"), False), Rated("r:4", user("q"), said("b"), False),
        Stepwise("s:1", user("q"), ("x", "y"), (True, True)), Stepwise("s:2", user("q"), ("x", "y"), (True, False)),
        Task("t:1", user("q"), "1"), Task("t:2", user("q"), "2"), Task("t:3", user("q"), None),
        example("e:1", "q", "a"), example("e:2", "q", "b"),
    ]  # fmt: skip
    found = {c.id: c.other for c in conflicts(rows)}
    assert found == {
        "p:1": "p:2", "p:2": "p:1", "r:1": "r:3", "r:2": "r:3", "r:3": "r:1",
        "s:1": "s:2", "s:2": "s:1", "t:1": "t:2", "t:2": "t:1",
    }  # fmt: skip


def test_swapped_pairs_and_length_bias_are_told() -> None:
    rows = [pair("a", "long answer", "short"), pair("b", "short", "long answer"), pair("c", "abc", "a")]
    assert [c.id for c in conflicts(rows)] == ["a", "b"]
    lengths = PairLengths()
    assert [(row.id, verdict) for row, verdict in lengths(iter(rows))] == [("a", None), ("b", None), ("c", None)]
    assert lengths.notes() == ("3 pairs: chosen is longer in 67%, shorter in 33%",)


def test_pairs_and_thumbs_contradict_each_other_where_they_judge_one_answer() -> None:
    """Pairs alone do not: an answer may win over one and lose to another."""
    pairs = [pair("p:1", "a", "b"), pair("p:2", "b", "c"), pair("p:3", "x", "y")]
    assert conflicts(pairs) == []
    thumbs = [rated("r:1", "a", False), rated("r:2", "y", True), rated("r:3", "x", True), rated("r:4", "z", False)]
    expected = {"p:1": "r:1", "r:1": "p:1", "p:3": "r:2", "r:2": "p:3"}
    for rows in (pairs + thumbs, thumbs + pairs):
        found = conflicts(rows)
        assert {c.id: c.other for c in found} == expected
        assert [c.id for c in found] == [row.id for row in rows if row.id in expected]
        assert {c.what for c in found} == {"the same answer, preferred in a pair and rated the other way"}


ROWS = [pair("p:1", "a", "b"), pair("p:2", "b", "a"), pair("p:3", "c", "d"), pair("p:4", "c", "d")]


def test_conflicts_and_duplicates_are_counted_where_the_recipe_says_nothing() -> None:
    screen = Repetition(None, "report")
    assert [(row.id, verdict) for row, verdict in screen(ROWS)] == [(row.id, None) for row in ROWS]
    assert screen.notes() == [
        "1 rows are duplicates (1 exact) and stay; set dedup to leave them out: p:4 is duplicate of p:3",
        "2 rows contradict another row and stay; set on_conflict: drop or error: p:1 and p:2: the same two answers, "
        "preferred the other way round",
    ]


def test_conflicts_and_duplicates_are_left_out_with_their_reasons() -> None:
    screen = Repetition(Rules(), "drop")
    verdicts = [verdict and (verdict.bucket, verdict.reason) for _, verdict in screen(ROWS)]
    conflict = (Bucket.DROPPED, "label conflict")
    assert verdicts == [conflict, conflict, None, (Bucket.DUPLICATE, "duplicate of p:3")]
    with pytest.raises(DataError, match=r"p:1: 2 rows contradict another row \(2 × the same two answers, preferred"):
        list(Repetition(None, "error")(ROWS))


def test_screens_in_turn_keep_the_order_and_the_first_verdict() -> None:
    """As rows are prepared: what was lost before goes through a screen untouched."""
    lost = Lost("lost", Entry(Bucket.DROPPED, "empty answer"))
    first, second = Repetition(None, "drop"), Repetition(Rules(), "report")
    found = list(_screened(_screened(iter([*ROWS[:3], lost, ROWS[3]]), first), second))
    assert [item.id for item in found] == ["p:1", "p:2", "p:3", "lost", "p:4"]
    fates = [str(item.entry.bucket) if isinstance(item, Lost) else None for item in found]
    assert fates == ["dropped", "dropped", None, "dropped", "duplicate"]
    assert found[3] == lost
