"""Checkers that hang, crash, hoard or raise cost their own item and nothing else; no process outlives its use."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.errors import PosttrainError
from posttrain.records import Outcome, Score, Task
from posttrain.rewards.mix import build
from posttrain.rewards.pool import Check, CheckerPool
from posttrain.rewards.registry import REWARDS

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def pool() -> Iterator[CheckerPool]:
    with CheckerPool(n_workers=2, timeout_s=1.0, memory_mb=512) as pool:
        yield pool


def check(name: str, text: str = "right") -> Check:
    return Check(f"bad_checkers:{name}", {"text": text})


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than an unread exit status."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def await_end(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("sleep", Outcome.TIMED_OUT, "within 1 s"),
        ("spin", Outcome.TIMED_OUT, "within 1 s"),
        ("deaf", Outcome.TIMED_OUT, "within 1 s"),
        ("crash", Outcome.CHECKER_FAILED, "signal 11"),
        ("leave", Outcome.CHECKER_FAILED, "exit code 7"),
        ("say_goodbye", Outcome.CHECKER_FAILED, "SystemExit: enough"),
        ("hog", Outcome.CHECKER_FAILED, "MemoryError"),
        ("overflow", Outcome.CHECKER_FAILED, "RecursionError"),
        ("complain", Outcome.CHECKER_FAILED, "ValueError: cannot judge 'right'"),
        ("not_a_number", Outcome.CHECKER_FAILED, "nan"),
        ("above_one", Outcome.CHECKER_FAILED, "2.0"),
        ("no_such_function", Outcome.CHECKER_FAILED, "AttributeError"),
    ],
)
def test_a_bad_checker_costs_its_own_item_only(pool: CheckerPool, name: str, outcome: Outcome, detail: str) -> None:
    started = time.monotonic()
    scores = pool.run([check("well"), check(name), check("well"), check("well", "wrong"), check("well")])
    assert time.monotonic() - started < 5
    assert [s.value for s in scores] == [1.0, None, 1.0, 0.0, 1.0]
    assert scores[1].outcome is outcome
    assert detail in scores[1].detail


def test_what_a_checker_prints_is_not_an_answer(pool: CheckerPool) -> None:
    scores = pool.run([check("chatter"), check("well", "wrong"), check("from_a_thread")])
    assert [s.value for s in scores] == [0.25, 0.0, 1.0]


def test_large_texts_pass(pool: CheckerPool) -> None:
    assert pool.run([check("well", "x" * 3_000_000), check("well")])[0] == Score(0.0, Outcome.SCORED)


def test_many_hanging_items_take_their_time_limits_and_no_more() -> None:
    with CheckerPool(n_workers=2, timeout_s=0.3) as pool:
        started = time.monotonic()
        scores = pool.run([check("sleep")] * 4 + [check("well")])
        assert time.monotonic() - started < 0.3 * 2 + 3
    assert [s.outcome for s in scores] == [Outcome.TIMED_OUT] * 4 + [Outcome.SCORED]


def test_any_thread_may_ask(pool: CheckerPool) -> None:
    found: dict[int, list[float | None]] = {}

    def ask(i: int) -> None:
        texts = ["right" if (i + j) % 2 else "wrong" for j in range(10)]
        found[i] = [s.value for s in pool.run([check("well", t) for t in texts])]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert found == {i: [float((i + j) % 2) for j in range(10)] for i in range(6)}


def test_one_worker_serves_many_items(tmp_path: Path) -> None:
    with CheckerPool(n_workers=1, timeout_s=1.0) as pool:
        pool.run([check("who", str(tmp_path / "first"))])
        assert {s.value for s in pool.run([check("well")] * 200)} == {1.0}
        pool.run([check("who", str(tmp_path / "last"))])
    assert (tmp_path / "first").read_text() == (tmp_path / "last").read_text()


def test_processor_time_is_limited_by_item_not_by_lifetime() -> None:
    """An old worker must not die of the time that its earlier items took."""
    code = """
import resource, time
from posttrain.rewards.worker import _limit_time
limits = []
for _ in range(2):
    _limit_time(30)
    limits.append(resource.getrlimit(resource.RLIMIT_CPU)[0])
    end = time.process_time() + 1.1
    while time.process_time() < end: pass
print(limits[0] < 40, limits[1] - limits[0])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert out.stdout.split() in (["True", "1"], ["True", "2"])


def test_a_worker_killed_while_idle_is_replaced(tmp_path: Path) -> None:
    with CheckerPool(n_workers=1, timeout_s=2.0) as pool:
        pool.run([check("who", str(tmp_path / "pid"))])
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert pool.run([check("well")])[0].value == 1.0


def test_a_stopped_worker_times_out(tmp_path: Path) -> None:
    with CheckerPool(n_workers=1, timeout_s=0.5) as pool:
        pool.run([check("who", str(tmp_path / "pid"))])
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
        assert pool.run([check("well", "x" * 2_000_000)])[0].outcome is Outcome.TIMED_OUT
        assert pool.run([check("well")])[0].value == 1.0


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    with CheckerPool(n_workers=2, timeout_s=2.0) as pool:
        pool.run([check("who", str(tmp_path / f"{i}")) for i in range(4)])
    pids = {int(f.read_text()) for f in tmp_path.iterdir()}
    assert pids
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize(("name", "seconds"), [("who", 2.0), ("who_then_sleep", 8.0)])
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, name: str, seconds: float) -> None:
    """Even one that hangs at that moment: the kernel's alarm ends it."""
    code = f"""
import time
from posttrain.rewards.pool import Check, CheckerPool
pool = CheckerPool(n_workers=1, timeout_s=1.0)
pool.run([Check("bad_checkers:{name}", {{"text": {str(tmp_path / "pid")!r}}})])
time.sleep(3600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        deadline = time.monotonic() + 20
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert await_end(pid, seconds)


def test_a_worker_that_cannot_start_is_an_error_not_a_score() -> None:
    with (
        CheckerPool(n_workers=1, preload=("no_such_module",)) as pool,
        pytest.raises(PosttrainError, match=r"could not start: ModuleNotFoundError.*no_such_module"),
    ):
        pool.run([check("well")])


def test_a_failed_part_leaves_the_total_without_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import bad_checkers

    raising = dataclasses.replace(
        REWARDS["exact"],
        quick=None,
        check=bad_checkers.complain,
        arguments=lambda task, **options: {},  # noqa: ARG005
    )
    monkeypatch.setitem(REWARDS, "exact", raising)
    with build(["math", "exact"], n_workers=1) as mix:
        (s,) = mix.judge([("5", Task("r", (), "5"))])
    assert s.parts["math"].value == 1.0
    assert (s.total.value, s.total.outcome) == (None, Outcome.CHECKER_FAILED)
    assert s.total.detail == "exact: ValueError: cannot judge '5'"


def test_a_pattern_that_backtracks_for_ever_does_not_freeze_the_run() -> None:
    with build([{"format": {"pattern": "(a+)+b"}}], n_workers=1, timeout_s=0.5) as mix:
        row = Task("r", ())
        hang, fine = mix.judge([("a" * 60, row), ("aab", row)])
    assert hang.total.outcome is Outcome.TIMED_OUT
    assert fine.total.value == 1.0


def test_math_works_off_the_main_thread() -> None:
    """math-verify's own time limits need SIGALRM and fail there without a word."""
    found: list[float | None] = []
    with build(["math"], n_workers=1) as mix:
        row = Task("r", (), "\\frac{1}{2}")
        thread = threading.Thread(
            target=lambda: found.extend(s.total.value for s in mix.judge([("\\boxed{2/4}", row)]))
        )
        thread.start()
        thread.join(timeout=60)
    assert found == [1.0]


def test_ctrl_c_in_the_terminal_does_not_reach_the_workers(pool: CheckerPool, tmp_path: Path) -> None:
    pool.run([check("who", str(tmp_path / "pid"))])
    assert os.getpgid(int((tmp_path / "pid").read_text())) != os.getpgid(0)
