from __future__ import annotations

import gzip
import hashlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_help import write_rows
from datasets import Dataset, DatasetDict

from posttrain import network
from posttrain.data.formats import RowStream, stream
from posttrain.data.sources import OpenSource, content_hash, hub, open_sources
from posttrain.errors import DataError, RecipeError
from posttrain.records import Example, Task, ToolCall
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
    assert file.hash is not None and file.hash() == hashlib.sha256(path.read_bytes()).hexdigest()


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
        list(opened(tmp_path / "folder.jsonl").rows())


def read(path: Path, kind: Any = Example, **keys: Any) -> RowStream[Any]:
    return stream([DatasetSettings(path=path.name, **keys)], lambda name: path.parent / name, kind)


CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": None},
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a", "function": {"name": "look", "arguments": {"city": "Rome"}}}],
            },
            {"role": "tool", "content": "sunny", "tool_call_id": "a"},
            {"role": "assistant", "content": "Sunny."},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {"tz": 1}}}]},
        ],
        "tools": [],
    },
]


def test_typed_tables_give_the_very_rows_that_lines_give(tmp_path: Path) -> None:
    """A table fills in nulls: every message gets tool_calls, every call gets the arguments of all others."""
    write_rows(tmp_path / "a.jsonl", CHAT)
    table = pa.Table.from_pylist(CHAT)
    filled = table.to_pylist()[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"city": "Rome", "tz": None}, "the fault this test is about"
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    Dataset.from_list(CHAT).save_to_disk(tmp_path / "saved", num_shards=2)
    lines = list(read(tmp_path / "a.jsonl"))
    assert lines[1].messages[1].tool_calls == (ToolCall("look", '{"city": "Rome"}', "a"),)
    for name in ("a.parquet", "file.arrow", "stream.arrow", "saved"):
        found = list(read(tmp_path / name))
        assert [(row.messages, row.tools) for row in found] == [(row.messages, row.tools) for row in lines], name
        assert [row.id for row in found] == [f"{name}:{i}" for i in (1, 2, 3)]


def test_cells_of_a_text_table_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,answer,id\r\n"2, and\n3?",007,x\r\n\r\nb,5,\r\n')
    (tmp_path / "a.tsv").write_text("prompt\tanswer\tid\n2, and 3?\t007\tx\n")
    first, second = read(tmp_path / "a.csv", Task)
    assert (first.prompt[0].content, first.answer, first.extra) == ("2, and\n3?", "007", {"id": "x"})
    assert (first.id, second.id) == ("a.csv:2", "a.csv:5"), "the line a row begins on"
    assert next(iter(read(tmp_path / "a.tsv", Task))).answer == "007"


def test_a_long_list_is_decoded_row_by_row(tmp_path: Path) -> None:
    """Rows of every length around the size of the window, so that it ends inside rows, numbers and characters."""
    sizes = [1, 7, 2**20 - 40, 2**20, 3 * 2**20 + 1, 5]
    rows = [{"text": "é" * (size // 2) + str(i), "n": 123456} for i, size in enumerate(sizes)]
    for i, dumped in enumerate([json.dumps(rows, ensure_ascii=False), json.dumps(rows, indent=1)]):
        path = tmp_path / f"{i}.json"
        path.write_text(f" \n{dumped}\n", encoding="utf-8")
        assert [row.text for row in read(path)] == [row["text"] for row in rows]


def test_folders_with_several_splits_say_which_there_are(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list([{"text": "a"}]), "test": Dataset.from_list([{"text": "b"}])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [row.text for row in read(tmp_path / "saved")] == ["a"]
    held_out = read(tmp_path / "saved", split="test")
    assert [(row.id, row.text) for row in held_out] == [("saved:1", "b")] and held_out.sources[0].path == "saved/test"
    with pytest.raises(DataError, match=r"no split 'tset' in it. Set split to one of: train, test."):
        list(read(tmp_path / "saved", split="tset"))
    both = [DatasetSettings(path="saved", split=split) for split in ("train", "test")]
    ids = [row.id for row in stream(both, lambda name: tmp_path / name, Example)]
    assert ids == ["saved/train:1", "saved/test:1"]


def test_keys_of_the_hub_on_a_file_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="has name and split, which is never read"):
        read(tmp_path / "a.jsonl", name="main", split="test")
    write_rows(tmp_path / "rows", [{"text": "a"}])
    with pytest.raises(DataError, match="revision would never be read: this is no data set of the Hub"):
        list(read(tmp_path / "rows", revision="main"))


class FakeSet(list[dict[str, Any]]):
    """What the loader hands back; `asked` is what it was asked for."""

    cache_files: ClassVar[list[dict[str, str]]] = []
    shuffled: tuple[int, int] | None = None

    def shuffle(self, seed: int, buffer_size: int) -> FakeSet:
        self.shuffled = (seed, buffer_size)
        return self


@pytest.fixture
def hub_set(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeSet, list[Any]]:
    asked: list[Any] = []
    found = FakeSet({"question": f"{i} + 1?", "answer": str(i + 1), "none": None} for i in range(5))
    monkeypatch.setattr(hub, "load_dataset", lambda path, **keys: (asked.append((path, keys)), found)[1])
    return found, asked


def not_here(path: str) -> Path:
    raise RecipeError(f"{path} does not exist")


def test_a_hub_name_is_loaded_with_all_its_keys(hub_set: tuple[FakeSet, list[Any]]) -> None:
    dataset = DatasetSettings(path="openai/gsm8k", name="main", split="test", revision="abc")
    rows = stream([dataset], not_here, Task)
    found = [row for row in rows if isinstance(row, Task)]
    asked = {"name": "main", "split": "test", "revision": "abc", "streaming": False}
    assert hub_set[1] == [("openai/gsm8k", asked)]
    assert [row.id for row in found][:2] == ["openai/gsm8k/main/test:1", "openai/gsm8k/main/test:2"]
    assert found[4].answer == "5" and rows.sources[0].path == "openai/gsm8k/main/test"
    assert rows.sources[0].sha256 == content_hash(dataset, not_here), "known before a row is read, and the same"


def test_a_streamed_set_draws_from_a_buffer_and_is_hashed_while_it_passes(
    hub_set: tuple[FakeSet, list[Any]],
) -> None:
    dataset = DatasetSettings(path="a/b", streaming=True, revision="abc", limit=3, shuffle_seed=7)
    rows = stream([dataset], not_here, Task)
    assert len(list(rows)) == 3
    assert hub_set[0].shuffled == (7, hub.SHUFFLE_BUFFER) and hub_set[1][0][1]["streaming"] is True
    source = rows.sources[0]
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in hub_set[0][:3]]
    assert source.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert source.n_unused is None and str(source).endswith(", an unknown number not used")
    assert content_hash(dataset, not_here) != content_hash(dataset.model_copy(update={"revision": "abd"}), not_here)


def test_whatever_the_loader_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        pass

    def fails(*_: Any, **__: Any) -> None:
        raise Odd("Couldn't reach it.\nA page of advice follows")

    monkeypatch.setattr(hub, "load_dataset", fails)
    with pytest.raises(DataError) as fault:
        list(stream([DatasetSettings(path="openai/gsm8k")], not_here, Task))
    assert str(fault.value) == (
        "openai/gsm8k: datasets cannot load it (split train): Couldn't reach it. It is no file here. "
        "Correct path, name, split or revision; without a network, download it first."
    )


def test_a_stream_that_breaks_off_says_after_which_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(hub, "load_dataset", lambda _, **__: breaking())
    dataset = DatasetSettings(path="a/b", streaming=True, revision="abc")
    with pytest.raises(DataError, match=r"a/b: datasets fails after row 1: peer went away"):
        list(stream([dataset], not_here, Example))


def test_a_folder_of_plain_files_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", CHAT[1:])
    rows = read(tmp_path / "set")
    assert [row.messages[-1].content for row in rows] == ["Sunny.", ""]
    before = rows.sources[0].sha256
    write_rows(tmp_path / "set" / "train.jsonl", CHAT[:2])
    assert len(list(rows)) == 2 and rows.sources[0].sha256 != before
    with pytest.raises(DataError, match=r"set: datasets cannot load it \(split tset\): Unknown split"):
        list(read(tmp_path / "set", split="tset"))


def test_without_a_network_a_hub_name_fails_soon_and_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown_host(*_: Any) -> None:
        raise OSError("Name or service not known")

    import huggingface_hub.constants

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr(network, "getproxies", dict)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"nobody/nothing-of-the-kind: datasets cannot load it \(split train\): "):
        list(stream([DatasetSettings(path="nobody/nothing-of-the-kind")], not_here, Task))
    assert time.perf_counter() - start < 10, "datasets alone retries for 23 s"


def test_two_hundred_thousand_rows_stream_through_a_few_megabytes(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "How many clips did Natalia sell? " * 4, "completion": "72"}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 200_000)
    program = """
import resource, sys
from pathlib import Path
from posttrain.data.formats import stream
from posttrain.records import Example
from posttrain.settings import DatasetSettings
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
rows = stream([DatasetSettings(path="a.jsonl", limit=150_000, shuffle_seed=1)], lambda _: Path(sys.argv[1]), Example)
next(iter(rows))
before = peak()
print(sum(1 for _ in rows), peak() - before)
"""
    words = [sys.executable, "-c", program, str(tmp_path / "a.jsonl")]
    n, grown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert int(n) == 150_000 and float(grown) < 50
