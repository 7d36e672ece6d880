"""The reward "code": does the program in the completion pass the row's tests? It runs in a sandbox (docs/sandbox.md).

A row says what is tested in one of three ways, known by its columns:

    test + entry_point           source that asserts, usually `def check(candidate)`, which is then called (HumanEval)
    test_list                    a list of assertions; test_setup_code, test_imports come before them (MBPP)
    cases                        [{input, output}, ...]: standard input and the output expected of it; `input_output`
                                 with {inputs, outputs} is read as well, also as JSON text (APPS)

Tests never meet the program: they run in a second sandbox where the program's functions are stand-ins that send
arguments over and get plain values back. So nothing the program does to its own process (exit codes, marks in the
output, patched builtins, objects that equal everything) can make an assertion hold, and what is expected is nowhere to
be read.

The program is the last fenced block (the last that defines the entry point, if there is one), else the whole text.
What does not define the entry point continues the row's code prompt: the column `code_prompt`, or the user's message.
A program that runs out of time, memory or output is wrong: 0. Only a sandbox that fails has no value.
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import DataError, RecipeError
from posttrain.records import Message, Task
from posttrain.rewards.sandbox.backends import BACKENDS
from posttrain.rewards.sandbox.launcher import Containment, Ended, Guest, Limits, SandboxError
from posttrain.rewards.sandbox.level import LEVELS, Level, require

OPTIONS: dict[str, type] = {"seconds": float, "memory_mb": int, "partial": bool, "sandbox": dict}
REQUIRED: frozenset[str] = frozenset()
TIMEOUT_S = 60.0  # of the worker, beyond every program's own time
MAX_SECONDS = 30.0
_GRACE_S = 1.0  # for the tests to end after the program's time is over
_TEST_BYTES = 16 << 20

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_CHECK = re.compile(r"^def check\(", re.MULTILINE)


class Graded(float):
    """A score that says why it is not 1."""

    detail: str

    def __new__(cls, value: float, detail: str = "") -> Graded:
        graded = super().__new__(cls, value)
        graded.detail = detail
        return graded


def validate(
    *,
    seconds: float = 3.0,
    memory_mb: int = 512,
    partial: bool = False,  # noqa: ARG001
    sandbox: Mapping[str, Any] | None = None,
) -> None:
    if not 0 < seconds <= MAX_SECONDS:
        raise RecipeError(f"code.seconds = {seconds:g} must be above 0 and at most {MAX_SECONDS:g}.")
    if not 64 <= memory_mb <= 65536:
        raise RecipeError(f"code.memory_mb = {memory_mb} must be between 64 and 65536.")
    for key, known in (("backend", [*BACKENDS]), ("accept", [*LEVELS])):
        value = (sandbox or {}).get(key)
        if value is not None and value not in known:
            raise RecipeError(f"code.sandbox.{key} = {value!r} is unknown.", remedy=f"Known: {', '.join(known)}.")
    if unknown := sorted(set(sandbox or {}) - {"backend", "accept"}):
        raise RecipeError(f"code.sandbox has no key {unknown[0]!r}.", remedy="Known: backend, accept.")


def arguments(
    task: Task,
    *,
    seconds: float = 3.0,
    memory_mb: int = 512,
    partial: bool = False,
    sandbox: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `check` needs of the row. DoesNotFit where programs would not be contained on this machine."""
    entry = task.extra.get("entry_point") or ""
    tests, cases = _tests(task), _cases(task)
    if bool(tests) == bool(cases):
        raise DataError(
            "the reward `code` needs tests, and this row has none." if not tests else "this row has tests and cases.",
            where=task.id,
            remedy="A row has the columns test and entry_point, or test_list, or cases: [{input, output}].",
        )
    if not isinstance(entry, str) or (task.extra.get("test") and not entry.isidentifier()):
        raise DataError(f"'entry_point' must be the name of a function; it is {entry!r:.60}.", where=task.id)
    return {
        "prompt": _code_prompt(task, entry),
        "entry_point": entry,
        "tests": tests,
        "cases": cases,
        "partial": partial,
        "seconds": seconds,
        "memory_mb": memory_mb,
        "level": sandbox_level(sandbox=sandbox).name,
    }


def sandbox_level(*, sandbox: Mapping[str, str] | None = None, **_: Any) -> Level:
    """Where programs run on this machine. DoesNotFit where they would not be contained and nobody accepted that."""
    wanted = sandbox or {}
    return require(wanted.get("backend", "own"), wanted.get("accept", ""))


def _tests(task: Task) -> tuple[str, ...]:
    extra = task.extra
    if extra.get("test"):
        texts = [extra["test"]]
    elif extra.get("test_list"):
        before = [extra.get("test_setup_code") or "", *(extra.get("test_imports") or ())]
        texts = [text for text in before if text] + list(extra["test_list"])
    else:
        return ()
    for text in texts:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, TypeError) as e:
            raise DataError(f"a test of this row is not Python: {e}.", where=task.id) from e
    return tuple(texts)


def _cases(task: Task) -> tuple[tuple[str, str], ...]:
    given = task.extra.get("cases") or task.extra.get("input_output")
    try:
        given = json.loads(given) if isinstance(given, str) else given
        if isinstance(given, Mapping):
            if given.get("fn_name"):
                raise ValueError("calls of a function are not read; write them as assertions in test_list")
            given = [{"input": i, "output": o} for i, o in zip(given["inputs"], given["outputs"], strict=True)]
        return tuple((_lines(case["input"]), _lines(case["output"])) for case in given or ())
    except (ValueError, TypeError, KeyError) as e:
        raise DataError(
            f"the cases of this row cannot be read: {e}.",
            where=task.id,
            remedy="Write them as cases: [{input: text, output: text}, ...].",
        ) from e


def _lines(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"{value!r:.40} is neither text nor lines of text")


def _code_prompt(task: Task, entry: str) -> str:
    """The beginning of the program, if the row has one: code that already names the entry point."""
    said = task.extra.get("code_prompt")
    if isinstance(said, str):
        return said
    last: Message | None = task.prompt[-1] if task.prompt else None
    if last is None or not entry or not _defines(last.content, entry):
        return ""
    return last.content if _parses(_closed(last.content)) else ""


def score(text: str, task: Task, **options: Any) -> float:
    return check(text, **arguments(task, **options))


def check(
    text: str,
    *,
    prompt: str,
    entry_point: str,
    tests: Sequence[str],
    cases: Sequence[Sequence[str]],
    partial: bool,
    seconds: float,
    memory_mb: int,
    level: str,
) -> Graded:
    """1 if all passes, else 0; with `partial` the share of assertions, or of cases, that pass."""
    if not text.strip():
        return Graded(0.0, "no program")
    source = program(text, prompt, entry_point)
    limits, containment = Limits(seconds=seconds, memory_mb=memory_mb), LEVELS[level]
    if cases:
        passed, total, detail = _by_cases(source, cases, partial, limits, containment)
    else:
        judged = {
            "prompt": _closed(prompt),
            "entry_point": entry_point,
            "tests": list(tests),
            "call_check": bool(entry_point) and any(_CHECK.search(test) for test in tests),
            "partial": partial,
        }
        passed, total, detail = _by_tests(source, judged, limits, containment)
    return Graded(passed / total if partial else float(passed == total), detail)


def quick(text: str, **_: Any) -> float | None:
    return None if text.strip() else 0.0


def program(text: str, prompt: str, entry_point: str) -> str:
    """The program that a completion means."""
    text = text.rpartition("</think>")[2] if "</think>" in text else text
    blocks = [match[2] for match in _FENCE.finditer(text)]
    defining = [block for block in blocks if entry_point and _defines(block, entry_point)]
    code = (defining or blocks or [text])[-1]
    if not prompt:
        return code
    return f"{_closed(prompt)}\n\n{code}" if _defines(code, entry_point) else prompt + code


def _defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:async[ ]+)?(?:def|class)[ ]+{re.escape(name)}\b|^{re.escape(name)}[ ]*=", code, re.M)
        is not None
    )


def _closed(prompt: str) -> str:
    """A prompt that ends in the head of a function, as a program of its own."""
    return prompt if _parses(prompt) else f"{prompt}\n    pass\n"


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _by_cases(
    source: str, cases: Sequence[Sequence[str]], partial: bool, limits: Limits, containment: Containment
) -> tuple[int, int, str]:
    """One process a case. `limits.seconds` is for all of them together; starting is not counted."""
    passed, left, detail = 0, limits.seconds, ""
    for i, (given, expected) in enumerate(cases):
        with Guest(containment, limits, "script", {"source": source}) as guest:
            guest.await_start()
            started = time.monotonic()
            run = guest.finish(given.encode(), started + left)
            left -= time.monotonic() - started
        if run.status == "exited" and run.code == 0 and _same_output(run.stdout, expected):
            passed += 1
            continue
        detail = detail or f"case {i + 1}: {_how_it_ended(run.status, run.code, run.stderr)}"
        if not partial or left <= 0:
            break
    return passed, len(cases), detail


def _same_output(found: bytes, expected: str) -> bool:
    """Line by line, as newlines end them; blanks at the ends of lines and empty lines at the end do not count."""
    lines = [text.rstrip() for text in found.decode("utf-8", errors="replace").rstrip().split("\n")]
    return lines == [text.rstrip() for text in expected.rstrip().split("\n")]


def _how_it_ended(status: str, code: int, stderr: bytes) -> str:
    if status != "exited":
        return _GONE[status]
    if code == 0:
        return "another output than expected"
    last = stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
    return f"it ended with {'signal' if code < 0 else 'exit code'} {abs(code)} {last[0][:200]}".strip()


_GONE = {"time": "its time was over", "output": "it wrote more than it may", "ended": "it ended before the tests did"}


def _by_tests(source: str, judged: dict[str, Any], limits: Limits, containment: Containment) -> tuple[int, int, str]:
    """The program in one process, its tests in another, and messages between them through this one."""
    testing = Limits(seconds=limits.seconds + _GRACE_S, memory_mb=limits.memory_mb, output_bytes=_TEST_BYTES)
    with (
        Guest(containment, limits, "program", {"source": source}) as answer,
        Guest(containment, testing, "judge", judged) as judge,
    ):
        answer.await_start()
        judge.await_start()
        deadline = time.monotonic() + limits.seconds
        reply = _reply(answer, deadline)
        if (failure := _failure_at_start(reply)) is not None:
            return 0, 1, failure
        while True:
            said = _said(judge, deadline + _GRACE_S)
            if said is None:
                return 0, 1, "the tests were not over in time"
            if said.startswith(b'{"verdict"'):
                return _verdict(json.loads(said)["verdict"])
            answer.write_line(said)
            judge.write_line(_reply(answer, deadline))


def _reply(answer: Guest, deadline: float) -> bytes:
    try:
        return answer.read_line(deadline)
    except Ended as e:
        return json.dumps({"gone": _GONE[e.why]}).encode()


def _failure_at_start(reply: bytes) -> str | None:
    """Running the program from its first line to its last comes before any test."""
    try:
        said = json.loads(reply)
        if "gone" in said:
            return f"ProgramGone: {said['gone']}"
        if "raised" in said:
            return f"{said['raised']}: {said.get('message', '')}"[:300]
    except (ValueError, TypeError, RecursionError):
        return "it wrote into the line to its tests"
    return None


def _said(judge: Guest, deadline: float) -> bytes | None:
    """What the tests ask of the program, or their verdict; None when there is no time left for either."""
    try:
        return judge.read_line(deadline)
    except Ended as e:
        if e.why == "time":
            return None
        raise SandboxError(f"the tests did not come to an end: {_GONE[e.why]}.") from None


def _verdict(verdict: Mapping[str, Any]) -> tuple[int, int, str]:
    if verdict["unfit"]:
        raise SandboxError(f"{verdict['unfit']}.")
    passed, failed = int(verdict["passed"]), int(verdict["failed"])
    return passed, passed + failed, str(verdict["detail"])


_GOLD = ("canonical_solution", "code", "solution")


def gold_texts(task: Task, **_: Any) -> list[str]:
    """Completions that must score 1: the row's own solution, where it has one."""
    found = [task.extra.get(name) for name in _GOLD] + [task.answer]
    return [next(text for text in found if text)] if any(isinstance(text, str) and text for text in found) else []


_EQUALS_ALL = "class Yes(str):\n    __eq__ = __ge__ = __le__ = lambda *_: True\n    __hash__ = str.__hash__\n"


def adversarial_texts(task: Task, **_: Any) -> list[str]:
    """Completions that must not score 1: leaving with success, and an answer that claims to equal everything."""
    entry = task.extra.get("entry_point")
    texts = ["import os\nos._exit(0)\n"]
    if entry:
        texts.append(f"{_EQUALS_ALL}\n\ndef {entry}(*_, **__):\n    return Yes()\n")
    return texts


_SQUARE = Task(
    id="example",
    prompt=(Message("user", 'def square(x):\n    """The square of x."""\n'),),
    extra={
        "entry_point": "square",
        "test": "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\n",
        "canonical_solution": "    return x * x\n",
    },
)
_SUM = Task(
    id="example", prompt=(), extra={"cases": [{"input": "1 2\n", "output": "3"}, {"input": "5 -5", "output": "0"}]}
)
_ADD = Task(id="example", prompt=(), extra={"test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]})
GOOD: list[tuple[Task, str]] = [
    (_SQUARE, "    return x * x\n"),
    (_SQUARE, "Here it is:\n```python\ndef square(x):\n    return x ** 2\n```\nDone."),
    (_SUM, "print(sum(map(int, input().split())))"),
    (_ADD, "add = lambda a, b: a + b"),
]
BAD: list[tuple[Task, str]] = [
    (_SQUARE, ""),
    (_SQUARE, "    return None\n"),
    (_SQUARE, "def square(x:\n"),
    (_SQUARE, _EQUALS_ALL + "\ndef square(x):\n    return Yes()"),
    (_SQUARE, "import os\nos._exit(0)"),
    (_SUM, "print(3)"),
    (_SUM, "while True:\n    pass"),
    (_ADD, "def add(a, b):\n    raise SystemExit(0)"),
]
