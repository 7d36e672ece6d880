from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_help import shared

from posttrain.data.formats import read_pairs
from posttrain.data.ledger import Bucket, Ledger, fit
from posttrain.errors import DataError
from posttrain.records import Branch, Tree
from posttrain.settings import DatasetSettings


def tree(row_id: str, prompt: int, *answers: int) -> Tree:
    """A tree of so many tokens; each answer's tokens differ from the other's."""
    branches = tuple(Branch(tuple(range(100 * i, 100 * i + n)), (True,) * n) for i, n in enumerate(answers, start=1))
    return Tree(row_id, tuple(range(prompt)), branches)


def test_each_row_ends_in_exactly_one_bucket(tmp_path: Path) -> None:
    ledger = Ledger(["a", "b", "c"])
    ledger.put("c", Bucket.TRAINED)
    ledger.put("a", Bucket.DROPPED, "empty answer")
    with pytest.raises(AssertionError, match="1 of 3 rows are in no bucket, first b"):
        ledger.check()
    with pytest.raises(AssertionError, match="already trained"):
        ledger.put("c", Bucket.EVALUATED)
    with pytest.raises(AssertionError, match="never read"):
        ledger.put("d", Bucket.TRAINED)
    with pytest.raises(AssertionError, match="share an id"):
        Ledger(["a", "a"])
    ledger.put("b", Bucket.TRUNCATED, "9 tokens cut to 8")
    assert ledger.summary() == "3 rows: 1 trained, 1 truncated, 1 dropped (1 empty answer)"
    ledger.write(tmp_path / "rows.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(line["id"], line["bucket"]) for line in lines] == [("a", "dropped"), ("b", "truncated"), ("c", "trained")]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# Fault: rows cut or dropped by a default length.


def test_an_overflow_is_an_error_that_names_row_length_and_remedy() -> None:
    trees = [tree("a", 4, 4), tree("b", 4, 5), tree("c", 4, 8, 2)]
    with pytest.raises(DataError) as fault:
        fit(trees, 8, "error", 0.05, Ledger("abc"))
    assert str(fault.value) == (
        "b: the row is 9 tokens long, max_length is 8. 2 of 3 rows are longer; the longest is c with 12. "
        "Set max_length: 12, or on_overflow: drop or truncate."
    )
    assert fit(trees, 12, "error", 0.0, Ledger("abc")) == trees


def test_dropping_is_counted_and_bounded() -> None:
    trees = [tree("a", 4, 4), tree("b", 4, 5), tree("c", 4, 8)]
    ledger = Ledger("abc")
    assert fit(trees, 8, "drop", 0.7, ledger) == trees[:1]
    assert ledger.summary() == "3 rows: 1 trained, 2 dropped (2 longer than 8 tokens)"
    with pytest.raises(DataError, match=r"b: 2 of 3 rows \(66.7%\) are dropped, more than max_drop_rate 60.0%"):
        fit(trees, 8, "drop", 0.6, Ledger("abc"))
    with pytest.raises(DataError, match="none of 3 rows is left: 3 longer than 2 tokens"):
        fit(trees, 2, "drop", 1.0, Ledger("abc"))


def test_truncation_cuts_answers_and_keeps_both_of_a_pair() -> None:
    long = tree("a", 5, 4, 2)
    unmarked = Tree("b", (1, 2, 3), (Branch(tuple(range(9)), (False,) * 6 + (True,) * 3),))
    ledger = Ledger("abcd")
    kept = fit([long, unmarked, tree("c", 9, 1), tree("d", 1, 1)], 8, "truncate", 0.5, ledger, bucket=Bucket.EVALUATED)
    assert [k.id for k in kept] == ["a", "d"]
    assert kept[0].trunk_ids == long.trunk_ids
    assert [b.token_ids for b in kept[0].branches] == [(100, 101, 102), (200, 201)]
    assert all(len(b.token_ids) == len(b.scored) for b in kept[0].branches)
    assert ledger.summary() == "4 rows: 1 evaluated, 1 truncated, 2 dropped (2 no room for an answer)"


def test_a_pair_that_differs_only_behind_the_cut_is_dropped() -> None:
    branches = (Branch((1, 2, 3, 4), (True,) * 4), Branch((1, 2, 3, 5), (True,) * 4))
    ledger = Ledger("ab")
    fit([Tree("a", (9,), branches), tree("b", 1, 1)], 4, "truncate", 0.5, ledger)
    assert ledger.summary() == "2 rows: 1 trained, 1 dropped (1 answers identical once cut)"


def test_what_the_format_dropped_is_in_the_ledger() -> None:
    loaded = read_pairs([DatasetSettings(path="hh-harmless-test.jsonl.gz")], lambda p: shared(f"data/{p}"))
    ledger = Ledger.of(loaded)
    for pair in loaded.rows:
        ledger.put(pair.id, Bucket.TRAINED)
    assert ledger.summary() == "2,312 rows: 2,308 trained, 4 dropped (4 empty answer)"
