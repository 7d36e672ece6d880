"""Runs the tests of a program that lives in another process. Here, every name of the program is a stand-in.

A call of a stand-in sends the arguments over and gets a plain value back. The expected values, the comparisons and the
count of what passed exist in this process only, so the program can neither read nor change them. Helpers that the
task's own prompt defines are the prompt's, not the program's; names of modules are the standard library's.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from posttrain.rewards.sandbox.guests.channel import Channel
from posttrain.rewards.sandbox.guests.values import changed_in_place, decode, encode, replace_content

_COUNT, _GONE = "_posttrain_count", "_posttrain_gone"


class ProgramError(Exception):
    """The program raised something that is not built in, or answered nonsense."""


class ProgramGone(BaseException):
    """The program ended, or its time is over: no test can pass any more."""


class UnfitTest(BaseException):
    """The test hands the program something that cannot be sent. The test is at fault, not the program."""


class Remote:
    """An object of the program. Compares by identity, so it equals nothing that a test expects."""

    def __init__(self, link: Link, number: int | None, attribute: str | None = None) -> None:
        object.__setattr__(self, "_at", (link, number, attribute))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        link, number, _ = self._at
        return link.ask("call", number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        link, number, _ = self._at
        return link.ask("get", number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        link, number, _ = self._at
        link.ask("set", number, (name, value))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):  # cannot be sent, and that must not look like the test's fault
            raise ProgramError("the program's object is no list, and cannot be sliced")
        link, number, _ = self._at
        return link.ask("item", number, (key,))

    def __len__(self) -> int:
        link, number, _ = self._at
        return int(link.ask("length", number, ()))

    def __iter__(self) -> Iterator[Any]:
        link, number, _ = self._at
        iterator = link.ask("iterator", number, ())
        if not isinstance(iterator, Remote):
            raise ProgramError("an iterator that is none")
        while True:
            try:
                yield link.ask("next", iterator._at[1], ())
            except StopIteration:
                return

    def __bool__(self) -> bool:
        return True  # and not the program's __len__

    def __str__(self) -> str:
        link, number, _ = self._at
        return str(link.ask("text", number, ()))


class Link:
    """The line to the program. The launcher carries the messages and keeps the time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.gone = ""

    def ask(self, do: str, of: int | None, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        request = {
            "do": do,
            "of": of,
            "args": [encode(item, _to_handle) for item in args],
            "kwargs": {name: encode(item, _to_handle) for name, item in (kwargs or {}).items()},
        }
        reply = self.exchange(request)
        try:
            for item, coded in zip(args, reply.get("args", ()), strict=False):
                if coded is not None and changed_in_place(item):
                    replace_content(item, decode(coded, self._from_handle))
            return decode(reply["value"], self._from_handle)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ProgramError(f"an answer that is none: {e}") from None

    def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.gone:
            raise ProgramGone(self.gone)
        self._channel.send({"ask": request})
        try:
            reply = self._channel.receive()
        except (ValueError, RecursionError):
            raise ProgramError("an answer that is no JSON") from None
        if not isinstance(reply, dict):
            raise ProgramError("an answer that is none")
        if "gone" in reply:
            self.gone = str(reply["gone"])
            raise ProgramGone(self.gone)
        if "raised" in reply:
            raise _error(reply)
        return reply

    def _from_handle(self, number: Any) -> Remote:
        if type(number) is not int:
            raise ValueError("a handle that is no number")
        return Remote(self, number)


def _to_handle(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"handle": value._at[1]}
    raise UnfitTest(f"the test passes a value of type {type(value).__name__}, which cannot be sent to the program")


def _error(reply: dict[str, Any]) -> Exception:
    kind = getattr(builtins, str(reply["raised"]), None)
    said = str(reply.get("message", ""))
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(said)
        except TypeError:
            pass
    return ProgramError(f"{reply['raised']}: {said}")


class Count:
    """Cases that held and that did not; the first failure is what the report says."""

    def __init__(self, link: Link) -> None:
        self.passed = self.failed = 0
        self.first = ""
        self._link = link

    def hold(self) -> None:
        if self._link.gone:  # what holds without the program says nothing of it
            self.failed += 1
        else:
            self.passed += 1

    def fail(self, why: BaseException, text: str) -> None:
        self.failed += 1
        if not self.first:
            self.first = f"{type(why).__name__}{': ' if str(why) else ''}{why} in {text}"[:300]


def main(arguments: dict[str, Any]) -> None:
    channel = Channel()
    link = Link(channel)
    count = Count(link)
    unfit = ""
    try:
        _judge(arguments, link, count)
        if link.gone and not count.failed:  # a test that catches everything caught this, too
            raise ProgramGone(link.gone)
        if not arguments["partial"]:
            count.hold()
        elif not count.passed + count.failed:
            unfit = "the tests assert nothing"
    except UnfitTest as e:
        unfit = str(e)
    except (Exception, ProgramGone, SystemExit) as e:
        count.fail(e, _line(e, arguments["tests"]))
        count.passed = 0  # how many assertions were still to come is not known, so no share of them is
    verdict = {"passed": count.passed, "failed": count.failed, "detail": count.first, "unfit": unfit}
    channel.send({"verdict": verdict})


def _judge(arguments: dict[str, Any], link: Link, count: Count) -> None:
    """Run every test to its end. `prompt` is trusted code that comes before them; `entry_point` may be ''."""
    known: dict[str, Any] = {"__name__": "tests", _COUNT: count, _GONE: ProgramGone}
    exec(compile(arguments["prompt"], "prompt", "exec", dont_inherit=True), known)
    trees = [ast.parse(source) for source in arguments["tests"]]
    _stand_ins(known, trees, arguments["entry_point"], link)
    for i, tree in enumerate(trees):
        partial = arguments["partial"]
        code = compile(_counting(tree) if partial else tree, f"test {i}", "exec", dont_inherit=True)
        exec(code, known)
    if arguments["call_check"]:
        known["check"](known["candidate"])


def _stand_ins(known: dict[str, Any], trees: list[ast.Module], entry: str, link: Link) -> None:
    """Bind what the tests read and nobody defined: modules from the library, everything else to the program."""
    wanted = sorted(set().union(*map(_names, trees)) - set(dir(builtins)) - known.keys() - {"candidate", entry})
    modules = [name for name in wanted if name in sys.stdlib_module_names]
    known |= {name: importlib.import_module(name) for name in modules}
    asked = [name for name in [*wanted, entry] if name and name not in modules]
    started = link.exchange({"defines": asked})
    defined = [name for name in asked if name in started["value"]]
    if entry and entry not in defined:
        raise ProgramError(f"the program defines no {entry}")
    known.update({name: link.ask("get", None, (name,)) for name in defined})
    if entry:
        known["candidate"] = known[entry]


def _line(error: BaseException, sources: list[str]) -> str:
    """The line of the tests that failed."""
    found, step = "the tests", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if name.startswith("test ") and step.tb_lineno:
            lines = sources[int(name[5:])].split("\n")
            found = lines[step.tb_lineno - 1].strip() if step.tb_lineno <= len(lines) else found
        step = step.tb_next
    return found[:200]


def _names(tree: ast.Module) -> set[str]:
    """Names a test reads and does not itself bind."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return read - bound


class _Counting(ast.NodeTransformer):
    """`assert x` becomes: try it, count it, go on. Where the program is gone, what is left to assert has failed."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        text = ast.unparse(node)[:200]
        caught = f"except (Exception, {_GONE}) as e:\n {_COUNT}.fail(e, {text!r})"
        counted = f"try:\n pass\n{caught}\nelse:\n {_COUNT}.hold()"
        (tried,) = ast.parse(counted).body
        assert isinstance(tried, ast.Try)
        tried.body = [node]
        return tried


def _counting(tree: ast.Module) -> ast.Module:
    return ast.fix_missing_locations(_Counting().visit(tree))
