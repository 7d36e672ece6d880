"""`posttrain run` on a tiny recipe, from base to champion, and every command that speaks of what it left behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_model, write_rows

from posttrain.cli import main

# Every question has the answer "yes": a random model never gives it, and learns it in a few steps.
RECIPE = """\
name: yes
model: ./base
stages:
  - sft:
      datasets: [{path: train.jsonl}]
      learning_rate: 1.0e-2
      max_steps: 60
      per_device_train_batch_size: 8
      max_length: 64
      gate: {suite: suite.yaml}
  - dpo:
      datasets: [{path: pairs.jsonl}]
      max_steps: 1
      max_length: 64
      gate: {suite: suite.yaml, on_fail: keep_parent}
register: assistant
"""
SUITE = "name: says-yes\nitems: heldout.jsonl\nscore: [exact]\nsampling: {max_new_tokens: 4}\n"


@dataclass(frozen=True)
class Printed:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its base and data, and home/ where it was run once."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny_model(folder / "base")
    asked = [f"Is {n} a number?" for n in range(40)]
    answers = [[{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}] for q in asked[:20]]
    write_rows(folder / "train.jsonl", [{"messages": messages} for messages in answers])
    write_rows(folder / "pairs.jsonl", [{"prompt": q, "chosen": "yes", "rejected": "no"} for q in asked[:8]])
    write_rows(folder / "heldout.jsonl", [{"prompt": q, "answer": "yes"} for q in asked[20:]])
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "yes.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["run", str(folder / "yes.yaml"), "--home", str(folder / "home")]) == 0
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that to spoil; the home is the default one."""
    shutil.copytree(folder, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    Path("home").rename("posttrain-home")
    monkeypatch.delenv("POSTTRAIN_HOME", raising=False)
    return tmp_path / "work"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Printed:
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Printed(code, printed.out, printed.err)

    return run


def test_the_table_goes_to_stdout_and_the_story_to_stderr(here: Path, call: Any) -> None:
    shutil.rmtree("posttrain-home")
    found = call("run", "yes.yaml")
    assert found.code == 0
    lines = [" ".join(line.split()) for line in found.out.splitlines()]
    assert any(line.startswith("1-sft 0/20 (0.0 %) 20/20 (100.0 %) +100.0 passed") for line in lines)
    assert any(line.startswith("2-dpo 20/20 (100.0 %) 20/20 (100.0 %) +0.0 refused") for line in lines)
    assert any(
        line.startswith(f"Champion: assistant@1 in {here}/posttrain-home/artefacts/assistant/1-sft-") for line in lines
    )
    assert found.out.endswith("\n\nNext: posttrain chat assistant\n")
    assert "1-sft: starts from ./base" in found.err
    assert "Loading weights" not in found.err
    assert "Writing model shards" not in found.err


def test_warnings_of_the_recipe_are_said_once(here: Path, call: Any) -> None:
    del here
    found = call("run", "yes.yaml", "sft.num_train_epochs=2", "sft.max_steps=null", "dpo.gate=null")
    assert found.err.count("has no gate: it will not be promoted") == 1


def test_running_again_finds_everything_finished(here: Path, call: Any) -> None:
    del here
    found = call("run", "yes.yaml")
    assert found.code == 0
    assert found.err.count("finished before") == 2
    assert "changed since" not in found.err
    assert "steps in" not in found.err
    assert "Champion: assistant@1" in found.out


def test_a_changed_recipe_says_what_changed_and_redoes_it(here: Path, call: Any) -> None:
    del here
    found = call("run", "yes.yaml", "dpo.beta=0.3")
    assert "changed since the last run: 2-dpo.beta: 0.1 → 0.3" in found.err
    assert found.err.count("finished before") == 1
    assert "2-dpo: 1 steps in" in found.err or "2-dpo: 1 step in" in found.err


def test_run_json_is_one_document(here: Path, call: Any) -> None:
    del here
    found = json.loads(call("run", "yes.yaml", "--json").out)
    assert (found["ok"], found["champion"], found["refused"]) == (True, "assistant@1", None)
    assert [(s["stage"], s["accepted"], s["version"]) for s in found["stages"]] == [
        ("1-sft", True, 1),
        ("2-dpo", False, None),
    ]
    assert found["stages"][0]["gate"]["after"]["numerator"] == 20


def test_a_refused_run_shows_its_gates_and_exits_with_4(here: Path, call: Any) -> None:
    del here
    found = call("run", "yes.yaml", "dpo.gate.on_fail=stop")
    assert found.code == 4
    assert "2-dpo" in found.out
    assert "refused" in found.out
    assert "Next:" not in found.out
    assert "2-dpo did not pass its gate" in found.err
    document = json.loads(call("run", "yes.yaml", "dpo.gate.on_fail=stop", "--json").out)
    assert (document["ok"], document["champion"]) == (False, None)
    assert "2-dpo did not pass its gate" in document["refused"]
    assert [s["stage"] for s in document["stages"]] == ["1-sft", "2-dpo"]


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    here: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del here
    from posttrain import pipeline

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    found = call("run", "yes.yaml", "dpo.beta=0.3", "--home", "elsewhere")
    assert found.code == 130
    assert "To go on: posttrain run yes.yaml dpo.beta=0.3 --home elsewhere" in found.err


def test_what_the_run_registered(here: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del here
    listed = json.loads(call("models", "list", "--json").out)
    assert [(e["name"], e["version"], e["aliases"]) for e in listed] == [("assistant", 1, ["candidate", "champion"])]
    assert "base model" in call("models", "lineage", "assistant").out
    generated = json.loads(call("generate", "assistant", "--prompt", "Is 99 a number?", "--json").out)
    assert [(a["text"], a["status"]) for a in generated["answers"]] == [("yes", "finished")]
    assert generated["model"] == "assistant@1"
    assert generated["fingerprint"] == listed[0]["fingerprint"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is 98 a number?\nIs 97 a number?\n"))
    assert call("chat", "assistant@champion").out.splitlines()[0] == "yes"
    assert call("eval", "assistant@1", "--suite", "suite.yaml").out.startswith(
        "assistant@1 on says-yes: 20/20 (100.0 %), 95 % interval 83.9–100.0 %\n"
    )
    assert "\nB is better\n" in call("compare", "./base", "assistant", "--suite", "suite.yaml").out
    assert "\nB is worse\n" in call("compare", "assistant", "./base", "--suite", "suite.yaml").out


def test_promote_and_roll_back(here: Path, call: Any) -> None:
    del here
    call("run", "yes.yaml", "seed=2")
    assert "assistant@champion is version 1 again" in call("models", "rollback", "assistant").out
    promoted = call("models", "promote", "assistant@2").out
    assert promoted.startswith("assistant@champion is now version 2")
    assert promoted.endswith("Next: posttrain chat assistant@champion\n")


BAD_INPUT = [
    (["chat", "asistant"], 2, "there is no model 'asistant'. Did you mean assistant?"),
    (["chat", "assistant@7"], 2, "assistant: has no version or alias '7'. It has versions 1;"),
    (["run", "yes.yaml", "sft.learning_rat=1"], 2, "Did you mean learning_rate?"),
    (["run", "yes.yaml", "sft.max_steps"], 2, "Overrides are key=value."),
    (["run", "yes.yaml", "--home", "yes.yaml"], 5, "is a file, not a folder."),
    (["run", "yes.yaml", "--home", "/proc/here"], 5, "/proc/here: cannot be written"),
    (["run"], 2, "run needs a recipe"),
    (["demo", "seed"], 2, "demo takes overrides key=value, not 'seed'."),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_INPUT, ids=[" ".join(words) for words, _, _ in BAD_INPUT])
def test_bad_input_is_a_sentence_and_an_exit_code(
    words: list[str], code: int, message: str, here: Path, call: Any
) -> None:
    del here
    found = call(*words)
    assert message in found.err
    assert found.code == code


def test_a_damaged_champion_does_not_answer(here: Path, call: Any) -> None:
    weights = next(here.glob("posttrain-home/artefacts/assistant/1-sft-*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    found = call("chat", "assistant")
    assert found.code == 5
    assert "model.safetensors is corrupt" in found.err


def test_the_demo_shows_base_and_champion(here: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's story on the tiny recipe; what the packaged one reaches is not this test's business."""
    from posttrain.cli import demo

    del here
    monkeypatch.setattr(demo, "RECIPE", "yes.yaml")
    found = call("demo", "--seed", "0", "--home", "posttrain-home")
    assert found.code == 0
    assert "./base is a base model" in found.out
    assert "1-sft   imitates answers, so that it answers at all (gate suite.yaml)" in found.out
    assert "The first held-out question\n  Is 20 a number?\n\nbefore, ./base\n" in found.out
    assert "\nafter, assistant@1\n  yes\n  [finished, " in found.out
    assert found.err.count("finished before") == 2
    assert found.out.endswith("\nNext: posttrain chat assistant --home posttrain-home\n")
