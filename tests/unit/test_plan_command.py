"""`posttrain plan`: models too large for this machine, what to change, and every method measured on a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import rows, tiny_base

from posttrain.cli import main
from posttrain.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, RecipeError
from posttrain.plan import estimate, remedies
from posttrain.plan.child import Watch, measure
from posttrain.plan.measure import _read
from posttrain.plan.target import gpu_target, this_machine
from posttrain.recipe import Recipe, load_recipe
from posttrain.settings import FAMILY, MAKES_DATA, METHODS

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 1 << 30
SAMPLES = (*FAMILY, "ppo", "distill")
DATA = {"sft": "sft", "kto": "kto", "process_reward_model": "steps", **dict.fromkeys((*SAMPLES, "reject"), "tasks")}
TRAINS = [method for method in METHODS if method not in MAKES_DATA]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_base(folder / "base", num_hidden_layers=4)
    tiny_base(folder / "teacher", num_hidden_layers=5)
    for name, words in (("", [f"Is {i} fine?" for i in range(24)]), ("-eval", [f"Was {i} it?" for i in range(8)])):
        sft = [{"prompt": q, "completion": "It is. " * (1 + i % 5)} for i, q in enumerate(words)]
        rows(folder / f"sft{name}.jsonl", sft)
        rows(folder / f"pairs{name}.jsonl", [{"prompt": q, "chosen": "It is fine.", "rejected": "No."} for q in words])
        thumbs = [{"prompt": q, "completion": "It is.", "label": i % 2 == 0} for i, q in enumerate(words)]
        rows(folder / f"kto{name}.jsonl", thumbs)
        steps = [{"prompt": q, "completions": ["One.", "Two."], "labels": [True, False]} for q in words]
        rows(folder / f"steps{name}.jsonl", steps)
        rows(folder / f"tasks{name}.jsonl", [{"prompt": q, "answer": "yes"} for q in words])
    return folder


def recipe(folder: Path, model: str, *stages: Mapping[str, Any], file: str = "recipe.yaml") -> Recipe:
    (folder / file).write_text(yaml.safe_dump({"name": "planned", "model": model, "stages": list(stages)}))
    return load_recipe(folder / file)


def stage(method: str, *, first: bool = True, **keys: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"datasets": [{"path": f"{DATA.get(method, 'pairs')}.jsonl"}], **keys}
    if "rewards" in METHODS[method].model_fields:
        found |= {"rewards": ["exact"]} | keys
    if method == "distill":
        found |= {"teacher": "./teacher"} | keys
    if first and "allow_without_sft" in METHODS[method].model_fields:
        found["allow_without_sft"] = True
    return {method: found}


BIG = """
import json, re, sys, time
from posttrain.plan import estimate
from posttrain.plan.target import gpu_target
from posttrain.recipe import load_recipe
from pathlib import Path
for file in sys.argv[1:]:
    began = time.process_time()
    planned = estimate.plan(estimate.gather(load_recipe(file), Path("home"), gpu_target("h100-80gb")))
    peaks = [stage.peak.bytes for stage in planned.stages]
    seconds = time.process_time() - began
    # Not ru_maxrss: that begins with what the process that started this one had.
    mib = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"n_params": planned.shape.n_params, "seconds": seconds, "mib": mib, "peaks": peaks}))
"""


def test_shapes_far_beyond_this_machine_take_seconds_and_megabytes(place: Path) -> None:
    """Three stages each, from a folder with nothing but a config.json."""
    files = []
    for name in ("qwen3-8b", "llama-3-70b", "qwen3-30b-a3b"):
        stages = [
            stage("sft"),
            stage("dpo", first=False, adapter="lora"),
            stage("grpo", first=False, adapter="lora", gradient_checkpointing=True),
        ]
        files.append(str(recipe(place, str(CONFIGS / name), *stages, file=f"{name}.yaml").path))
    done = subprocess.run([sys.executable, "-c", BIG, *files], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["n_params"] for line in found] == [8_190_735_360, 70_553_706_496, 30_532_122_624]
    assert all(line["seconds"] < 10 for line in found), found
    assert all(line["mib"] < 2048 for line in found), found
    assert all(min(line["peaks"]) > 2 * line["n_params"] for line in found)


def test_what_does_not_fit_is_said_with_the_first_setting_to_change(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(place, str(CONFIGS / "qwen3-8b"), stage("sft", adapter="lora", max_steps=10)).path
    assert main(["plan", str(file), "--gpu", "rtx-4090", "--count", "2", "--json"]) == EXIT_DOES_NOT_FIT
    found = json.loads(capsys.readouterr().out)
    (only,) = found["stages"]
    assert found["label"] == "estimate"
    assert not found["fits"]
    assert only["peak_bytes"] > 24 * GIB
    assert [change["set"] for change in only["change"]][-1] == {"adapter": "qlora"}
    assert only["change"][-1]["peak_bytes"] < 24 * GIB
    assert only["smallest_gpu"] is not None
    assert only["if_sharded_bytes"] < only["peak_bytes"]
    assert only["seconds"]["n_steps"] == 10
    assert main(["plan", str(file), "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    assert "fits" in said
    assert "Estimates for h200-141gb" in said
    assert said.rstrip().endswith(f"Next: posttrain run {file}")


def test_the_change_that_is_named_is_enough_and_none_before_it_is(place: Path) -> None:
    planned_for = recipe(place, "./base", stage("sft", max_length=64, per_device_train_batch_size=24))
    here = this_machine()
    facts = estimate.gather(planned_for, place / "home", here)
    (planned,) = estimate.plan(facts).stages
    alone = [c for c in remedies.candidates(planned.stage.settings) if c[0] == {"gradient_checkpointing": True}]
    with_it = remedies._try(facts, planned.stage, *alone[0])
    assert with_it is not None
    assert with_it.bytes < planned.peak.bytes
    tight = replace(facts, target=replace(here, memory=with_it.bytes))
    (change,) = remedies.first_change(tight, planned)
    assert change.fits
    for settings, why in remedies.candidates(planned.stage.settings):
        if settings.keys() == change.settings.keys():
            break
        before = remedies._try(tight, planned.stage, settings, why)
        assert before is None or not before.fits


def test_where_nothing_is_enough_every_setting_that_helps_is_named(place: Path) -> None:
    planned_for = recipe(place, str(CONFIGS / "llama-3-70b"), stage("sft"))
    facts = estimate.gather(planned_for, place / "home", gpu_target("t4"))
    (planned,) = estimate.plan(facts).stages
    changes = remedies.first_change(facts, planned)
    assert [change.fits for change in changes] == [False] * len(changes)
    assert {key for change in changes for key in change.settings} >= {"gradient_checkpointing", "adapter"}
    peaks = [change.bytes for change in changes]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert remedies.smallest_gpu(facts, planned) is None


@pytest.mark.parametrize("method", TRAINS)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_every_method_is_planned_and_measured(method: str, adapter: str, place: Path, tmp_path: Path) -> None:
    """The real code path in this process; the phases that are planned are the phases there are."""
    keys: dict[str, Any] = {"adapter": adapter, "max_length": 64, "per_device_train_batch_size": 8, "max_steps": 3}
    keys |= {"micro_batch_tokens": 96, "eval_datasets": [{"path": f"{DATA.get(method, 'pairs')}-eval.jsonl"}]}
    if method in SAMPLES:
        keys |= {"max_completion_length": 6}
    if method in FAMILY:
        keys |= {"num_generations": 2}
    planned_for = recipe(place, "./base", stage(method, **keys))
    facts = estimate.gather(planned_for, place / "home", this_machine())
    (planned,) = estimate.plan(facts).stages
    out = tmp_path / "found.jsonl"
    measure(planned_for, planned_for.stages[0], place / "home", Watch(out), tmp_path / "work")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = _read(lines, 0, "")
    names = [phase.name for phase in found.phases]
    assert names[:2] == ["load", "prepare the rows and ask the reference"]
    assert names[-5:] == ["train", "evaluate", "save a checkpoint", "save", "prove what was saved"]
    assert ("sample" in names) == (method in SAMPLES) == any(p.name == "sample" for p in planned.held.phases)
    assert found.tokens_per_second is not None
    assert found.tokens_per_second > 0
    assert found.n_steps == 3
    assert found.disk["artefact"] == pytest.approx(planned.disk["artefact"], rel=0.5, abs=600_000)
    assert found.disk["checkpoint"] * 2 == pytest.approx(planned.disk["two checkpoints"], rel=0.3, abs=100_000)
    if method not in SAMPLES:
        assert found.seconds_left is not None


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("grpo", {"num_generations": 2, "num_iterations": 2, "steps_per_generation": 3}),
        ("gspo", {"num_generations": 2, "steps_per_generation": 2}),
        ("ppo", {"num_ppo_epochs": 2, "num_mini_batches": 2}),
        ("distill", {"lmbda": 0.5}),
    ],
)
def test_steps_are_counted_as_the_method_counts_them(
    method: str, keys: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    common = {"max_length": 64, "per_device_train_batch_size": 4, "max_completion_length": 6, "num_train_epochs": 2}
    if method == "distill":
        keys = keys | {"datasets": [{"path": "sft.jsonl"}]}
    planned_for = recipe(place, "./base", stage(method, **common, **keys))
    (planned,) = estimate.plan(estimate.gather(planned_for, place / "home", this_machine())).stages
    out = tmp_path / "found.jsonl"
    measure(planned_for, planned_for.stages[0], place / "home", Watch(out), tmp_path / "work")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert planned.times.n_steps == _read(lines, 0, "").n_steps
    assert planned.times.sample


def test_a_stage_that_makes_data_is_named_and_what_learns_from_it_is_planned_by_the_longest_rows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learns = {"sft": {"datasets": [{"stage": "reject"}], "max_length": 64, "max_steps": 2}}
    file = recipe(place, "./base", stage("reject"), learns).path
    assert main(["plan", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_estimated"] == ["1-reject"]
    assert found["stages"][0]["rows"].endswith("(reject makes them)")
    assert main(["plan", str(file)]) == 0
    assert "1-reject makes data and trains nothing" in capsys.readouterr().out
    assert main(["plan", str(file), "--measure"]) == EXIT_USAGE
    assert "2-sft learns from what reject makes" in capsys.readouterr().err


def test_the_command_measures_in_a_process_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"max_length": 64, "per_device_train_batch_size": 8, "max_steps": 2}
    file = recipe(place, "./base", stage("sft", **keys)).path
    assert main(["plan", str(file), "--measure", "--json", "--home", str(place / "home")]) == 0
    (only,) = json.loads(capsys.readouterr().out)["stages"]
    measured = only["measured"]
    assert measured["failed"] is None
    assert {phase["name"] for phase in measured["phases"]} >= {"load", "train", "save"}
    assert all(phase["bytes"] > measured["process"] * 0.9 for phase in measured["phases"])
    assert not (place / "home" / "runs").exists(), "nothing of it is a run"


def test_faults_of_the_child_are_told_as_a_run_would_tell_them() -> None:
    fault = {"fault": "row 3 is bad.", "where": "a.jsonl:3", "remedy": "Mend it.", "exit_code": EXIT_USAGE}
    begun = {"begin": "train"}
    with pytest.raises(RecipeError, match=r"a\.jsonl:3: row 3 is bad"):
        _read([{"begin": "prepare"}, fault], EXIT_USAGE, "")
    memory = _read([begun, {**fault, "fault": "out of memory."}], EXIT_DOES_NOT_FIT, "")
    assert memory.failed == "train: out of memory."
    killed = _read([{"phase": "load", "bytes": 5, "seconds": 1.0}, begun], -9, "")
    assert killed.failed is not None
    assert killed.failed.startswith("train: the system killed")
    assert killed.peak is not None
    assert killed.peak.bytes == 5
    with pytest.raises(RuntimeError, match="code 1 in 'train': Traceback"):
        _read([begun], 1, "Traceback")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h-1000"], "--gpu h-1000 is not in the table"),
        (["--gpu", "h100", "--measure"], "--measure runs on this machine"),
        (["sft.max_length=0"], "max_length"),
    ],
)
def test_what_it_refuses(words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(place, "./base", stage("sft")).path
    assert main(["plan", str(file), *words]) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_a_folder_without_a_config_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir(exist_ok=True)
    file = recipe(place, "./empty", stage("sft")).path
    assert main(["plan", str(file), "--gpu", "h100"]) == EXIT_USAGE
    assert "no config of model" in capsys.readouterr().err


def test_two_gpus_are_not_promised_what_one_process_cannot_use(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(place, "./base", stage("sft", max_length=64)).path
    assert main(["plan", str(file), "--gpu", "h100", "--count", "8"]) == 0
    assert "7 of 8 would stand idle" in capsys.readouterr().out
