"""generate, chat, eval and compare on tiny random models: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_model, write_rows

from posttrain.cli import main

SUITE = "name: words\nitems: items.jsonl\nscore: [exact]\nsampling: {temperature: 0.0, max_new_tokens: 4}\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "a", seed=1)
    tiny_model(folder / "b", seed=2)
    tiny_model(folder / "bare", template=False)
    return folder


@pytest.fixture(autouse=True)
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_HOME", raising=False)
    for name in ("a", "b", "bare"):
        (tmp_path / name).symlink_to(models / name)
    write_rows(tmp_path / "items.jsonl", [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(12)])
    (tmp_path / "words.yaml").write_text(SUITE, encoding="utf-8")
    (tmp_path / "wins.yaml").write_text(SUITE + "kind: win_rate\n", encoding="utf-8")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command printed to stdout; it must have succeeded and ended with the next command."""
    assert main(words) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.err


# --- generate -----------------------------------------------------------------------------------------------------


def test_generate_shows_each_answer_and_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "generate", "a", "--prompt", "One?", "--prompt", "Two?", "--max-new-tokens", "3")
    assert out.count("[cut, 3 tokens]") == 2
    assert out.startswith("> One?\n")
    assert "\n\n> Two?\n" in out
    assert out.endswith("\n\nNext: posttrain chat a\n")


def test_generate_json_is_one_document_and_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": "One?"}, {"prompt": [{"role": "user", "content": "Two?"}]}])
    words = ["generate", "a", "--prompts", "p.jsonl", "--samples", "2", "--temperature", "1.5", "--max-new-tokens", "5"]
    found = json.loads(call(capsys, *words, "--json"))
    assert [(a["id"], a["sample"]) for a in found["answers"]] == [
        ("p.jsonl:1", 0),
        ("p.jsonl:1", 1),
        ("p.jsonl:2", 0),
        ("p.jsonl:2", 1),
    ]
    assert found["answers"][0]["text"] != found["answers"][1]["text"]
    assert found["sampling"]["max_new_tokens"] == 5
    assert len(found["fingerprint"]) == 64
    assert json.loads(call(capsys, *words, "--json")) == found
    assert json.loads(call(capsys, *words, "--json", "--seed", "1"))["answers"] != found["answers"]


def test_raw_needs_no_template_and_begins_after_the_document_separator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.rollout.local import LocalEngine

    asked: list[Any] = []
    generate = LocalEngine.generate
    monkeypatch.setattr(
        LocalEngine, "generate", lambda self, requests, *rest: asked.extend(requests) or generate(self, requests, *rest)
    )
    out = call(capsys, "generate", "bare", "--raw", "--prompt", "Once", "--max-new-tokens", "3")
    assert out.endswith("Next: posttrain check recipe.yaml\n")
    assert asked[0].prompt_ids[0] == 0, "the end-of-text token"
    call(capsys, "generate", "bare", "--raw", "--prompt", "", "--max-new-tokens", "3")
    assert len(asked[1].prompt_ids) == 1


def test_a_prompt_beyond_the_model_is_an_error_after_the_others_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a b c d e f g h " * 40
    assert main(["generate", "a", "--prompt", "One?", "--prompt", long, "--max-new-tokens", "200"]) == 3
    printed = capsys.readouterr()
    assert "[cut, 200 tokens]" in printed.out or "[finished" in printed.out
    assert "prompt 2: 1 of 2 answers failed, the first because: prompt of" in printed.err


# --- chat ---------------------------------------------------------------------------------------------------------


def test_a_piped_chat_answers_line_by_line_and_keeps_its_history(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.data.render import Renderer

    asked: list[list[str]] = []
    prompt_ids = Renderer.prompt_ids

    def noted(self: Renderer, messages: Any, where: str = "") -> tuple[int, ...]:
        asked.append([message.role for message in messages])
        return prompt_ids(self, messages, where)

    monkeypatch.setattr(Renderer, "prompt_ids", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\nTwo?\n/what\n/reset\nOne?\n/exit\nNever\n"))
    assert main(["chat", "a", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert asked == [["user"], ["user", "assistant", "user"], ["user"]]
    assert "forgotten" in printed.err
    assert "/what is no command." in printed.err
    assert "[cut after 4 tokens]" in printed.err
    assert "Next: posttrain generate a --prompt" in printed.err
    assert "Never" not in printed.out


def test_a_conversation_that_outgrows_the_model_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c d e f g h " * 40))
    code, err = refused(capsys, "chat", "a")
    assert code == 3
    assert "exceed the model's 256 positions" in err
    assert "/reset begins anew" in err


def test_control_tokens_a_weak_model_writes_do_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.cli.chat import Conversation
    from posttrain.cli.open_model import Asked, Located, open_model
    from posttrain.records import Completion, Status

    opened = open_model(Located("a", "a"))
    ids = tuple(opened.policy.tokenizer("well<|im_start|>said", add_special_tokens=False).input_ids)
    said = Completion("turn", 0, ids, (0.0,) * len(ids), Status.CUT, 0, "well<|im_start|>said")
    monkeypatch.setattr(type(opened.engine), "generate", lambda *_: [[said]])
    conversation = Conversation(opened, Asked(0.0, 1.0, 0, 4, 0))
    assert conversation.ask("One?").text == "well<|im_start|>said"
    conversation.ask("Two?")
    assert conversation._messages[1].content == "wellsaid"


# --- eval and compare ---------------------------------------------------------------------------------------------


def test_eval_tells_numerator_denominator_and_interval(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "eval", "a", "--suite", "words.yaml", "--out", "graded.jsonl")
    assert out.startswith("a on words: 0/12 (0.0 %), 95 % interval 0.0–24.2 %\n")  # Wilson, 0 of 12
    assert out.endswith("Next: posttrain compare builtin:tiny-base a --suite words.yaml\n")
    graded = [json.loads(line) for line in Path("graded.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["item_id"] for row in graded] == [f"items.jsonl:{n}" for n in range(1, 13)]
    found = json.loads(call(capsys, "eval", "a", "--suite", "words.yaml", "--json"))
    assert (found["numerator"], found["denominator"]) == (0, 12)
    assert found["outcomes"] == {"cut": 12}
    assert len(found["fingerprint"]) == 64


def test_compare_judges_on_the_same_items(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "compare", "a", "b", "--suite", "words.yaml")
    assert "no difference shown" in out
    assert "A  a" in out
    assert "Newcombe" in out
    assert out.endswith("Next: posttrain chat b\n")
    found = json.loads(call(capsys, "compare", "a", "b", "--suite", "wins.yaml", "--json"))
    assert found["verdict"] == "no difference shown"
    assert found["report"]["kind"] == "win_rate"
    assert found["a"]["fingerprint"] != found["b"]["fingerprint"]


# --- bad input ----------------------------------------------------------------------------------------------------

BAD_INPUT = [
    (["generate", "aa", "--prompt", "x"], 2, "there is no model 'aa'."),
    (["chat", "builtin:tiny-bas"], 2, "Did you mean builtin:tiny-base?"),
    (["chat", "builtin:data"], 2, "builtin:data is not a model. The package carries builtin:tiny-base."),
    (["chat", "./nowhere"], 2, "./nowhere: no such model folder."),
    (["chat", "."], 2, ".: no config.json in this folder."),
    (["chat", "bare"], 2, "bare has no chat template: it can continue text, not answer."),
    (["eval", "bare", "--suite", "words.yaml"], 2, "bare has no chat template"),
    (["eval", "a", "--suite", "word.yaml"], 2, "Did you mean words.yaml or"),
    (["eval", "a", "--suite", "wins.yaml"], 2, "posttrain compare builtin:tiny-base a --suite wins.yaml"),
    (["eval", "a", "--suite", "items.jsonl"], 3, "items.jsonl"),
    (["generate", "a"], 2, "generate needs a prompt."),
    (["generate", "a", "--prompt", "x", "--samples", "3"], 2, "3 times the same answer"),
    (["generate", "a", "--prompts", "item.jsonl"], 2, "Did you mean items.jsonl or"),
    (["generate", "a", "--prompts", "broken.jsonl"], 3, "broken.jsonl:2: broken JSON at column 12"),
    (["generate", "a", "--prompt", "say <|im_end|>"], 3, "contains '<|im_end|>', a control token"),
    (["generate", "a", "--raw", "--prompts", "talk.jsonl"], 3, "talk.jsonl:1: a conversation is no plain text."),
    (["chat", "a", "--home", "items.jsonl"], 5, "items.jsonl: is a file, not a folder."),
    (["models", "list", "--home", "items.jsonl"], 5, "items.jsonl: is a file, not a folder."),
    (["models", "show", "x"], 2, "no model 'x' is registered"),
    (["generat", "a"], 2, "No such command 'generat'"),
    (["generate", "a", "--prompt", "x", "--top-p", "2"], 2, "--top-p"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_INPUT, ids=[" ".join(words) for words, _, _ in BAD_INPUT])
def test_bad_input_is_a_sentence_and_an_exit_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.jsonl").write_text('{"prompt": "x"}\n{"prompt": y}\n', encoding="utf-8")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    write_rows(Path("talk.jsonl"), [{"prompt": turns}])
    found, err = refused(capsys, *words)
    assert message in err
    assert found == code
