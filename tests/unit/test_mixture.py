from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from data_help import shared, write_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.data.formats import Dropped, RowStream, read_tasks, stream
from posttrain.data.mixture import drawn, interleaved, mixture_counts
from posttrain.errors import DataError
from posttrain.records import Example, Pair
from posttrain.settings import DatasetSettings

WEIGHTS = st.integers(1, 999).map(lambda n: n / 100)
SOURCES = st.lists(st.tuples(st.integers(1, 60), WEIGHTS), min_size=1, max_size=5)


def files(folder: Path, sizes: list[int]) -> Path:
    for i, n in enumerate(sizes):
        write_rows(folder / f"{i}.jsonl", [{"text": f"{i}-{k}"} for k in range(n)])
    return folder


def mixed(folder: Path, *keys: dict[str, Any]) -> RowStream[Example]:
    found = [DatasetSettings(path=f"{i}.jsonl", **said) for i, said in enumerate(keys)]
    return stream(found, lambda path: folder / path, Example)


def texts(rows: RowStream[Example]) -> list[str]:
    return [row.text or "" for row in rows if isinstance(row, Example)]


def test_counts_by_hand() -> None:
    assert mixture_counts([100, 100], [0.8, 0.2]) == [100, 25]
    assert mixture_counts([100, 10], [0.8, 0.2]) == [40, 10]
    assert mixture_counts([7473, 1319], [1, 1]) == [1319, 1319]
    assert mixture_counts([3, 60], [0.7, 0.1]) == [3, 0], "in floating point 0.7 times 3 / 0.7 is below 3"


@given(SOURCES)
def test_no_source_gives_more_than_it_has_and_one_gives_all(sources: list[tuple[int, float]]) -> None:
    available, weights = [list(part) for part in zip(*sources, strict=True)]
    counts = mixture_counts(available, weights)
    exact = [Fraction(str(weight)) for weight in weights]
    assert all(0 <= n <= most for n, most in zip(counts, available, strict=True))
    assert any(n == most for n, most in zip(counts, available, strict=True))
    for n, weight in zip(counts, exact, strict=True):  # any two are in proportion, up to the rounding of one row
        for m, other in zip(counts, exact, strict=True):
            assert n * other - m * weight < max(weight, other)


@settings(max_examples=40, deadline=None)
@given(SOURCES.filter(lambda found: len(found) > 1), st.integers(0, 9))
def test_realised_counts_are_exact_reported_and_reproducible(
    tmp_path_factory: pytest.TempPathFactory, sources: list[tuple[int, float]], seed: int
) -> None:
    sizes, weights = [list(part) for part in zip(*sources, strict=True)]
    counts = mixture_counts(sizes, weights)
    assume(all(counts))
    folder = files(tmp_path_factory.mktemp("mixture"), sizes)
    rows = mixed(folder, *({"weight": weight, "shuffle_seed": seed} for weight in weights))
    first = texts(rows)
    assert first == texts(rows), "the same again"
    assert len(set(first)) == len(first) == sum(counts), "no row twice"
    found = Counter(text.split("-")[0] for text in first)
    for i, (source, n, size) in enumerate(zip(rows.sources, counts, sizes, strict=True)):
        assert found[str(i)] == source.n_read == n and source.n_unused == size - n
        assert source.share == n / sum(counts)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_every_beginning_of_the_mixture_has_its_shares(counts: list[int]) -> None:
    order = list(interleaved([iter([i] * n) for i, n in enumerate(counts)], counts))
    assert Counter(order) == Counter({i: n for i, n in enumerate(counts) if n})
    for end in range(len(order)):
        for i, n in enumerate(counts):
            assert abs(order[:end].count(i) - n * end / len(order)) < len(counts)


@given(st.integers(1, 200), st.data(), st.integers(0, 99) | st.none())
def test_drawn_rows_are_exactly_as_many_and_keep_their_order(n: int, data: st.DataObject, seed: int | None) -> None:
    wanted = data.draw(st.integers(1, n))
    found = list(drawn(iter(range(n)), n, wanted, seed))
    assert len(found) == wanted and found == sorted(set(found))
    if seed is None:
        assert found == list(range(wanted))


def test_every_row_is_drawn_alike() -> None:
    """Each of 10 rows in 3 of 10 draws: 4,000 seeds give 1,200 ± 29; four deviations leave no doubt."""
    times = Counter(row for seed in range(4000) for row in drawn(iter(range(10)), 10, 3, seed))
    assert sum(times.values()) == 12_000 and all(abs(times[row] - 1200) < 116 for row in range(10))


def test_a_limit_draws_with_its_seed_and_takes_the_first_without(tmp_path: Path) -> None:
    files(tmp_path, [100])
    assert texts(mixed(tmp_path, {"limit": 3})) == ["0-0", "0-1", "0-2"]
    by_seed = [texts(mixed(tmp_path, {"limit": 10, "shuffle_seed": seed})) for seed in (1, 2, 1)]
    assert by_seed[0] == by_seed[2] != by_seed[1]
    more = mixed(tmp_path, {"limit": 1000})
    assert len(texts(more)) == 100 and more.sources[0].n_unused == 0
    assert str(more.sources[0]) == "0.jsonl: 100 rows as text (has text)"


def test_what_a_mixture_says_of_itself(tmp_path: Path) -> None:
    rows = mixed(files(tmp_path, [100, 40, 30]), {"weight": 2}, {"weight": 1, "limit": 20}, {"weight": 0.5})
    assert len(texts(rows)) == 70
    assert [str(source) for source in rows.sources] == [
        "0.jsonl: 40 rows as text (has text), 60 not used, weight 2 is 57.14% of the mixture",
        "1.jsonl: 20 rows as text (has text), 20 not used, weight 1 is 28.57% of the mixture",
        "2.jsonl: 10 rows as text (has text), 20 not used, weight 0.5 is 14.29% of the mixture",
    ]


def test_dropped_rows_count_as_rows_of_their_source(tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": "x", "rejected": "x"}
    fine = {"prompt": "a", "chosen": "x", "rejected": "y"}
    write_rows(tmp_path / "0.jsonl", [same, fine, same, fine])
    write_rows(tmp_path / "1.jsonl", [fine] * 9)
    datasets = [DatasetSettings(path=f"{i}.jsonl", weight=1) for i in range(2)]
    rows = stream(datasets, lambda path: tmp_path / path, Pair)
    lost = [row.id for row in rows if isinstance(row, Dropped)]
    assert lost == ["0.jsonl:1", "0.jsonl:3"]
    assert [(s.n_read, s.n_dropped, s.n_unused) for s in rows.sources] == [(4, 2, 0), (4, 0, 5)]


def test_another_process_draws_the_same_rows(tmp_path: Path) -> None:
    files(tmp_path, [50, 20])
    keys = [{"weight": 3, "shuffle_seed": 5}, {"weight": 1, "shuffle_seed": 5}]
    program = """
import sys
from pathlib import Path
from posttrain.data.formats import stream
from posttrain.records import Example
from posttrain.settings import DatasetSettings
keys = [{"weight": 3, "shuffle_seed": 5}, {"weight": 1, "shuffle_seed": 5}]
datasets = [DatasetSettings(path=f"{i}.jsonl", **said) for i, said in enumerate(keys)]
print(*[row.text for row in stream(datasets, lambda path: Path(sys.argv[1]) / path, Example)])
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    for hash_seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        other = subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout
        assert other.split() == texts(mixed(tmp_path, *keys))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([{"weight": 1}, {}], "1.jsonl: has no weight, and another one has."),
        ([{"weight": 1}], "0.jsonl: has a weight, which is never read"),
        ([{"shuffle_seed": 1}], "0.jsonl: has a shuffle_seed, which is never read"),
        ([{"weight": 1}, {"weight": 0.001}], "1.jsonl: weight 0.001 gives this source not one row"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, keys: list[dict[str, Any]], says: str) -> None:
    files(tmp_path, [5, 5])
    with pytest.raises(DataError) as fault:
        list(mixed(tmp_path, *keys))
    assert says in str(fault.value)


def test_a_streamed_set_needs_what_makes_it_countable() -> None:
    for keys, says in (
        ({"streaming": True}, "is streamed without a revision"),
        ({"streaming": True, "revision": "abc", "weight": 1.0}, "is streamed, so nobody knows how many rows"),
    ):
        others = [DatasetSettings(path="0.jsonl", weight=1)] if "weight" in keys else []
        with pytest.raises(DataError, match=says):
            stream([DatasetSettings(path="a/b", **keys), *others], Path, Example)


def test_real_problems_in_a_mixture() -> None:
    paths = [
        DatasetSettings(path=f"gsm8k-{part}.jsonl", weight=w, shuffle_seed=3) for part, w in (("train", 4), ("test", 1))
    ]
    loaded = read_tasks(paths, lambda p: shared(f"data/{p}"), require_answer=True)
    assert [(s.n_read, s.n_unused) for s in loaded.sources] == [(5276, 2197), (1319, 0)]
    assert len(set(loaded.ids)) == 5276 + 1319
