# ruff: noqa: E501  programs
"""What the reward `code` pays for, and what it does not: programs that claim success have to have it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.errors import DataError, DoesNotFit, RecipeError
from posttrain.records import Message, Outcome, Task
from posttrain.rewards import code
from posttrain.rewards.mix import build
from posttrain.rewards.proof import prove
from posttrain.rewards.sandbox import level
from posttrain.rewards.sandbox.launcher import SandboxError


def task(test: str = "", entry: str = "f", **extra: Any) -> Task:
    columns = {"test": test, "entry_point": entry} if test else {}
    return Task("rows.jsonl:3", (), extra=columns | extra)


def graded(text: str, row: Task, **options: Any) -> code.Graded:
    return code.check(text, **code.arguments(row, **{"seconds": 5.0, **options}))


SECRET = task("def check(candidate):\n    assert candidate(3) == 42421\n    assert candidate(4) == [1, 'zwei']\n")
PASSES = "def f(x):\n    return 42421 if x == 3 else [1, 'zwei']\n"

CHEATS = {
    "leaves with success": "import os\nos._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits when asked": "def f(x):\n    raise SystemExit(0)",
    "leaves when asked": "import os\ndef f(x):\n    os._exit(0)",
    "interrupts": "def f(x):\n    raise KeyboardInterrupt",
    "prints the verdict": (
        "import json, os\nline = json.dumps({'verdict': {'passed': 9, 'failed': 0, 'detail': '', 'unfit': ''}}) + '\\n'\n"
        "for fd in range(64):\n    try: os.write(fd, line.encode())\n    except OSError: pass\ndef f(x): return 1"
    ),
    "prints the verdict when asked": (
        "import json, os\nline = json.dumps({'verdict': {'passed': 9, 'failed': 0, 'detail': '', 'unfit': ''}}) + '\\n'\n"
        "def f(x):\n    for fd in range(64):\n        try: os.write(fd, line.encode())\n        except OSError: pass\n"
    ),
    "equals everything": "class Y:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\ndef f(x): return Y()",
    "a number that equals everything": "class Y(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return Y()",
    "a list that equals everything": "class Y(list):\n    __eq__ = lambda s, o: True\ndef f(x): return Y()",
    "an element that equals everything": "class Y(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\ndef f(x): return [Y(), Y()]",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\nbuiltins.__build_class__ = None\ndef f(x): return 0",
    "traces": "import sys\ndef t(frame, event, arg):\n    frame.f_globals['check'] = lambda c: None\n    return t\nsys.settrace(t)\ndef f(x): return 0",
    "looks through frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "            if isinstance(v, str) and '42421' in v: return 42421 if x == 3 else [1, 'zwei']\n        frame = frame.f_back\n"
    ),
    "looks through memory": (
        "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and any('4242' + '1' in str(v) for v in list(o.values()) if isinstance(v, str)):\n"
        "            return 42421 if x == 3 else [1, 'zwei']\n"
    ),
    "looks into its start": "import os, sys\ndef f(x): return 42421 if '4242' + '1' in str([sys.argv, sys.orig_argv, dict(os.environ)]) else 0",
    "looks for the test": "import os\ndef f(x):\n    for d in ('.', '/', '/work', '/tmp', '/proc'):\n        try: print(os.listdir(d))\n        except OSError: pass",
    "its own check": "def check(candidate): pass\ndef f(x): return 0\ncandidate = lambda x: 42421",
    "replaces the messages": "import sys\nm = sys.modules['posttrain.rewards.sandbox.guests.program']\nm.encode = lambda v, h: {'handle': 0}\ndef f(x): return 0",
    "says it is gone": "import sys\nm = sys.modules['posttrain.rewards.sandbox.guests.program']\nm._answer = lambda *a: {'gone': ''}\ndef f(x): return 0",
    "answers nonsense": "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[' * 100000 + b'\\n')\n        except OSError: pass\n",
    "hangs up": "import os\ndef f(x): os.closerange(0, 64)",
    "a value without an end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "a value that is huge": "def f(x): return 'x' * 10**8",
    "an object with a wrong length": "class Y:\n    def __len__(s): return -1\n    __iter__ = None\ndef f(x): return Y()",
    "defines nothing": "x = 1",
    "is no Python": "def f(x) return 1",
    "raises at the start": "raise ValueError('no')",
}  # fmt: skip


def test_a_right_program_passes() -> None:
    assert graded(PASSES, SECRET) == 1.0


@pytest.mark.parametrize("cheat", CHEATS)
def test_success_cannot_be_claimed(cheat: str) -> None:
    verdict = graded(CHEATS[cheat], SECRET)
    assert verdict == 0.0
    assert verdict.detail


@pytest.mark.parametrize(
    ("test", "program"),
    [
        # Names of the program never take the place of built-in functions, modules, or the prompt's own helpers.
        ("def check(candidate):\n    assert sorted(candidate(1)) == [2, 1]\n", "def f(x): return [1, 2]\ndef sorted(x): return [2, 1]"),
        ("def check(candidate):\n    assert math.isclose(candidate(1), 2)\n", "def f(x): return 5\nclass math:\n    isclose = lambda *a: True"),
        ("def check(candidate):\n    assert helper(candidate(1)) == 7\n", "def f(x): return 0\ndef helper(x): return 7"),
        ("def check(candidate):\n    try:\n        candidate(1)\n    except:\n        pass\n", "import os\ndef f(x): os._exit(0)"),
    ],
)  # fmt: skip
def test_what_the_tests_use_is_not_the_program_s(test: str, program: str) -> None:
    row = task(test, code_prompt="def helper(x):\n    return x + 1\n\n\ndef f(x):\n    'Do it.'\n")
    assert graded(program, row) == 0.0


@pytest.mark.parametrize(
    ("test", "program"),
    [
        ("x = [3, 1]\nf(x)\nassert x == [1, 3]", "def f(x): x.sort()"),
        ("assert f((1, 2), k={'a': {1, 2}}) == ({'a': {1, 2}}, (1, 2))", "def f(a, k): return k, a"),
        ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    for i in range(n): yield i"),
        ("import itertools\nassert list(itertools.islice(f(), 2)) == [0, 1]", "from itertools import count\ndef f(): return count()"),
        ("assert f(Pair(2, 3)).a == 3", "class Pair:\n    def __init__(s, a, b): s.a, s.b = a, b\ndef f(p): return Pair(p.b, p.a)"),
        ("try:\n    f(-1)\nexcept ValueError as e:\n    assert 'negative' in str(e)\nelse:\n    assert False", "def f(x): raise ValueError('negative')"),
        ("assert f(10**5000) == 10**5000 + 1", "def f(x): return x + 1"),
        ("assert f() == (1.5, True, None, 2j, b'x', frozenset({1}), range(3))", "def f(): return 1.5, True, None, 2j, b'x', frozenset({1}), range(3)"),
        ("from fractions import Fraction\nassert f(Fraction(1, 3)) == Fraction(2, 3)", "def f(x): return 2 * x"),
        ("assert f('aab') == {'a': 2, 'b': 1}", "from collections import Counter\ndef f(s): return Counter(s)"),
        ("assert f('\\udc80') == '\\udc80!'", "def f(s): return s + '!'"),
        ("import math\nassert math.isinf(f())", "def f(): return float('inf')"),
        ("assert f() == 3", "import asyncio\ndef f(): return asyncio.run(g())\nasync def g(): return 3"),
        ("assert f() == 3", "import threading\ndef f():\n    a = []\n    t = threading.Thread(target=a.append, args=(3,))\n    t.start(); t.join()\n    return a[0]"),
        ("assert f() == 'x'", "import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as t:\n        t.write('x'); t.seek(0); return t.read()"),
        ("assert f(1)(2) == 3", "def f(a): return lambda b: a + b"),
    ],
)  # fmt: skip
def test_ordinary_programs_are_not_in_the_way_of_the_sandbox(test: str, program: str) -> None:
    verdict = graded(program, Task("r", (), extra={"test_list": [test]}))
    assert verdict == 1.0, verdict.detail


def test_a_share_of_the_assertions() -> None:
    row = task(
        "def check(candidate):\n    for i in range(4):\n        assert candidate(i) == i * i\n    assert candidate(9) == 81"
    )
    wrong_once = "def f(x):\n    return x * x if x != 2 else 5\n"
    assert graded(wrong_once, row) == 0.0
    assert graded(wrong_once, row, partial=True) == pytest.approx(4 / 5)
    assert graded("def f(x):\n    return x * x\n", row, partial=True) == 1.0
    # What dies fails every assertion that is left.
    dies = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x * x\n"
    assert graded(dies, row, partial=True) == pytest.approx(2 / 5)
    sleeps = "import time\ndef f(x):\n    if x == 2: time.sleep(60)\n    return x * x\n"
    assert graded(sleeps, row, partial=True, seconds=0.6) == pytest.approx(2 / 5)
    # Where a test breaks off between its assertions, nobody knows how many were left, so none is paid for.
    between = task(
        "def check(candidate):\n    for i in range(40):\n        r = candidate(i)\n        assert r == i * i"
    )
    for fault in ("raise ValueError", "os._exit(0)"):
        breaks = f"import os\ndef f(x):\n    if x == 20: {fault}\n    return x * x\n"
        assert graded(breaks, between, partial=True) == 0.0
    # What holds without the program, or because it is gone, says nothing of it.
    catches = task(
        "def check(c):\n    for i in range(4):\n        try: r = c(i)\n        except BaseException: r = 0\n        assert r == 0"
    )
    assert graded("import os\ndef f(x):\n    if x: os._exit(0)\n    return 0", catches, partial=True) == pytest.approx(
        1 / 4
    )
    cases = Task("r", (), extra={"cases": [{"input": str(i), "output": str(i * i)} for i in range(4)]})
    assert graded("x = int(input())\nprint(x * x if x < 3 else 0)", cases, partial=True) == pytest.approx(3 / 4)


def test_time_is_the_program_s_own_fault_and_said() -> None:
    verdict = graded("def f(x):\n    while True: pass", SECRET, seconds=0.4)
    assert verdict == 0.0 and "time was over" in verdict.detail
    cases = Task("r", (), extra={"cases": [{"input": "", "output": "1"}]})
    verdict = graded("import time\ntime.sleep(60)", cases, seconds=0.4)
    assert verdict == 0.0 and "time was over" in verdict.detail
    verdict = graded("print('x' * 10**8)", cases)
    assert verdict == 0.0 and "more than it may" in verdict.detail
    verdict = graded("raise ValueError('so')", cases)
    assert verdict == 0.0 and "exit code 1 ValueError: so" in verdict.detail


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = code.arguments(SECRET)
    monkeypatch.setattr("posttrain.rewards.sandbox.launcher._source", lambda _: "raise OSError('planted')")
    with pytest.raises(SandboxError, match="planted"):
        code.check(PASSES, **arguments)


def test_a_program_gets_the_memory_it_was_promised_also_beyond_the_worker_s_own() -> None:
    row = Task("r", (), extra={"cases": [{"input": "", "output": str(3000 << 20)}]})
    asks = "import resource\nprint(resource.getrlimit(resource.RLIMIT_AS)[1])"
    with build([{"code": {"memory_mb": 3000}}], n_workers=1) as mix:
        (found,) = mix.judge([(asks, row)])
    assert found.total.value == 1.0, found.parts["code"].detail


def test_an_object_where_a_list_was_due_is_wrong_not_unjudged() -> None:
    row = Task("r", (), extra={"test_list": ["assert f()[:2] == [1, 2]"]})
    assert graded("def f(): return [1, 2, 3]", row) == 1.0
    found = graded("class L:\n    def __getitem__(s, k): return [1, 2]\ndef f(): return L()", row)
    assert found == 0.0 and "cannot be sliced" in found.detail


def test_the_pool_tells_wrong_from_failed() -> None:
    unfit = task("def check(candidate):\n    assert candidate(lambda x: x) == 1\n")
    with build([{"code": {"seconds": 2.0}}], n_workers=2) as mix:
        right, wrong, slow, failed = mix.judge(
            [(PASSES, SECRET), ("def f(x): return 1", SECRET), ("while True: pass", SECRET), (PASSES, unfit)]
        )
    assert (right.total.value, right.total.outcome) == (1.0, Outcome.SCORED)
    assert (wrong.total.value, wrong.total.outcome) == (0.0, Outcome.SCORED)
    assert (slow.total.value, slow.total.outcome) == (0.0, Outcome.SCORED)
    assert (failed.total.value, failed.total.outcome) == (None, Outcome.CHECKER_FAILED)
    assert "cannot be sent" in failed.total.detail
    assert "assert candidate(3) == 42421" in wrong.parts["code"].detail


def test_the_program_in_a_completion() -> None:
    fenced = (
        "First:\n```python\ndef g(): pass\n```\nthen\n```py\ndef f(x):\n    return 1\n```\nand run\n```\nf(2)\n```\n"
    )
    assert code.program(fenced, "", "f") == "def f(x):\n    return 1\n"
    assert code.program(fenced, "", "") == "f(2)\n"
    assert code.program("    return 1\n", "def f(x):\n", "f") == "def f(x):\n    return 1\n"
    assert code.program("<think>```python\nbad\n```</think>x = 1", "", "") == "x = 1"
    assert code.program("~~~\nx = '''\n```\n'''\n~~~", "", "") == "x = '''\n```\n'''\n"
    whole = code.program("def f(x):\n    return 2\n", "import re\n\ndef f(x):\n", "f")
    assert whole.startswith("import re\n") and whole.endswith("def f(x):\n    return 2\n")
    asked = Task(
        "r",
        (Message("user", "import re\n\ndef f(x):\n    'Double.'\n"),),
        extra={"entry_point": "f", "test": "assert f(1) == 2"},
    )
    assert graded("    return 2 * x\n", asked) == 1.0
    assert graded("```python\ndef f(x):\n    return len(re.findall('.', 'ab')) * x\n```", asked) == 1.0


def test_output_is_compared_line_by_line() -> None:
    row = Task("r", (), extra={"input_output": json.dumps({"inputs": ["3\n", ["4", "5"]], "outputs": ["3\n6\n", "4"]})})
    double = "x = int(input())\nprint(x, end='  \\n')\nif x == 3: print(6)\nprint()"
    assert graded(double, row) == 1.0
    assert graded(double.replace("6", "7"), row) == 0.0
    assert graded("x = int(input())\nprint('3\\x0c6' if x == 3 else 4)", row) == 0.0, "a form feed ends no line"
    assert (
        graded("if __name__ == '__main__':\n    x = input()\n    print(x + ('\\n6' if x == '3' else ''))", row) == 1.0
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "needs tests"),
        ({"test_list": []}, "needs tests"),
        ({"test_list": ["assert f( == 1"]}, "not Python"),
        ({"test": "assert f(1)", "entry_point": "not a name"}, "entry_point"),
        ({"cases": [{"input": "1"}]}, "output"),
        ({"cases": "[{"}, "cannot be read"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "cannot be read"),
        ({"input_output": {"inputs": [], "outputs": [], "fn_name": "f"}}, "test_list"),
        ({"cases": [{"input": "1", "output": "1"}], "test_list": ["assert f()"]}, "tests and cases"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        code.arguments(Task("rows.jsonl:9", (), extra=extra))
    assert caught.value.where == "rows.jsonl:9"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seconds": 0.0}, "above 0"),
        ({"seconds": 31}, "at most 30"),
        ({"memory_mb": 8}, "between"),
        ({"sandbox": {"backend": "chroot"}}, "unknown"),
        ({"sandbox": {"accept": "anything"}}, "unknown"),
        ({"sandbox": {"trust": True}}, "no key"),
        ({"sandbox": "own"}, "must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build([{"code": options}])


def test_a_machine_that_cannot_contain_programs_is_refused_unless_the_level_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(level, "measure", lambda _: level._probe("filtered"))
    with pytest.raises(DoesNotFit, match="reading files") as caught:
        code.arguments(SECRET)
    assert caught.value.exit_code == 5 and "accept: filtered" in str(caught.value)
    with pytest.raises(DoesNotFit):
        code.arguments(SECRET, sandbox={"accept": "limited"})
    assert code.arguments(SECRET, sandbox={"accept": "filtered"})["level"] == "filtered"
    with build([{"code": {"sandbox": {"accept": "filtered"}}}]) as mix:
        assert [found.name for found in mix.sandboxes] == ["filtered"]


def test_the_reward_proves_itself_and_refuses_tests_that_anything_passes() -> None:
    good = Task(
        "r",
        (),
        extra={
            "entry_point": "f",
            "test": "def check(c):\n    assert c(2) == 4\n",
            "solution": "def f(x): return 2 * x",
        },
    )
    vacuous = Task(
        "r", (), extra={"entry_point": "f", "test": "def check(c):\n    c(2)\n", "solution": "def f(x): return 2 * x"}
    )
    with build(["code"], n_workers=2) as mix:
        assert [p.case for p in prove(mix, [good])] == ["gold", "empty", "adversarial", "adversarial"]
        with pytest.raises(DataError, match="must not give 1"):
            prove(mix, [vacuous])
