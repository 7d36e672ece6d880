"""Duplicates and overlaps in real data sets, found a second time by plain code that compares all with all.

Nothing here is shared with the package but the readers of files; `slow_*` are the other way to the same answers.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.formats import read_examples, read_pairs, read_tasks
from posttrain.data.hygiene.contamination import Index, overlapping, read_evaluation
from posttrain.data.hygiene.duplicates import Rules, content, find_duplicates
from posttrain.data.hygiene.labels import conflicts
from posttrain.data.hygiene.passages import raw_document
from posttrain.settings import DatasetSettings

DATA = Path(__file__).parents[2].parent / "shared" / "data"
if not DATA.is_dir():
    pytest.skip("real data is not beside the repository", allow_module_level=True)

Parts = tuple[str, ...]
SOME = 500  # rows of which each is compared with each


def raw(name: str) -> list[tuple[int, dict[str, Any]]]:
    data = (DATA / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
    lines = enumerate(text.split("\n"), start=1)
    return [(i, json.loads(line)) for i, line in lines if line.strip()]


def shingle_sets(parts: Parts) -> list[set[tuple[str, ...]]]:
    found = []
    for part in parts:
        words = re.findall(r"[a-z]+|[0-9]+|[^a-z0-9\s]", part.lower())
        n = min(3, len(words))
        found.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return found


def slow_exact(rows: list[tuple[int, Parts]]) -> set[int]:
    said = [tuple(" ".join(part.split()) for part in parts) for _, parts in rows]
    return {line for i, (line, _) in enumerate(rows) if said.index(said[i]) < i}


def slow_near(rows: list[tuple[int, Parts]], least: float) -> set[int]:
    """Each row against each earlier one that stayed."""
    staying: list[list[set[tuple[str, ...]]]] = []
    near = set()
    for line, parts in rows:
        sets = shingle_sets(parts)
        if any(all(alike(a, b, least) for a, b in zip(sets, others, strict=True)) for others in staying):
            near.add(line)
        else:
            staying.append(sets)
    return near


def alike(a: set[tuple[str, ...]], b: set[tuple[str, ...]], least: float) -> bool:
    if min(len(a), len(b)) < least * max(len(a), len(b)):
        return False
    return len(a & b) >= least * len(a | b)


def of_preference(row: dict[str, Any]) -> Parts | None:
    parts = (row["prompt"], row["chosen"], row["rejected"])
    return parts if row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"] else None


def of_transcript(row: dict[str, Any]) -> Parts | None:
    """Each transcript whole: what the two have in common is then in both parts, which changes nothing in equality."""
    sides = row["chosen"], row["rejected"]
    return (
        sides if sides[0] != sides[1] and not any(side.rstrip().endswith("\n\nAssistant:") for side in sides) else None
    )


@pytest.mark.parametrize(
    ("name", "columns", "read", "parts", "expected"),
    [
        ("gsm8k-test.jsonl", {"prompt": "question", "completion": "answer"}, read_examples,
         lambda r: (r["question"], r["answer"]), []),
        ("alpaca-eval-preferences.jsonl", {}, read_pairs, of_preference, [1973, 2219, 2249, 2327]),
        ("hh-harmless-test.jsonl.gz", {}, read_pairs, of_transcript, []),
        ("humaneval.jsonl.gz", {"completion": "canonical_solution"}, read_examples,
         lambda r: (r["prompt"], r["canonical_solution"]), []),
        ("self-instruct-seed-tasks.jsonl", {"prompt": "instruction"}, read_tasks, lambda r: (r["instruction"],), []),
    ],
)  # fmt: skip
def test_duplicates_within_each_set(
    name: str, columns: dict[str, str], read: Any, parts: Any, expected: list[int]
) -> None:
    options = {"require_answer": False} if read is read_tasks else {}
    loaded = read([DatasetSettings(path=name, columns=columns)], lambda path: DATA / path, **options)
    found = find_duplicates(lambda: map(content, loaded.rows), Rules(near=0.8))
    rows = [(line, said) for line, row in raw(name) if (said := parts(row)) is not None]
    assert len(rows) == len(loaded.rows)
    exact = slow_exact(rows)
    assert sorted(exact) == expected
    assert not conflicts(loaded.rows)
    assert {f"{name}:{line}" for line in exact} == {i for i, one in found.items() if one.jaccard is None}
    near_lines = {int(i.rpartition(":")[2]) for i, one in found.items() if one.jaccard is not None}
    some = [(line, said) for line, said in rows if line not in exact][:SOME]
    assert slow_near(some, 0.8) == near_lines & {line for line, _ in some}
    if parts is of_transcript:
        return  # at lower thresholds it matters that the prompt is in both of its parts
    closer = find_duplicates(lambda: map(content, loaded.rows[:SOME]), Rules(near=0.4))
    lower = {int(i.rpartition(":")[2]) for i, one in closer.items() if one.jaccard is not None}
    assert slow_near(rows[:SOME], 0.4) - exact == lower, "where there are some to find"


def test_no_row_of_the_gsm8k_training_set_is_there_twice() -> None:
    rows = [(row["question"], row["answer"]) for _, row in raw("gsm8k-train.jsonl")]
    assert len({tuple(" ".join(part.split()) for part in row) for row in rows}) == len(rows) == 7473
    columns = {"prompt": "question", "completion": "answer"}
    loaded = read_examples([DatasetSettings(path="gsm8k-train.jsonl", columns=columns)], lambda path: DATA / path)
    assert not find_duplicates(lambda: map(content, loaded.rows), Rules(near=None))


def test_gsm8k_training_rows_that_hold_thirteen_words_of_a_test_question() -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+", text.lower())

    known: dict[tuple[str, ...], set[int]] = {}
    for line, row in raw("gsm8k-test.jsonl"):
        asked = words(row["question"])
        for i in range(len(asked) - 12):
            known.setdefault(tuple(asked[i : i + 13]), set()).add(line)
    slow: dict[int, set[int]] = {}
    for line, row in raw("gsm8k-train.jsonl"):
        for text in (row["question"], row["answer"]):
            said = words(text)
            for i in range(len(said) - 12):
                if items := known.get(tuple(said[i : i + 13])):
                    slow.setdefault(line, set()).update(items)
    assert slow == {21: {633}, 407: {582}, 1315: {603}, 5163: {603}}

    index = Index.of(read_evaluation(DATA / "gsm8k-test.jsonl"))
    rows = (raw_document(str(line), row) for line, row in raw("gsm8k-train.jsonl"))
    found = {
        int(hits[0].train_id): {int(hit.eval_id.rpartition(":")[2]) for hit in hits}
        for hits in overlapping(rows, index)
        if hits
    }
    assert found == slow
