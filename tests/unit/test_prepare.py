"""Prepared trees are the trees rendered directly, whatever process rendered them; faults keep their order."""

from __future__ import annotations

import io
import os
import signal
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_help import byte_tokenizer, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import prepare as prepare_module
from posttrain.data.formats import Dropped, stream
from posttrain.data.job import KINDS, Job
from posttrain.data.ledger import ROWS, Bucket, Entry, Ledger
from posttrain.data.prepare import Screen, Summary, prepare
from posttrain.data.render import Renderer
from posttrain.data.store import PreparedTrees, TreeWriter, pack, token_type
from posttrain.data.worker import Workers
from posttrain.errors import DataError, DoesNotFit
from posttrain.paths import ASSETS
from posttrain.records import Branch, Example, Message, Pair, Row, Task, Tree
from posttrain.settings import DatasetSettings

JOB = Job("example", Bucket.TRAINED, 2048, "error", "uint16")


def renderer() -> Renderer:
    return Renderer(byte_tokenizer(), (ASSETS / "templates" / "chatml.jinja").read_text())


def conversations(n: int) -> Iterator[Example]:
    """Single turns, more turns with an unscored one, plain text."""
    for i in range(n):
        turns = (Message("user", f"What is {i}?"), Message("assistant", f"It is {i} – „Zahl“."))
        more = (*turns, Message("user", "And next?"), Message("assistant", str(i + 1), train=i % 2 == 0 or None))
        text = Example(f"rows.jsonl:{i + 1}", text=f"Number {i}.")
        yield text if i % 7 == 3 else Example(f"rows.jsonl:{i + 1}", turns if i % 3 else more)


def pairs(n: int) -> Iterator[Pair]:
    for i in range(n):
        asked = (Message("user", f"What is {i}?"),)
        yield Pair(f"p:{i}", asked, (Message("assistant", f"{i}!"),), (Message("assistant", "no idea"),))


def tasks(n: int) -> Iterator[Task]:
    for i in range(n):
        yield Task(f"t:{i}", (Message("user", f"What is {i}?"),), answer=str(i), extra={"note": "x" * 100})


PATHS: dict[str, tuple[Job, list[Any]]] = {
    "all turns": (JOB, list(conversations(700))),
    "last turn": (replace(JOB, loss_on="last_turn"), list(conversations(300))),
    "pairs": (replace(JOB, kind="pair"), list(pairs(300))),
    "prompts": (replace(JOB, kind="task", room=16), list(tasks(300))),
}


def run(
    rows: Sequence[Row | Dropped] | Iterator[Row | Dropped],
    directory: Path,
    job: Job = JOB,
    *,
    screens: Sequence[Screen] = (),
    processes: int | None = 1,
) -> Summary:
    directory.mkdir(exist_ok=True)
    return prepare(rows, screens, renderer(), job, directory, processes=processes, progress=lambda *_: None)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", PATHS)
def test_prepared_trees_are_the_trees_rendered_directly(name: str, tmp_path: Path) -> None:
    job, rows = PATHS[name]
    summary = run(rows, tmp_path, job)
    direct = KINDS[job.kind].trees(renderer(), rows, job)
    kept = PreparedTrees(tmp_path)
    assert list(kept) == direct
    assert kept[-1] == direct[-1]
    assert kept[5:9] == direct[5:9]
    assert summary.counts.buckets == {"trained": len(rows)}
    assert summary.counts.supervised_tokens == sum(tree.n_scored for tree in direct)
    assert summary.n_tokens == sum(tree.n_tokens for tree in direct)
    with pytest.raises(IndexError):
        kept[len(direct)]


def test_one_process_and_two_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "ALONE_S", 0.0)  # None: alone at first, then in company
    rows = [*PATHS["all turns"][1], Dropped("rows.jsonl:9999", "empty answer"), *pairs_as_examples()]
    job = replace(JOB, max_length=60, on_overflow="drop")
    summaries = [run(rows, tmp_path / str(n), job, processes=n) for n in (1, 2, None)]
    assert summaries[0] == summaries[1] == summaries[2]
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "None")
    assert summaries[0].counts.buckets.keys() == {"trained", "dropped"}


def pairs_as_examples() -> list[Example]:
    return [Example(pair.id, pair.prompt + pair.chosen) for pair in pairs(600)]


def test_real_rows_in_two_processes(tmp_path: Path) -> None:
    datasets = [DatasetSettings(path="hh-harmless-test.jsonl.gz", limit=300)]
    rows = list(stream(datasets, lambda p: shared(f"data/{p}"), Pair))
    summary = run(rows, tmp_path, replace(JOB, kind="pair", max_length=100_000), processes=2)
    direct = renderer().pairs([row for row in rows if isinstance(row, Pair)])
    assert list(PreparedTrees(tmp_path)) == direct
    assert summary.counts.n_rows == 300


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_fault_in_the_data_is_the_one_that_is_told(tmp_path: Path, processes: int) -> None:
    """A row no template takes stands before one the reader stumbles over; the reader, running ahead, finds the other
    first. The sentence names row, cause and remedy, in whichever process it arose."""

    def rows() -> Iterator[Row]:
        for row in conversations(900):
            if row.id == "rows.jsonl:500":
                yield Example(row.id, (Message("user", "a<|im_end|>b"), Message("assistant", "c")))
            elif row.id == "rows.jsonl:850":
                raise DataError("broken JSON.", where="rows.jsonl:850")
            else:
                yield row

    with pytest.raises(DataError) as fault:
        run(rows(), tmp_path, processes=processes)
    assert str(fault.value).startswith("rows.jsonl:500: message 0 (user) contains '<|im_end|>', a control token")
    assert (fault.value.where, fault.value.exit_code) == ("rows.jsonl:500", 3)
    assert fault.value.remedy.startswith("It would be read as the token")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_reader_s_own_fault_comes_through(tmp_path: Path, processes: int) -> None:
    def rows() -> Iterator[Row]:
        yield from conversations(600)
        raise DataError("broken JSON.", where="rows.jsonl:601")

    with pytest.raises(DataError, match=r"^rows.jsonl:601: broken JSON\.$"):
        run(rows(), tmp_path, processes=processes)


def test_overlong_rows_are_told_as_from_one_process(tmp_path: Path) -> None:
    told = []
    for processes in (1, 2):
        with pytest.raises(DataError) as fault:
            run(conversations(900), tmp_path, replace(JOB, max_length=60), processes=processes)
        told.append(str(fault.value))
    assert told[0] == told[1]
    assert "of 900 rows are longer; the longest is" in told[0]


def test_a_process_that_is_killed_is_a_sentence_and_leaves_none_behind() -> None:
    with Workers(2, renderer(), JOB) as workers:
        assert workers.submit(list(conversations(3))).result().entries[0].bucket is Bucket.TRAINED
        pids = [worker._process.pid for worker in workers._all]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(DoesNotFit, match=r"ended \(signal 9\)\. It may have run out of memory"):
            workers.submit(list(conversations(3))).result()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_fault_of_ours_in_another_process_is_no_fault_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'poem'"):
        run(list(conversations(3)), tmp_path, replace(JOB, kind="poem"), processes=2)


class Odd:
    """Takes every third row out."""

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        for i, row in enumerate(rows):
            yield row, Entry(Bucket.DUPLICATE, "of another") if i % 3 == 0 else None

    def notes(self) -> Sequence[str]:
        return ("every third is gone",)


class Eater(Odd):
    """Loses a row on the way: the planted fault."""

    def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
        next(rows)
        yield from ((row, None) for row in rows)


def test_screened_rows_stand_in_the_ledger_where_they_were_read(tmp_path: Path) -> None:
    rows = list(conversations(20))
    summary = run([rows[0], Dropped("rows.jsonl:99", "empty answer"), *rows[1:]], tmp_path, screens=[Odd()])
    assert summary.counts.buckets == {"trained": 13, "dropped": 1, "duplicate": 7}
    assert summary.notes == ("every third is gone",)
    lines = (tmp_path / ROWS).read_text().splitlines()
    assert [line.split('"')[3] for line in lines[:3]] == ["rows.jsonl:1", "rows.jsonl:99", "rows.jsonl:2"]
    assert len(PreparedTrees(tmp_path)) == 13


def test_a_row_that_a_screen_swallows_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"20 rows of rows.jsonl were read, 19 are in a bucket"):
        run(list(conversations(20)), tmp_path, screens=[Eater()])


FATES = st.lists(st.sampled_from(["short", "long", "dropped", "screened"]), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(fates=FATES, on_overflow=st.sampled_from(["drop", "truncate"]))
def test_whatever_becomes_of_rows_each_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, fates: list[str], on_overflow: Any
) -> None:
    class Chosen(Odd):
        def __call__(self, rows: Iterator[Any]) -> Iterator[tuple[Any, Entry | None]]:
            for row in rows:
                screened = fates[int(row.id.split(":")[1])] == "screened"
                yield row, Entry(Bucket.CONTAMINATED, "x") if screened else None

    rows: list[Row | Dropped] = []
    for i, fate in enumerate(fates):
        answer = "word " * (60 if fate == "long" else 1) + "end"
        row = Example(f"r:{i}", (Message("user", "q"), Message("assistant", answer)))
        rows.append(Dropped(row.id, "empty answer") if fate == "dropped" else row)
    directory = tmp_path_factory.mktemp("rows")
    job = replace(JOB, max_length=40, on_overflow=on_overflow)
    counts = run(rows, directory, job, screens=[Chosen()]).counts
    n = {fate: fates.count(fate) for fate in ("short", "long", "dropped", "screened")}
    cut = on_overflow == "truncate"
    expected = {"trained": n["short"], "truncated": n["long"] * cut, "contaminated": n["screened"]}
    expected["dropped"] = n["dropped"] + n["long"] * (not cut)
    assert counts.buckets == {bucket: count for bucket, count in expected.items() if count}
    assert counts.n_rows == len(fates)
    trees = PreparedTrees(directory)
    assert len(trees) == n["short"] + n["long"] * cut
    assert counts.supervised_tokens == sum(tree.n_scored for tree in trees)


# The store by itself.

IDS = st.text(st.characters(codec="utf-8"), max_size=8)
TREES = st.builds(
    lambda row_id, trunk, branches: Tree(
        row_id, tuple(trunk), tuple(Branch(tuple(i for i, _ in b), tuple(s for _, s in b)) for b in branches)
    ),
    IDS,
    st.lists(st.integers(0, 65_535), max_size=9),
    st.lists(st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), max_size=9), max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(TREES, max_size=4), max_size=4))
def test_any_trees_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, handfuls: list[list[Tree]]) -> None:
    """Empty trunks, empty branches, no branches; marks that end within a byte."""
    directory = tmp_path_factory.mktemp("store")
    with TreeWriter(directory, "uint16") as writer:
        for trees in handfuls:
            writer.add(pack(trees, "uint16"))
    assert list(PreparedTrees(directory)) == [tree for trees in handfuls for tree in trees]


def test_a_large_vocabulary_needs_wider_numbers(tmp_path: Path) -> None:
    assert (token_type(65_536), token_type(65_537)) == ("uint16", "uint32")
    large = Tree("a", (70_000,), (Branch((65_536, 4_000_000_000), (True, False)),))
    with TreeWriter(tmp_path, "uint32") as writer:
        writer.add(pack([large], "uint32"))
    assert list(PreparedTrees(tmp_path)) == [large]
    with pytest.raises(OverflowError):
        pack([large], "uint16")
    assert np.dtype("uint32").itemsize == 4


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Python's own peak for 3,000 rows is that for 600: what is in memory is a chunk or two."""
    peaks = []
    warm = renderer()
    run(conversations(300), tmp_path)
    for n in (600, 3000):
        tracemalloc.start()
        prepare(conversations(n), [], warm, JOB, tmp_path, processes=1, progress=lambda *_: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks


def test_an_empty_stream_closes_an_empty_ledger() -> None:
    assert Ledger(io.StringIO()).close().summary() == "0 rows: none"
