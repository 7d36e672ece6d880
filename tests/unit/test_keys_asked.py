"""Every key is asked for by the code that does the work, seen while real runs of all methods go by.

`test_keys.py` compares names, and names such as `path`, `max` or `r` stand everywhere. Here each section notes who asks
it for what. The recipe layer, which checks and shows every key, does not count.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from small_run import dpo, gate, go, grpo, ppo, preference, recipe, rows, sft, small_data, tiny_base

from posttrain.errors import GateRefused
from posttrain.gate.suites import SuiteSettings
from posttrain.settings import (
    FAMILY,
    METHODS,
    DatasetSettings,
    DecontaminateSettings,
    DedupSettings,
    FilterSettings,
    GateSettings,
    HealthSettings,
    LoraSettings,
    OwnRule,
    PreferenceHealthSettings,
    RecipeSettings,
    Retry,
    RuleSettings,
    ScorerSettings,
    Section,
)

Asked = set[tuple[type, str]]
SECTIONS: tuple[type[Section], ...] = (
    *METHODS.values(),
    DatasetSettings,
    FilterSettings,
    DecontaminateSettings,
    DedupSettings,
    LoraSettings,
    GateSettings,
    Retry,
    HealthSettings,
    PreferenceHealthSettings,
    RuleSettings,
    OwnRule,
    ScorerSettings,
    RecipeSettings,
    SuiteSettings,
)
# These are handed on whole, by model_dump: what a suite asks of the sampler, and what makes its fingerprint.
HANDED_ON = {(SuiteSettings, "sampling")}


@contextmanager
def noted() -> Iterator[Asked]:
    """Who asked which section for what. A recipe's own top keys are copied into `Recipe` by the loader."""
    asked: Asked = set()

    def note(self: Any, name: str) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        works = caller.startswith("posttrain.") and not caller.startswith(("posttrain.recipe", "posttrain.settings"))
        if works or (type(self) is RecipeSettings and caller == "posttrain.recipe.load"):
            asked.add((type(self), name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", note, raising=False)
        yield asked


def never_asked(sections: tuple[type[Section], ...], asked: Asked) -> list[str]:
    """A preset has the keys of the method it sets up, which asks for them."""
    asked = asked | HANDED_ON
    of = {s: FAMILY["grpo"] if s in FAMILY.values() else s for s in sections}
    return [f"{s.__name__}.{key}" for s in sections for key in s.model_fields if (of[s], key) not in asked]


OK = {"format": {"pattern": ".+", "example": "ok"}}


def judged_by_a_model(**changes: Any) -> dict[str, Any]:
    stage = grpo(dynamic_sampling=True, overlong_buffer=2, old_log_probs="trainer", **changes)
    stage["grpo"]["rewards"].append({"reward_model": {"model": "reward_model", "weight": 0.5}})
    return stage


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """One run that has everything: a mixture, adapters, held-out rows, gates that keep, and one that sends back."""
    folder = tmp_path_factory.mktemp("keys")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tiny_base(folder / "base")
    small_data(folder)
    (folder / "set").mkdir()  # read as a data set of the Hub is
    shutil.copy(folder / "sft.jsonl", folder / "set" / "train.jsonl")
    mixed = [{"path": "sft.jsonl", "weight": 3.0, "shuffle_seed": 1}, {"path": "set", "weight": 1.0}]
    rows(folder / "eval.jsonl", [{"prompt": "Fine?", "completion": "ok"}] * 2)
    lora = dict(
        adapter="dora", lora={"r": 4, "loraplus": True}, max_steps=2, learning_rate=1e-3, lr_scheduler_type="linear"
    )
    back = {"retry": {"stage": "2-sft", "max": 1}}
    halved = {"own": [{"metric": "learning_rate", "above": 9e-4, "steps": 1, "action": "rollback"}]}
    clean = {"dedup": {"near": 0.9}, "decontaminate": {"against": ["held-out.jsonl"]}}
    pairs = [{"prompt": f"Is it {i}?", "chosen": "now", "rejected": "ok"} for i in range(12)]
    rows(folder / "agrees.jsonl", pairs)
    (folder / "agrees.yaml").write_text("name: agrees\nkind: pairs\nitems: agrees.jsonl\n")
    tiny_base(folder / "teacher", seed=9)
    sampling = dict(datasets=[{"path": "grpo.jsonl", "limit": 8}], max_length=64, max_completion_length=4)
    rows(folder / "steps.jsonl", [{"prompt": "Fine?", "steps": ["ok", "now"], "labels": [False, True]}] * 8)
    written = recipe(
        folder,
        sft(datasets=mixed),  # until answers end, and sometimes not: the rewards need spread
        sft(**lora, eval_datasets=[{"path": "eval.jsonl"}], filters={"languages": ["en"]}, **clean),
        dpo(**lora, health=halved, gate=gate("never", on_fail="keep_parent")),
        dpo(max_steps=1, loss_type=["discopop", "ipo"], beta=0.1, sync_ref_model=True, ref_model_sync_steps=1),
        dpo(max_steps=1, f_divergence_type="alpha_divergence"),
        *(
            # Rows of another length limit: what one stage prepared would serve the next.
            preference(m, **lora, max_length=50 + i, gate=gate("never", on_fail="keep_parent"))
            for i, m in enumerate(("kto", "simpo", "cpo", "orpo"))
        ),
        preference("reward_model", **lora, max_length=60, gate=gate("agrees", min_gain=-0.9)),
        preference("process_reward_model", **lora, datasets=[{"path": "steps.jsonl"}]),
        {"reject": sampling | dict(rewards=[OK], temperature=1.0, min_reward=0.0)},
        sft(**lora, datasets=[{"stage": "reject"}], gate=gate("never", on_fail="keep_parent")),
        {"distill": sampling | lora | dict(teacher="./teacher", gate=gate("never", on_fail="keep_parent"))},
        ppo(**lora, max_length=62, kl_controller="adaptive", gate=gate("never", on_fail="keep_parent")),
        judged_by_a_model(**lora, health=halved, gate=gate("never", on_fail=back)),
    )
    with noted() as asked:
        recipe(folder, sft())  # the top of a recipe is asked while it is loaded
        with pytest.raises(GateRefused, match="also after going back 1 time"):
            go(written, folder / "home")
    return asked


def test_every_key_is_asked_for(asked: Asked) -> None:
    assert never_asked(SECTIONS, asked) == []


def test_a_key_nobody_asks_for_is_noticed(tmp_path: Path) -> None:
    """It has the name of a key that others ask for, which a comparison of names would not see."""

    class Planted(DatasetSettings):
        r: int = 1

    (tmp_path / "rows.jsonl").write_text('{"text": "once"}\n')
    with noted() as planted:
        from posttrain.data.formats import read_examples

        read_examples([Planted(path="rows.jsonl")], lambda name: tmp_path / name)
    missed = never_asked((Planted,), planted)
    assert "Planted.r" in missed and "Planted.path" not in missed
