"""`posttrain data preview`: what is shown is what would be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_run import dpo, grpo, recipe, rows, sft, small_data
from template_help import TEMPLATES, renderer_of
from transformers import AutoTokenizer

from posttrain.cli import data_preview, main
from posttrain.cli.data_preview import KIND_OF
from posttrain.data.job import KINDS, Job
from posttrain.data.ledger import Bucket
from posttrain.data.preview import show
from posttrain.paths import ASSETS
from posttrain.records import Example, Message, Pair
from posttrain.settings import METHODS

TALK = (
    Message("user", "How many?"),
    Message("assistant", "She sold 72."),
    Message("user", "And in May?"),
    Message("assistant", "24 clips."),
)


def job(**changes: Any) -> Job:
    return Job(**{"kind": "example", "bucket": Bucket.TRAINED, "max_length": 100, "on_overflow": "error",
                  "token_type": "uint32"} | changes)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that has a tokenizer and a config, but no weights."""
    AutoTokenizer.from_pretrained(ASSETS / "tiny-base").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text((ASSETS / "tiny-base" / "config.json").read_text())
    small_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_every_method_has_a_kind_of_rows() -> None:
    assert METHODS.keys() <= KIND_OF.keys()
    assert set(KIND_OF.values()) <= KINDS.keys()


def test_spans_are_the_tree_s() -> None:
    renderer = renderer_of("qwen3")
    seen = show(renderer, job(), Example("d:1", TALK))
    tree = renderer.example(Example("d:1", TALK))
    assert (seen.n_tokens, seen.n_scored, seen.fate) == (
        len(tree.trunk_ids) + len(tree.branches[1].token_ids),
        tree.n_scored,
        "whole",
    )
    assert "".join(span.text for span in seen.trunk) == renderer.decode(tree.trunk_ids)
    assert [name for name, _ in seen.branches] == ["answer 1", "answer 2"]
    (_, spans) = seen.branches[1]
    assert [(s.text, s.special) for s in spans if s.scored] == [
        ("<think>\n\n</think>\n\n24 clips.", False),
        ("<|im_end|>", True),
    ]


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({"max_length": 50}, "too long: 53 tokens, max_length is 50; a run would stop here"),
        ({"max_length": 50, "on_overflow": "drop"}, "dropped: longer than 50 tokens"),
        ({"max_length": 50, "on_overflow": "truncate"}, "truncated: 53 tokens cut to 50; 1 of 1 answers stay open"),
    ],
)
def test_the_fate_of_a_long_row(changes: dict[str, Any], fate: str) -> None:
    seen = show(renderer_of("chatml"), job(**changes), Example("d:1", TALK))
    assert seen.fate == fate
    assert seen.n_tokens == (50 if "cut" in fate else 53)


def test_sides_of_a_pair_have_names_and_prompts_have_room() -> None:
    pair = Pair("p:1", TALK[:1], TALK[1:2], TALK[3:])
    assert [name for name, _ in show(renderer_of("chatml"), job(kind="pair"), pair).branches] == ["chosen", "rejected"]


def test_all_stages_in_plain_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(place, sft(), dpo(), grpo())
    assert main(["data", "preview", "recipe.yaml", "-n", "1"]) == 0
    out, err = capsys.readouterr()
    asks = "<|im_start|>user\nIs red with blue fine?<|im_end|>\n<|im_start|>assistant\n"
    assert out.startswith("\n1-sft: what carries loss is in [[ ]]\n\nsft.jsonl:1: 24 tokens, 2 with loss, whole\n")
    assert f"2 with loss, whole\n{asks}[[now<|im_end|>]]\n" in out
    assert f"whole\n{asks}\nchosen:\n[[now<|im_end|>]]\nrejected:\n[[ok<|im_end|>]]\n" in out
    assert "3-grpo: prompts only: answers are sampled\n\n" in out
    assert f"grpo.jsonl:1: 22 tokens and room for 4, whole\n{asks}\n" in out
    assert out.endswith("Next: posttrain run recipe.yaml\n") and not err


def test_one_stage_one_row_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(place, sft(), dpo())
    assert main(["data", "preview", "recipe.yaml", "--stage", "dpo", "--row", "dpo.jsonl:7", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    (stage,) = page["stages"]
    assert stage["stage"] == "2-dpo"
    (row,) = stage["rows"]
    assert row["id"] == "dpo.jsonl:7"
    (name, spans) = row["branches"][0]
    assert name == "chosen" and all(span["scored"] for span in spans)
    assert "".join(span["text"] for span in spans) == "now<|im_end|>"


def test_rows_left_out_are_named_and_control_characters_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(place / "dpo.jsonl", [
        {"prompt": "Fine?", "chosen": "ok", "rejected": "ok"},
        {"prompt": "Fine?", "chosen": "\x1b[31mred ]][[", "rejected": "ok"},
    ])  # fmt: skip
    recipe(place, sft(), dpo())
    assert main(["data", "preview", "recipe.yaml", "--stage", "2-dpo"]) == 0
    out = capsys.readouterr().out
    assert "dpo.jsonl:1: left out: chosen and rejected identical" in out
    assert "[[\\x1b[31mred ]][[<|im_end|>]]" in out and "\x1b" not in out
    assert main(["data", "preview", "recipe.yaml", "--row", "dpo.jsonl:1"]) == 0
    assert "dpo.jsonl:1: left out: chosen and rejected identical" in capsys.readouterr().out


def test_what_filters_do_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(place / "sft.jsonl", [
        {"prompt": "Fine?", "completion": "ok"}, {"prompt": "Fine?", "completion": "mail jane@gmail.com"},
    ])  # fmt: skip
    recipe(place, sft(filters={"min_answer_chars": 3, "pii": "mask"}))
    assert main(["data", "preview", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "with loss, left out by filters: an answer shorter than 3 characters\n" in out
    assert "mail [EMAIL]" in out and "jane" not in out


def test_colours_on_a_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rich.console

    monkeypatch.setattr(
        rich.console, "Console", lambda **more: Console(force_terminal=True, color_system="standard", **more)
    )
    recipe(place, sft())
    assert main(["data", "preview", "recipe.yaml", "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[32mnow\x1b[0m" in out and "[[" not in out  # what carries loss is green
    assert "\x1b[1;32m<|im_end|>\x1b[0m" in out and "\x1b[36m<|im_end|>\x1b[0m" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--stage", "4-ppo"], 2, "--stage 4-ppo is no stage of small. There are: 1-sft, 2-dpo."),
        (["--row", "sft.jsonl:99"], 3, "no stage has a row sft.jsonl:99."),
    ],
)
def test_what_is_not_there(
    place: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(place, sft(), dpo())
    assert main(["data", "preview", "recipe.yaml", *words]) == code
    assert said in capsys.readouterr().err


def test_the_recipe_s_template_is_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "other.jinja").write_text((TEMPLATES / "qwen25.jinja").read_text())
    recipe(place, sft(), chat_template="other.jinja")
    assert main(["data", "preview", "recipe.yaml", "-n", "1"]) == 0
    assert "You are a careful assistant." in capsys.readouterr().out


def test_visible_keeps_line_breaks() -> None:
    assert data_preview.visible("a\n\tb\x00\x9b") == "a\n\tb\\x00\\x9b"
