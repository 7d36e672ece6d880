"""The recipes of a tool, of reasoning and of preferences, cut short: every stage runs, on the packaged model and their
own data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from small_run import Said

from posttrain.pipeline import RunReport, run
from posttrain.recipe import load_recipe
from posttrain.registry.files import MANIFEST
from posttrain.registry.store import ModelStore
from posttrain.train.metrics import read_metrics

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
EVEN = '[{format: {pattern: ".*[02468][^0-9]*", example: "12"}}]'
GRPO = ("max_steps=2", "per_device_train_batch_size=4", "num_generations=4")


def cut_short(
    name: str, folder: Path, *overrides: str, file: str = "recipe.yaml", said: Said | None = None
) -> tuple[RunReport, Path]:
    """Eight items a suite, and gates that keep the parent where so little training does not pass."""
    copy = Path(shutil.copytree(RECIPES / name, folder / name, dirs_exist_ok=True))
    for suite in copy.glob("*.yaml"):
        written = suite.read_text()
        if re.search(r"^score:", written, re.M):
            suite.write_text(re.sub(r"^limit:.*\n", "", written, flags=re.M) + "limit: 8\n")
    text = (copy / file).read_text()
    passing = re.sub(r"min_gain: [\d.]+(, min_score: [\d.]+)?", "min_gain: -0.99", text)
    # So little training gets nothing right; every other answer ends with an even digit.
    (copy / file).write_text(re.sub(r"rewards: (\[math\]|\*mixed)|rewards:\n +- exact:.*", f"rewards: {EVEN}", passing))
    recipe = load_recipe(copy / file, overrides)
    return run(recipe, folder / "home", said or Said()), folder / "home"


def test_reasoning(tmp_path: Path) -> None:
    """With an answer kept for whatever reward: after so little SFT few are right."""
    report, _ = cut_short(
        "reasoning",
        tmp_path,
        "1-sft.max_steps=40",
        "1-sft.datasets.1.limit=96",
        *(f"{stage}.{said}" for stage in ("2-grpo", "5-grpo") for said in GRPO),
        "2-grpo.datasets.1.limit=16",
        "5-grpo.datasets.1.limit=16",
        "3-reject.datasets.1.limit=12",
        "3-reject.min_reward=0",
        "3-reject.min_rows=1",
        "4-sft.max_steps=2",
    )
    assert [outcome.key for outcome in report.outcomes] == ["1-sft", "2-grpo", "3-reject", "4-sft", "5-grpo"]
    made = json.loads((Path(report.outcomes[2].artefact.path) / MANIFEST).read_text())
    assert sum(made["answers"].values()) == 12 * 6
    trained = json.loads((Path(report.outcomes[3].artefact.path) / MANIFEST).read_text())
    assert trained["data"]["stage 3-reject"]["rows"] == made["rows"] > 0
    assert trained["parent"]["version"] == report.outcomes[1].artefact.version
    assert all(outcome.report is not None for i, outcome in enumerate(report.outcomes) if i != 2)


def test_calculator(tmp_path: Path) -> None:
    report, home = cut_short(
        "calculator", tmp_path, "sft.max_steps=40", "sft.datasets.1.limit=96", *(f"grpo.{said}" for said in GRPO)
    )
    (file,) = (home / "runs" / "calculator").glob("2-grpo-*/metrics.jsonl")
    assert all(line["engine_failed_share"] == 0 for line in read_metrics(file))
    assert all(line["mismatch_k3"] < 1e-6 for line in read_metrics(file) if "mismatch_k3" in line)
    assert report.outcomes[-1].report is not None


def test_preference(tmp_path: Path) -> None:
    """Its variant finds the first two stages finished and is paid by the reward model."""
    short = ("1-sft.max_steps=40", "1-sft.datasets.1.limit=96", "2-reward_model.max_steps=6")
    short += ("2-reward_model.datasets.1.limit=96",)
    report, home = cut_short("preference", tmp_path, *short, "3-dpo.max_steps=2", "3-dpo.datasets.1.limit=64")
    assert [outcome.key for outcome in report.outcomes] == ["1-sft", "2-reward_model", "3-dpo"]
    sft, scores, dpo = report.outcomes
    assert scores.report is not None
    assert (scores.report.kind, scores.report.before.value, scores.report.after.denominator) == ("pairs", 0.5, 240)
    assert {entry.name for entry in ModelStore(home).entries()} == {"tiny-preferred", "tiny-preferred-reward"}

    few = tuple(f"3-grpo.{key}" for key in (*GRPO, "max_completion_length=24", "eval_datasets.1.limit=4"))
    said = Said()
    variant, _ = cut_short("preference", tmp_path, *short, *few, file="with-reward-model.yaml", said=said)
    assert [o.artefact for o in variant.outcomes[:2]] == [sft.artefact, scores.artefact]
    assert sum("finished before" in line for line in said.lines) == 2
    assert [line for line in said.lines if "changed since" in line] == [
        "changed since the last run: 3-dpo: only before",
        "changed since the last run: 3-grpo: only now",
    ]
    (file,) = (home / "runs" / "preference").glob("3-grpo-*/metrics.jsonl")
    assert all(0 < line["reward_reward_model"] < 1 for line in read_metrics(file))
    parent = json.loads((Path(variant.outcomes[2].artefact.path) / MANIFEST).read_text())["parent"]
    assert parent["version"] == sft.artefact.version, "not the reward model, nor what DPO made"
    assert dpo.artefact.version not in {o.artefact.version for o in variant.outcomes}
