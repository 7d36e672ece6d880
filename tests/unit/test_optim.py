"""Learning rates worked by hand, what decays, and what metrics.jsonl writes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.settings import SFTSettings
from posttrain.train.metrics import MetricsLog, read_metrics
from posttrain.train.objective import Evaluation
from posttrain.train.optim import learning_rate, make_optimizer, warmup_steps


def settings(**changes: Any) -> SFTSettings:
    return SFTSettings(**{"datasets": [{"path": "x"}], "learning_rate": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        # 2 warm-up steps, then progress (step − 2)/8: step 6 is half-way, step 9 at 7/8
        ({"warmup_steps": 2}, {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.8535533906, 6: 0.5, 9: 0.0380602337}),
        ({"warmup_steps": 2, "min_lr_ratio": 0.1}, {0: 0.5, 2: 1.0, 6: 0.55, 9: 0.1 + 0.9 * 0.0380602337}),
        ({"warmup_steps": 2, "lr_scheduler_type": "linear"}, {1: 1.0, 2: 1.0, 4: 0.75, 6: 0.5, 9: 0.125}),
        ({"warmup_steps": 0, "lr_scheduler_type": "linear", "min_lr_ratio": 0.5}, {0: 1.0, 5: 0.75, 9: 0.55}),
        ({"warmup_steps": 4, "lr_scheduler_type": "constant"}, {0: 0.25, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0}),
        ({"warmup_ratio": 0.3}, {0: 1 / 3, 2: 1.0, 3: 1.0}),
        ({"warmup_steps": 20}, {0: 0.05, 9: 0.5}),
    ],
)
def test_ten_steps_by_hand(changes: dict[str, Any], rates: dict[int, float]) -> None:
    s = settings(**changes)
    assert {step: learning_rate(step, 10, s) for step in rates} == pytest.approx(rates, abs=1e-9)


def test_warm_up_is_a_share_of_the_steps_rounded_up() -> None:
    assert warmup_steps(settings(), 20) == 1  # 0.03 · 20 = 0.6
    assert warmup_steps(settings(warmup_ratio=0.07), 100) == 7  # not 8: 0.07 · 100 = 7.000000000000001
    assert warmup_steps(settings(warmup_ratio=0.0), 100) == 0
    assert warmup_steps(settings(warmup_steps=5), 100) == 5


def test_matrices_decay_and_vectors_do_not() -> None:
    """Without a gradient AdamW only decays: w ← w·(1 − rate·decay) = 1 − 0.5·0.1."""
    parameters = {"w": nn.Parameter(torch.ones(2, 2)), "norm": nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(parameters, settings(learning_rate=0.5, weight_decay=0.1))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert parameters["w"].tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert parameters["norm"].tolist() == [1, 1]


def test_one_adam_step_by_hand() -> None:
    """The first step moves w by rate·g/(|g| + ε) = 0.5·2/(2 + 2): the averages of g and g² are corrected to both."""
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_optimizer({"w": w}, settings(learning_rate=0.5, adam_epsilon=2.0))
    w.grad = torch.tensor([2.0])
    optimizer.step()
    assert w.item() == pytest.approx(0.75)


def test_small_rates_are_written_with_all_their_digits_and_nan_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_after=0)
    log.write(1, {"learning_rate": 1.23456789e-7, "loss": 12345.678912345, "eval_reward": float("nan"), "tokens": 7})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "learning_rate": 1.23456789e-7,
        "loss": 12345.6789,
        "eval_reward": None,
        "tokens": 7,
    }
    assert log.last("loss") == 12345.6789
    assert log.last("eval_reward") is None


def test_a_log_forgets_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, resume_after=2)
    log.write(3, {"loss": 0.5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_better_is_higher_or_lower_as_the_method_says_and_never_nan() -> None:
    nan = float("nan")

    def beats(new: float, old: float, *, higher: bool) -> bool:
        return Evaluation({}, new, higher).beats(old)

    assert beats(2, 1, higher=True)
    assert not beats(1, 2, higher=True)
    assert beats(1, 2, higher=False)
    assert not beats(1, 1, higher=True)
    assert not beats(nan, 1, higher=True)
    assert beats(1, nan, higher=True)
    assert beats(1, nan, higher=False)
    assert not beats(nan, nan, higher=True)
