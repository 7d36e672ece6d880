from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.formats import stream
from posttrain.data.sources import OpenSource, open_sources
from posttrain.errors import DataError
from posttrain.records import Task
from posttrain.settings import DatasetSettings


def opened(path: Path, **settings: Any) -> OpenSource:
    return open_sources([DatasetSettings(path=path.name, **settings)], lambda name: path.parent / name)[0]


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as fault:
        list(opened(path).rows())
    return str(fault.value)


def test_ids_are_line_numbers_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 3}\r\n{"a": 4}')
    file = opened(path)
    rows = list(file.rows())
    assert [(row.id, row.fields["a"]) for row in rows] == [
        ("rows.jsonl:1", 1),
        ("rows.jsonl:3", 3),
        ("rows.jsonl:4", 4),
    ]
    assert rows[1].where == f"{path}:3"
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_three_file_types_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "a line separator\u2028stays inside"}, {"text": "b"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        found = list(opened(tmp_path / name).rows())
        assert [row.fields for row in found] == rows
        assert [row.id for row in found] == [f"{name}:1", f"{name}:2"]


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": "2"}\nbroken\n')
    found = stream([DatasetSettings(path="a.jsonl", limit=2)], lambda _: path, Task)
    assert [row.id for row in found] == ["a.jsonl:1", "a.jsonl:2"]
    assert found.sources[0].n_unused == 1


def test_faults_name_file_line_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    broken = refusal(path, b'{"a": 1}\n{"a": \n')
    assert f"{path}:2" in broken and "broken JSON at column" in broken
    assert f"{path}:1: a row must be a JSON object, this one is a list: [1, 2]" in refusal(path, b"[1, 2]\n")
    assert f"{path}:2: not UTF-8: byte 0xe9" in refusal(path, b'{"a": 1}\n' + '{"a": "é"}'.encode("latin1"))
    assert "not a whole gzip file" in refusal(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    assert "must hold one list of rows, this one holds an object" in refusal(tmp_path / "a.json", b'{"a": 1}')
    assert "Known file types: .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet, .arrow." in refusal(
        tmp_path / "a.txt", b"a,b\n"
    )


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        opened(tmp_path / "folder.jsonl")
