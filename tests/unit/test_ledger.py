from __future__ import annotations

import io
import json
from collections import Counter

import pytest
from data_help import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.formats import stream
from posttrain.data.ledger import Bucket, Counts, Entry, Ledger, Lost, source_of
from posttrain.data.length import Lengths, Long, Overflow, fit, overflow
from posttrain.data.prepare import refuse_losses
from posttrain.errors import DataError
from posttrain.records import Branch, Pair, Tree
from posttrain.settings import DatasetSettings


def tree(row_id: str, prompt: int, *answers: int) -> Tree:
    """A tree of so many tokens; each answer's tokens differ from the other's."""
    branches = tuple(Branch(tuple(range(100 * i, 100 * i + n)), (True,) * n) for i, n in enumerate(answers, start=1))
    return Tree(row_id, tuple(range(prompt)), branches)


def ledger_of(*ids: str) -> tuple[Ledger, io.StringIO]:
    """A ledger that has seen these ids come in."""
    out = io.StringIO()
    ledger = Ledger(out)
    list(ledger.reading(Lost(row_id, Entry(Bucket.TRAINED)) for row_id in ids))
    return ledger, out


def test_counts_reasons_and_lines_by_hand() -> None:
    ledger, out = ledger_of("a.jsonl:1", "a.jsonl:2", "b:x.jsonl:1", "a.jsonl:3")
    ledger.put("a.jsonl:1", Entry(Bucket.TRAINED, n_scored=7))
    ledger.put("a.jsonl:2", Entry(Bucket.DROPPED, "empty answer"))
    ledger.put("b:x.jsonl:1", Entry(Bucket.TRUNCATED, "9 tokens cut to 8", 3))
    ledger.put("a.jsonl:3", Entry(Bucket.TRAINED, n_scored=5))
    counts = ledger.close()
    assert counts.summary() == "4 rows: 2 trained, 1 truncated, 1 dropped (1 empty answer)"
    assert counts.supervised_tokens == 15
    assert {label: (dict(s.buckets), s.supervised_tokens) for label, s in counts.sources.items()} == {
        "a.jsonl": ({"trained": 2, "dropped": 1}, 12),
        "b:x.jsonl": ({"truncated": 1}, 3),
    }
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["id"], line["bucket"]) for line in lines] == [
        ("a.jsonl:1", "trained"),
        ("a.jsonl:2", "dropped"),
        ("b:x.jsonl:1", "truncated"),
        ("a.jsonl:3", "trained"),
    ]
    assert Counts.from_dict(json.loads(json.dumps(counts.as_dict()))) == counts


# Fault: a row that is lost on the way, counted twice, or invented.


def test_a_row_that_gets_lost_fails_the_run() -> None:
    ledger, _ = ledger_of("a:1", "a:2")
    ledger.put("a:1", Entry(Bucket.TRAINED))
    with pytest.raises(AssertionError, match="2 rows of a were read, 1 are in a bucket"):
        ledger.close()


def test_a_row_in_two_buckets_or_from_nowhere_fails_the_run() -> None:
    ledger, _ = ledger_of("a:1", "a:2")
    ledger.put("a:1", Entry(Bucket.TRAINED))
    ledger.put("a:1", Entry(Bucket.DUPLICATE, "of a:0"))
    with pytest.raises(AssertionError, match="two buckets"):
        ledger.close()
    ledger, _ = ledger_of("a:1")
    ledger.put("a:1", Entry(Bucket.TRAINED))
    ledger.put("b:1", Entry(Bucket.TRAINED))
    with pytest.raises(AssertionError, match="0 rows of b were read, 1 are in a bucket"):
        ledger.close()
    with pytest.raises(AssertionError, match="without a reason"):
        ledger.put("a:1", Entry(Bucket.DROPPED))


FATES = st.tuples(
    st.sampled_from(["a.jsonl", "b.jsonl", "data/c:2.jsonl"]),
    st.sampled_from(list(Bucket)),
    st.sampled_from(["too long", "empty answer"]),
    st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(FATES, max_size=60), st.floats(0, 1))
def test_counts_always_add_up(fates: list[tuple[str, Bucket, str, int]], rate: float) -> None:
    """Against plain counting, whatever becomes of the rows."""
    ids = [f"{source}:{i}" for i, (source, *_) in enumerate(fates)]
    ledger, out = ledger_of(*ids)
    for row_id, (_, bucket, reason, n_scored) in zip(ids, fates, strict=True):
        ledger.put(row_id, Entry(bucket, reason, n_scored))
    counts = ledger.close()
    assert counts.n_rows == len(fates) == len(out.getvalue().splitlines())
    assert counts.buckets == {k: n for k, n in Counter(str(b) for _, b, _, _ in fates).items() if n}
    assert (
        counts.supervised_tokens
        == sum(n for *_, n in fates)
        == sum(s.supervised_tokens for s in counts.sources.values())
    )
    by_source = Counter((source, str(bucket)) for source, bucket, _, _ in fates)
    assert {(s, b): n for s, found in counts.sources.items() for b, n in found.buckets.items()} == by_source
    n_dropped = sum(bucket is Bucket.DROPPED for _, bucket, _, _ in fates)
    assert sum(counts.reasons.values()) == n_dropped
    if n_dropped > rate * len(fates):
        with pytest.raises(DataError, match="max_drop_rate"):
            counts.check_drop_rate(rate)
    else:
        counts.check_drop_rate(rate)


def test_what_the_format_dropped_comes_in_as_dropped() -> None:
    rows = stream([DatasetSettings(path="hh-harmless-test.jsonl.gz")], lambda p: shared(f"data/{p}"), Pair)
    reasons = Counter(getattr(row, "reason", "kept") for row in rows)
    assert reasons == {"kept": 2308, "empty answer": 4}
    assert [source.n_read for source in rows.sources] == [2312]


def test_the_source_of_a_row_is_what_stands_before_its_number() -> None:
    assert source_of("openai/gsm8k:train:17") == "openai/gsm8k:train"


# Fault: rows cut or dropped by a default length.


def test_an_overflow_is_an_error_that_names_row_length_and_remedy() -> None:
    trees = [tree("a", 4, 4), tree("b", 4, 5), tree("c", 4, 8, 2)]
    found = overflow(trees[:1], 8) + overflow(trees[1:2], 8) + overflow(trees[2:], 8)
    assert found == overflow(trees, 8) == Overflow(2, Long("b", 9), Long("c", 12))
    with pytest.raises(DataError) as fault:
        found.refuse(8, 3, Lengths.of(trees))
    assert str(fault.value) == (
        "b: the row is 9 tokens long, max_length is 8. 2 of 3 rows are longer; the longest is c with 12. "
        "Of all, tokens at 50 / 90 / 99 / 100 %: rows 9 / 12 / 12 / 12; prompts 4 / 4 / 4 / 4; answers 4 / 8 / 8 / 8. "
        "Set max_length: 12, or on_overflow: drop or truncate."
    )
    overflow(trees, 12).refuse(12, 3, Lengths.of(trees))


def test_dropping_names_its_reason_and_is_bounded() -> None:
    long = tree("a:2", 4, 5)
    assert fit(tree("a:1", 4, 4), 8, "drop", Bucket.TRAINED) == (tree("a:1", 4, 4), Entry(Bucket.TRAINED, "", 4))
    assert fit(long, 8, "drop", Bucket.TRAINED) == (None, Entry(Bucket.DROPPED, "longer than 8 tokens"))
    ledger, _ = ledger_of("a:1", "a:2", "a:3")
    ledger.put("a:1", Entry(Bucket.TRAINED))
    for row_id in ("a:2", "a:3"):
        ledger.put(row_id, Entry(Bucket.DROPPED, "longer than 8 tokens"))
    counts = ledger.close()
    refuse_losses(counts, 0.7)
    with pytest.raises(DataError, match=r"a:2: 2 of 3 rows \(66.7%\) are dropped, more than max_drop_rate 60.0%"):
        refuse_losses(counts, 0.6)
    ledger, _ = ledger_of("a:1")
    ledger.put("a:1", Entry(Bucket.DROPPED, "longer than 2 tokens"))
    with pytest.raises(DataError, match="none of 1 rows is left: 1 longer than 2 tokens"):
        refuse_losses(ledger.close(), 1.0)


def test_truncation_cuts_answers_and_keeps_both_of_a_pair() -> None:
    long = tree("a", 5, 4, 2)
    short, entry = fit(long, 8, "truncate", Bucket.EVALUATED)
    assert entry == Entry(Bucket.TRUNCATED, "9 tokens cut to 8", 5)
    assert short is not None
    assert short.trunk_ids == long.trunk_ids
    assert [b.token_ids for b in short.branches] == [(100, 101, 102), (200, 201)]
    assert all(len(b.token_ids) == len(b.scored) for b in short.branches)
    unmarked = Tree("b", (1, 2, 3), (Branch(tuple(range(9)), (False,) * 6 + (True,) * 3),))
    nothing = (None, Entry(Bucket.DROPPED, "no room for an answer"))
    assert fit(unmarked, 8, "truncate", Bucket.TRAINED) == nothing
    assert fit(tree("c", 9, 1), 8, "truncate", Bucket.TRAINED) == nothing


def test_a_pair_that_differs_only_behind_the_cut_is_dropped() -> None:
    pair = Tree("a", (9,), (Branch((1, 2, 3, 4), (True,) * 4), Branch((1, 2, 3, 5), (True,) * 4)))
    assert fit(pair, 4, "truncate", Bucket.TRAINED) == (None, Entry(Bucket.DROPPED, "answers identical once cut"))


def test_a_prompt_needs_room_for_the_answer_it_will_get() -> None:
    prompt = Tree("a", (1, 2, 3), ())
    assert fit(prompt, 8, "drop", Bucket.TRAINED, room=5)[0] == prompt
    assert fit(prompt, 7, "drop", Bucket.TRAINED, room=5) == (None, Entry(Bucket.DROPPED, "longer than 7 tokens"))
    assert overflow([prompt], 7, room=5).first == Long("a", 8)
