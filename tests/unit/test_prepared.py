"""Prepared rows are found again when nothing that decides them changed, and never otherwise."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_help import byte_tokenizer
from small_run import Said, rows, tiny_base

from posttrain.data.hygiene.passages import evaluation_item
from posttrain.data.ledger import ROWS
from posttrain.data.render import Renderer
from posttrain.errors import DataError
from posttrain.methods import prepared
from posttrain.methods.prepared import Prepared, evaluation_rows, tokenizer_fingerprint, training_rows
from posttrain.methods.stage import Stage
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.paths import ASSETS
from posttrain.records import Example, Message, Task
from posttrain.settings import DatasetSettings, SFTSettings
from posttrain.train.loop import Place

TRAIN = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]
OTHER_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(str(tiny_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture
def stage(tmp_path: Path, policy: Policy) -> Stage:
    rows(tmp_path / "train.jsonl", TRAIN)
    place = Place(tmp_path / "home" / "runs" / "r" / "1-sft", 1, "1-sft")
    return Stage(policy, Renderer(policy.tokenizer), lambda p: tmp_path / p, place, Said(), (), home=tmp_path / "home")


def settings(**changes: Any) -> SFTSettings:
    return SFTSettings(**({"datasets": [{"path": "train.jsonl"}], "max_length": 64} | changes))


def prepare(stage: Stage, **changes: Any) -> tuple[Prepared, bool]:
    """What is prepared, and whether it was found; the stage's reporter must say so."""
    said = Said()
    found = training_rows(replace(stage, reporter=said), settings(**changes), "example")
    again = any("were prepared before" in line for line in said.lines)
    assert again != any("12 rows prepared in" in line or "rows prepared in" in line for line in said.lines)
    return found, again


def kept(stage: Stage) -> list[Path]:
    return sorted(path for path in stage.prepared.iterdir() if not path.name.startswith("."))


def test_nothing_changed_nothing_is_done_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = prepare(stage)
    assert not again
    trees = stage.renderer.examples(
        list(prepared.stream(settings().datasets, stage.resolve, Example))  # type: ignore[arg-type]
    )
    assert list(first.trees) == trees
    monkeypatch.setattr(prepared, "prepare", None)  # would fail if it were called
    second, again = prepare(stage)
    assert again
    assert list(second.trees) == trees
    assert (second.summary, second.sources) == (first.summary, first.sources)
    assert [path.name for path in stage.prepared.iterdir()] == [kept(stage)[0].name], "no lock, no scratch is left"


def test_what_only_says_how_to_prepare_is_no_part_of_it(stage: Stage) -> None:
    first, _ = prepare(stage)
    for change in ({"dataset_num_proc": 1}, {"max_drop_rate": 0.5}, {"learning_rate": 1.0}, {"save_steps": 3}):
        second, again = prepare(stage, **change)
        assert again, change
        assert second.summary == first.summary


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 63},
    "on_overflow": {"on_overflow": "drop"},
    "which answers": {"loss_on": "last_turn"},
    "limit": {"datasets": [{"path": "train.jsonl", "limit": 5}]},
    "columns": {"datasets": [{"path": "train.jsonl", "columns": {"prompt": "completion", "completion": "prompt"}}]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_prepares_anew(stage: Stage, change: str) -> None:
    prepare(stage)
    assert not prepare(stage, **CHANGES[change])[1]
    assert len(kept(stage)) == 2
    assert prepare(stage)[1], "and the first is still there"


def other_content(stage: Stage) -> Stage:
    """Same path, same size, same time stamp: the planted stale cache."""
    file = stage.resolve("train.jsonl")
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"It is 7.", b"It is 8."))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    return stage


def other_template(stage: Stage) -> Stage:
    return replace(stage, renderer=Renderer(byte_tokenizer(), OTHER_TEMPLATE))


def other_tokenizer(stage: Stage) -> Stage:
    source = stage.renderer.template.source
    return replace(stage, renderer=Renderer(byte_tokenizer(vocab_size=300), source))


def other_items(stage: Stage) -> Stage:
    asked = Task("eval:1", (Message("user", "Who was the first on the moon?"),))
    return replace(stage, held_out=[evaluation_item(asked)])


OTHERS = {
    "content": other_content,
    "template": other_template,
    "tokenizer": other_tokenizer,
    "evaluation items": other_items,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_stale_preparation_is_not_used(stage: Stage, name: str) -> None:
    # the tokenizer's case needs ChatML's own tokens on both sides
    source = (ASSETS / "templates" / "chatml.jinja").read_text()
    stage = replace(stage, renderer=Renderer(byte_tokenizer(), source))
    first, _ = prepare(stage)
    changed = OTHERS[name](stage)
    second, again = prepare(changed)
    assert not again
    rendered = changed.renderer.examples(
        list(prepared.stream(settings().datasets, stage.resolve, Example))  # type: ignore[arg-type]
    )
    assert list(second.trees) == rendered
    assert (list(second.trees) == list(first.trees)) == (name == "evaluation items")


def test_other_code_prepares_anew(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(stage)
    monkeypatch.setattr(prepared, "code_fingerprint", lambda: "of another version")
    assert not prepare(stage)[1]


def test_the_code_s_fingerprint_reads_every_file_that_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "posttrain"
    (package / "data" / "deep").mkdir(parents=True)
    monkeypatch.setattr(prepared, "CODE", ("data", "records.py"))
    for file in (package / "data" / "a.py", package / "data" / "deep" / "b.py", package / "records.py"):
        file.write_text("x = 1\n")
    monkeypatch.setattr(prepared.posttrain.data, "__file__", str(package / "data" / "__init__.py"))
    found = {prepared.code_fingerprint.__wrapped__()}
    for file in tmp_path.rglob("*.py"):
        file.write_text("x = 2\n")
        found.add(prepared.code_fingerprint.__wrapped__())
    assert len(found) == 4


def test_everything_the_fingerprint_names_is_there() -> None:
    root = Path(prepared.posttrain.data.__file__).parents[1]
    assert all((root / part).exists() for part in prepared.CODE)


def test_a_stage_that_drops_too_much_leaves_its_ledger(stage: Stage) -> None:
    """Whoever wants to know why must be able to look."""
    short = settings().model_copy(update={"max_length": 3, "on_overflow": "drop", "max_drop_rate": 0.1})
    with pytest.raises(DataError, match="rows"):
        training_rows(stage, short, "example")
    kept = (stage.place.directory / ROWS).read_text().splitlines()
    assert len(kept) == len(TRAIN)
    assert all('"dropped"' in line for line in kept)


def truncated(folder: Path) -> None:
    with (folder / "tokens").open("r+b") as file:
        file.truncate((folder / "tokens").stat().st_size - 2)


def flipped(folder: Path) -> None:
    data = bytearray((folder / "scored").read_bytes())
    data[3] ^= 1
    (folder / "scored").write_bytes(data)


def headless(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def forged(folder: Path) -> None:
    summary = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(summary | {"n_ending": 0}))


@pytest.mark.parametrize("damage", [truncated, flipped, headless, forged])
def test_a_damaged_preparation_is_done_again_aloud(stage: Stage, damage: Callable[[Path], None]) -> None:
    first, _ = prepare(stage)
    whole = list(first.trees)
    damage(kept(stage)[0])
    said = Said()
    second = training_rows(replace(stage, reporter=said), settings(), "example")
    assert any("are damaged and are prepared again: " in line for line in said.lines)
    assert list(second.trees) == whole
    assert prepare(stage)[1]


def test_a_preparation_that_breaks_off_is_never_seen(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*words: Any, **more: Any) -> Any:
        real(*words, **more)
        raise KeyboardInterrupt

    real = prepared.prepare
    monkeypatch.setattr(prepared, "prepare", breaks)
    with pytest.raises(KeyboardInterrupt):
        training_rows(stage, settings(), "example")
    assert kept(stage) == []
    monkeypatch.undo()
    assert not prepare(stage)[1]


def test_what_too_many_drops_refused_is_not_kept(stage: Stage) -> None:
    with pytest.raises(DataError, match="more than max_drop_rate"):
        training_rows(stage, settings(max_length=20, on_overflow="drop"), "example")
    assert kept(stage) == []


def test_a_lower_drop_rate_judges_what_was_prepared_before(stage: Stage) -> None:
    rows(stage.resolve("train.jsonl"), [*TRAIN, {"prompt": "Long?", "completion": "long " * 90}])
    assert prepare(stage, on_overflow="drop", max_drop_rate=0.5)[0].counts.buckets == {"trained": 12, "dropped": 1}
    with pytest.raises(DataError, match=r"train.jsonl:13: 1 of 13 rows \(7.7%\) are dropped"):
        training_rows(stage, settings(on_overflow="drop", max_drop_rate=0.05), "example")


def test_a_file_that_changes_while_it_is_read_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepared.content_hash

    def then_write(*words: Any) -> str:
        digest = real(*words)
        other_content(stage)
        return digest

    monkeypatch.setattr(prepared, "content_hash", then_write)
    with pytest.raises(DataError, match=r"train.jsonl: the file changed while it was read\."):
        training_rows(stage, settings(), "example")
    assert kept(stage) == []


def test_a_second_run_waits_and_finds(stage: Stage) -> None:
    """The first is held up while it prepares; the second must not start a preparation of its own."""
    prepare(stage)
    folder = kept(stage)[0]
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said = Said()
    second = threading.Thread(
        target=lambda: training_rows(replace(stage, reporter=said), settings(), "example"), daemon=True
    )
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert said.lines == ["1-sft: another run prepares the same rows; waiting for it"]
    os.close(lock)
    second.join(20)
    assert any("were prepared before" in line for line in said.lines)


def test_many_at_once_get_the_same(stage: Stage, tmp_path: Path) -> None:
    found: list[list[Any]] = []

    def one(i: int) -> None:
        mine = replace(stage, place=Place(tmp_path / f"run-{i}", 1, "1-sft"), reporter=Said())
        found.append(list(training_rows(mine, settings(), "example").trees))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(trees == found[0] for trees in found)
    assert len(kept(stage)) == 1


def test_rows_of_both_kinds_are_in_ledgers_beside_the_stage(stage: Stage, tmp_path: Path) -> None:
    rows(tmp_path / "eval.jsonl", TRAIN[:3])
    s = settings(eval_datasets=[{"path": "eval.jsonl"}])
    training_rows(stage, s, "example")
    evaluation = evaluation_rows(stage, s, "example")
    assert evaluation is not None
    assert evaluation.counts.buckets == {"evaluated": 3}
    lines = {name: (stage.place.directory / name).read_text().splitlines() for name in (ROWS, "rows-eval.jsonl")}
    assert [len(found) for found in lines.values()] == [12, 3]
    assert json.loads(lines["rows-eval.jsonl"][2]) == {"id": "eval.jsonl:3", "bucket": "evaluated", "reason": ""}
    assert evaluation_rows(stage, settings(), "example") is None


def test_a_tokenizer_s_fingerprint_is_of_what_it_does() -> None:
    one = byte_tokenizer()
    before = tokenizer_fingerprint(one)
    one(["a", "longer"], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    assert tokenizer_fingerprint(one) == before == tokenizer_fingerprint(byte_tokenizer())
    assert tokenizer_fingerprint(byte_tokenizer(vocab_size=330)) != before
    one.add_tokens(["<new>"])
    assert tokenizer_fingerprint(one) != before


def test_a_tokenizer_without_a_description_of_itself_is_known_by_its_files() -> None:
    class Plain:
        def __init__(self, words: str) -> None:
            self.words = words

        def save_pretrained(self, folder: str) -> None:
            Path(folder, "vocab.txt").write_text(self.words)

    assert tokenizer_fingerprint(Plain("a")) == tokenizer_fingerprint(Plain("a")) != tokenizer_fingerprint(Plain("b"))


def test_a_stream_without_a_commit_may_bring_other_rows_and_is_never_found() -> None:
    def pinned(**keys: Any) -> bool:
        return prepared.Wanted([DatasetSettings(path="acme/rows", **keys)], ("",), None, None).is_pinned  # type: ignore[arg-type]

    assert pinned()
    assert pinned(streaming=True, revision="0123456789abcdef0123456789abcdef01234567")
    assert not pinned(streaming=True)
    assert not pinned(streaming=True, revision="main")
