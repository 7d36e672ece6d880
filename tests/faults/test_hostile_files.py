"""Files that are damaged, hostile or not what their name says: a `DataError` (exit code 3) with file and row, always.

Never a traceback of another kind, and never a row that is quietly missing.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.formats import RowStream, stream
from posttrain.data.sources import READERS
from posttrain.errors import EXIT_DATA, DataError
from posttrain.records import Example, Pair, Task
from posttrain.settings import DatasetSettings

ROW = {"prompt": "Fine?", "completion": "ok"}
LINE = json.dumps(ROW).encode() + b"\n"
N = 10_000


def read(path: Path, kind: Any = Example, **keys: Any) -> RowStream[Any]:
    return stream([DatasetSettings(path=path.name, **keys)], lambda name: path.parent / name, kind)


def refusal(path: Path, kind: Any = Example, **keys: Any) -> str:
    with pytest.raises(DataError) as fault:
        list(read(path, kind, **keys))
    assert fault.value.exit_code == EXIT_DATA
    assert str(fault.value).isprintable(), "one line that a terminal can bear"
    return str(fault.value)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{"prompt": "caf\xe9", "completion": "ok"}\n', "not UTF-8: byte 0xe9 at offset 15."),
    "NUL bytes": (b"\x00" * 64 + b"\n", "broken JSON at column 1"),
    "a NUL inside a text": (b'{"prompt": "a\x00b", "completion": "ok"}\n', "Invalid control character"),
    "cut in the middle": (LINE[:20] + b"\n", "broken JSON at column"),
    "two rows on one line": (LINE.strip() + LINE, "Extra data"),
    "no object": (b'["Fine?", "ok"]\n', "a row must be a JSON object, this one is a list"),
    "null": (b"null\n", "a row must be a JSON object, this one is null"),
    "nested a hundred thousand deep": (b'{"prompt": ' + b"[" * 100_000 + b"\n", "more than 64 deep"),
    "nested a hundred deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}\n", "more than 64 deep inside each other"),
    "a number of five thousand digits": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "digits"),
    "NaN": (b'{"prompt": "a", "completion": NaN}\n', "NaN is no JSON value; write null"),
    "one key twice": (b'{"prompt": "a", "completion": "b", "prompt": "c"}\n', "'prompt' stands twice"),
    "half a character": (b'{"prompt": "a\\ud83d", "completion": "b"}\n', "half a character: \\ud83d"),
    "half a character as a key": (b'{"prompt": "a", "completion": "b", "\\udc00": 1}\n', "half a character: \\udc00"),
    "a number for a text": (b'{"prompt": 3, "completion": "ok"}\n', "'prompt' must be text and not empty; it is 3."),
    "a list for a text": (b'{"prompt": "a", "completion": ["ok"]}\n', "completion[0] must be an object, it is 'ok'"),
    "an object for a text": (b'{"prompt": "a", "completion": {"x": 1}}\n', "completion[0] has role None"),
    "a column missing": (b'{"prompt": "a"}\n', "no column 'completion', which format prompt_completion needs"),
    "null for a text": (
        b'{"prompt": "a", "completion": null}\n',
        "'completion' must be text and not empty; it is None",
    ),
    "junk for a message": (b'{"prompt": [{"role": ["user"]}], "completion": "b"}\n', "prompt[0] has role ['user']"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16") + b"\n", "not UTF-8: byte 0xff at offset 0"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_among_ten_thousand_is_named(tmp_path: Path, name: str) -> None:
    bad, says = BAD_LINES[name]
    path = written(tmp_path / "rows.jsonl", LINE * (N - 1) + bad + LINE * 3)
    said = refusal(path)
    assert said.startswith(f"{path}:{N}: ") and says in said, said
    assert len(said) < 500


@pytest.mark.parametrize("name", ["not UTF-8", "cut in the middle", "a number for a text"])
def test_in_a_packed_file_as_well(tmp_path: Path, name: str) -> None:
    bad, says = BAD_LINES[name]
    said = refusal(written(tmp_path / "rows.jsonl.gz", gzip.compress(LINE * (N - 1) + bad, 1)))
    assert f"rows.jsonl.gz:{N}: " in said and says in said


@pytest.mark.parametrize(("name", "broken_line"), [("rows.jsonl", 2), ("rows.jsonl.gz", 2), ("rows.json", 1)])
def test_a_line_of_fifty_megabytes_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, broken_line: int
) -> None:
    long = b'{"prompt": "' + b"a" * 50_000_000 + b'", "completion": "b"}'
    content = b"[" + long + b"]" if name == "rows.json" else LINE + long + b"\n"
    path = written(tmp_path / name, gzip.compress(content, 1) if name.endswith("gz") else content)
    del long, content
    tracemalloc.start()
    said = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name}:{broken_line}: the " in said and "is longer than 32 MiB" in said
    assert peak < 300e6


def test_a_cell_of_fifty_megabytes(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", b"prompt,completion\na,b\n" + b"a" * 50_000_000 + b",b\n")
    assert "rows.csv:3: a cell is longer than 32 MiB" in refusal(path)


def test_an_open_quote_that_swallows_the_rest_of_the_table(tmp_path: Path) -> None:
    said = refusal(written(tmp_path / "rows.csv", b'prompt,completion\na,b\n"c,d\n' + b"e,f\n" * 9))
    assert "rows.csv:3: broken table: unexpected end of data" in said


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (b"prompt,completion\na,b\nc\n", "rows.csv:3: 1 cells in a table of 2 columns (prompt, completion)"),
        (b"prompt,completion\na,b,c\n", "rows.csv:2: 3 cells in a table of 2 columns"),
        (b"prompt,prompt\na,b\n", "rows.csv:1: the column 'prompt' is named twice"),
        (b"prompt,completion\na,b\nc\x00,d\n", "rows.csv:3: a NUL byte"),
        (b"prompt,completion\na,b\ncaf\xe9,d\n", "in or after line"),
        (b"prompt,completion\na,b\n,d\n", "rows.csv:3: 'prompt' must be text and not empty; it is ''"),
        (b"prompt,completion\n", "the file holds no rows"),
        (b"", "the file holds no rows"),
    ],
)
def test_broken_tables_of_text(tmp_path: Path, table: bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "rows.csv", table))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file holds no rows"),
        (b"[]", "the file holds no rows"),
        (b'{"prompt": 1}\n{"prompt": 2}', "must hold one list of rows, this one holds an object"),
        (b"<html>", "this one holds no JSON: it begins with '<'"),
        (b'[{"prompt": "a", "completion": "b"}, 7]', "rows.json:2: a row must be a JSON object, this one is a number"),
        (b'[{"prompt": "a", "completion": "b"}, {"prompt": ', "rows.json:2: broken JSON"),
        (b'[{"prompt": "a", "completion": "b"}', "the file ends after row 1 without closing its list"),
        (b'[{"prompt": "a", "completion": "b"},]', "rows.json:1: a comma with no row after it"),
        (b'[{"prompt": "a", "completion": "b"} {}]', "rows.json:1: no comma after row 1"),
        (b'[{"prompt": "a", "completion": "b"}] []', "something stands after the list"),
        (b'[{"prompt": "caf\xe9"}]', "not UTF-8: byte 0xe9"),
        (b'[{"prompt": ' + b"[" * 9999 + b"]", "more than 64 deep"),
        (b'[{"prompt": NaN}]', "rows.json:1: NaN is no JSON value"),
        (b'[{"prompt": "\\ud800", "completion": "b"}]', "rows.json:1: half a character"),
    ],
)
def test_broken_lists(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in refusal(written(tmp_path / "rows.json", content))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_packed_file_that_was_cut(tmp_path: Path, share: float) -> None:
    noise = random.Random(0)
    rows = b"".join(json.dumps({**ROW, "id": noise.random()}).encode() + b"\n" for _ in range(2000))
    packed = gzip.compress(rows)
    said = refusal(written(tmp_path / "rows.jsonl.gz", packed[: int(share * len(packed))]))
    assert "rows.jsonl.gz: " in said
    assert "not a whole gzip file, it ends or breaks after line" in said or (share == 0.0 and "holds no rows" in said)


def test_a_packed_file_that_is_none_or_has_a_flipped_bit(tmp_path: Path) -> None:
    assert "not a whole gzip file" in refusal(written(tmp_path / "rows.jsonl.gz", LINE * 9))
    packed = bytearray(gzip.compress(LINE * 999))
    packed[-6] ^= 1  # the checksum
    assert "not a whole gzip file" in refusal(written(tmp_path / "rows.jsonl.gz", bytes(packed)))


def parquet(path: Path, rows: int = 5000) -> Path:
    table = pa.table({"prompt": [f"Fine {i}?" for i in range(rows)], "completion": ["ok"] * rows})
    pq.write_table(table, path, row_group_size=1000, compression="none")
    return path


def arrow(path: Path, rows: int = 5000) -> Path:
    table = pa.table({"prompt": [f"Fine {i}?" for i in range(rows)], "completion": ["ok"] * rows})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    return path


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_parquet_file_that_was_cut(tmp_path: Path, share: float) -> None:
    whole = parquet(tmp_path / "rows.parquet").read_bytes()
    said = refusal(written(tmp_path / "rows.parquet", whole[: int(share * len(whole))]))
    assert "rows.parquet: not a whole parquet file" in said


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_an_arrow_file_that_was_cut(tmp_path: Path, share: float) -> None:
    whole = arrow(tmp_path / "rows.arrow").read_bytes()
    said = refusal(written(tmp_path / "rows.arrow", whole[: int(share * len(whole))]))
    assert "rows.arrow: not a whole arrow file, it breaks" in said


def test_an_arrow_file_of_nothing(tmp_path: Path) -> None:
    assert "rows.arrow: " in refusal(written(tmp_path / "rows.arrow", b""))


def test_a_parquet_page_that_was_overwritten(tmp_path: Path) -> None:
    whole = bytearray(parquet(tmp_path / "rows.parquet").read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 4000] = b"\xff" * 4000
    said = refusal(written(tmp_path / "rows.parquet", bytes(whole)))
    assert "rows.parquet" in said


def test_text_in_a_table_that_is_no_text_names_the_row(tmp_path: Path) -> None:
    prompts = pa.array([b"Fine?"] * 700 + [b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "completion": ["ok"] * 701}), tmp_path / "rows.parquet")
    assert "rows.parquet:701: damaged: " in refusal(tmp_path / "rows.parquet")


def test_a_table_whose_columns_have_other_types_names_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": [3]}), tmp_path / "rows.parquet")
    assert "rows.parquet:1: 'completion' must be text and not empty; it is 3" in refusal(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "completion": [b"x"]}), tmp_path / "rows.parquet")
    assert "'completion' must be text and not empty; it is b'x'" in refusal(tmp_path / "rows.parquet")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "rows.parquet: the column 'prompt' is named twice" in refusal(tmp_path / "rows.parquet")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", LINE * 5000)
    rows = iter(read(path))
    next(rows)
    with path.open("ab") as out:
        out.write(LINE)
    with pytest.raises(DataError, match="the file changed while it was read"):
        list(rows)


def test_the_command_line_says_it_in_one_sentence_and_exits_with_3(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n\xff\n')
    words = ["generate", "builtin:tiny-base", "--prompts", str(path)]
    ran = subprocess.run([sys.executable, "-m", "posttrain", *words], capture_output=True, text=True, check=False)
    assert ran.returncode == EXIT_DATA
    assert f"{path}:2: not UTF-8: byte 0xff at offset 0." in ran.stderr.replace("\n", " ")
    assert "Traceback" not in ran.stderr


WHOLE: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": lambda path: written(path, LINE * 40),
    "a.jsonl.gz": lambda path: written(path, gzip.compress(LINE * 40)),
    "a.json": lambda path: written(path, json.dumps([ROW] * 40).encode()),
    "a.csv": lambda path: written(path, b"prompt,completion\n" + b"a,b\n" * 40),
    "a.tsv": lambda path: written(path, b"prompt\tcompletion\n" + b"a\tb\n" * 40),
    "a.parquet": lambda path: parquet(path, 40),
    "a.arrow": lambda path: arrow(path, 40),
}


def test_every_kind_of_file_is_fuzzed() -> None:
    assert {name.removeprefix("a") for name in WHOLE} == READERS.keys()


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_changed_at_random_never_end_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    content = bytearray(WHOLE[name](path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(bytes(content))
    try:
        found = list(read(path))
    except DataError as fault:
        assert fault.where
    else:
        assert len({row.id for row in found}) == len(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "x"]), inner)
    ),
    max_leaves=5,
)
COLUMNS = ["messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "answer", "tools",
           "system", "instruction", "output", "input", "text", "steps", "labels"]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, min_size=1), min_size=1, max_size=4))
def test_nested_junk_never_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in (Example, Pair, Task):
        try:
            assert len(list(read(path, kind))) == len(rows)
        except DataError as fault:
            assert fault.where
