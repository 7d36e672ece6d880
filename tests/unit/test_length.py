"""Lengths by percentile, and what becomes of a row that is too long: a cut answer stays open, and is counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import go, recipe, refused, rows, sft, small_data, tiny_base

from posttrain.data.ledger import Bucket, Entry
from posttrain.data.length import PERCENTILES, Lengths, fit, length, percentile
from posttrain.records import Branch, Tree


def tree(trunk: int, *branches: tuple[int, int]) -> Tree:
    """Each branch: so many tokens without loss, then so many with it. No two tokens of the tree are alike."""
    ids = iter(range(10_000))
    cut = [
        Branch(tuple(next(ids) for _ in range(context + answer)), (False,) * context + (True,) * answer)
        for context, answer in branches
    ]
    return Tree("r:1", tuple(next(ids) for _ in range(trunk)), tuple(cut))


def test_percentiles_by_hand() -> None:
    trees = [tree(2, (0, n)) for n in range(1, 101)]
    assert Lengths.of(trees).percentiles() == {
        "rows": {"50": 52, "90": 92, "99": 101, "100": 102},
        "prompts": {"50": 2, "90": 2, "99": 2, "100": 2},
        "answers": {"50": 50, "90": 90, "99": 99, "100": 100},
    }
    prompt = Tree("t:1", (1, 2, 3), ())
    assert str(Lengths.of([prompt], room=10)) == (
        "tokens at 50 / 90 / 99 / 100 %: rows 13 / 13 / 13 / 13; prompts 3 / 3 / 3 / 3"
    )


@given(st.lists(st.integers(0, 50), min_size=1), st.lists(st.integers(0, 50)))
def test_percentiles_are_those_of_numpy_and_add_up(first: list[int], second: list[int]) -> None:
    ours = Lengths.of([tree(n, (0, 1)) for n in first]) + Lengths.of([tree(n, (0, 1)) for n in second])
    for p in PERCENTILES:
        assert percentile(ours.prompts, p) == np.percentile([*first, *second], p, method="inverted_cdf")


def test_a_cut_answer_stays_open() -> None:
    long = tree(4, (0, 8))
    short, entry = fit(long, 10, "truncate", Bucket.TRAINED)
    assert short is not None and length(short) == 10
    assert short.branches[0].token_ids == long.branches[0].token_ids[:6]
    assert entry == Entry(Bucket.TRUNCATED, "12 tokens cut to 10", 6)


def test_of_a_long_conversation_the_answers_that_fit_are_kept() -> None:
    """Where each answer has a branch, a late one may have no room; of a pair both must."""
    talk = tree(4, (0, 3), (9, 3))
    short, entry = fit(talk, 12, "truncate", Bucket.TRAINED, together=False)
    assert short == Tree("r:1", talk.trunk_ids, talk.branches[:1])
    assert entry == Entry(Bucket.TRUNCATED, "16 tokens cut to 12, 1 of 2 answers left out", 3)
    assert fit(talk, 12, "truncate", Bucket.TRAINED) == (None, Entry(Bucket.DROPPED, "no room for an answer"))
    assert fit(talk, 4, "truncate", Bucket.TRAINED, together=False)[0] is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions whose answers have 3, 3 and very many tokens."""
    folder = tmp_path_factory.mktemp("lengths")
    tiny_base(folder / "base")
    small_data(folder)
    answers = ["ok", "ok", "well " * 100]
    rows(folder / "sft.jsonl", [{"prompt": "Fine?", "completion": answer} for answer in answers])
    return folder


SAID = (
    "tokens at 50 / 90 / 99 / 100 %: rows 20 / 219 / 219 / 219; prompts 17 / 17 / 17 / 17; answers 3 / 202 / 202 / 202"
)


def test_a_run_says_how_long_rows_are_and_how_many_answers_stay_open(place: Path) -> None:
    written = recipe(place, sft(on_overflow="truncate", max_steps=1, max_length=64))
    _, lines = go(written, place / "home")
    (said,) = (line for line in lines if "tokens at" in line)
    assert said == f"1-sft: {SAID}"
    assert any("2 of 3 answers end with <|im_end|>, where sampling stops; 1 were cut and stay open" in x for x in lines)


def test_when_most_answers_would_be_cut_the_run_is_refused(place: Path) -> None:
    rows(place / "long.jsonl", [{"prompt": "Fine?", "completion": a} for a in ("ok", "well " * 100, "now " * 100)])
    error = refused(place, sft(datasets=[{"path": "long.jsonl"}], on_overflow="truncate", max_steps=1))
    assert error.exit_code == 3
    assert "only 1 of 3 answers ends with <|im_end|> as a token with loss" in str(error)


def test_without_a_choice_a_long_row_is_an_error_with_the_percentiles(place: Path) -> None:
    error = refused(place, sft(max_steps=1), home="other")
    assert error.exit_code == 3
    assert str(error).startswith("sft.jsonl:3: the row is ")
    assert f"Of all, {SAID}. " in str(error)
    assert "on_overflow: drop or truncate" in error.remedy
