"""Runs recipes in forked children, so that a test can kill many of them and torch is imported once.

Reads one JSON object a line: {"recipe": path, "home": path, "log": path, "die": {...} or null}. Answers {"pid": n} when
the child begins and {"ended": status} when it is gone: its exit code, or minus the signal that killed it.

`die` says where the child kills itself: {"at": "module:function", "call": n, "when": "before" | "after"}, or
{"disk": n} at the n-th time it changes something on disk. "signal" may name another signal than SIGKILL.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

DISK_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def main() -> None:
    _import_everything()
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(command)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


def _import_everything() -> None:
    """What the pipeline imports on use. Nothing is computed here, so no thread exists when the children are forked."""
    from posttrain.registry import tracking

    tracking._hush()
    for module in ("mlflow", "mlflow.store.db.utils", "peft", "posttrain.pipeline", "transformers.models.llama"):
        importlib.import_module(module)


def _child(command: dict[str, Any]) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    code = 1
    try:
        if command["die"]:
            _plant(command["die"], command["home"])
        code = _run(Path(command["recipe"]), Path(command["home"]))
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(recipe: Path, home: Path) -> int:
    import torch

    from posttrain.errors import PosttrainError
    from posttrain.pipeline import run
    from posttrain.recipe import load_recipe
    from posttrain.reporting import Reporter

    torch.set_num_threads(1)
    try:
        run(load_recipe(recipe), home, Reporter())
    except PosttrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _plant(die: dict[str, Any], home: str) -> None:
    number = signal.Signals[die.get("signal", "SIGKILL")]
    if "disk" in die:
        _die_at_disk_change(die["disk"], home, number)
        return
    module, _, path = die["at"].partition(":")
    holder: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    real, calls = getattr(holder, name), [0]

    @functools.wraps(real)
    def planted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        now = calls[0] == die.get("call", 1)
        if now and die.get("when", "before") == "before":
            os.kill(os.getpid(), number)
        result = real(*args, **kwargs)
        if now and die.get("when") == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(holder, name, planted)


def _die_at_disk_change(wanted: int, home: str, number: signal.Signals) -> None:
    """Python tells an audit hook of each file it opens and each directory entry it changes, before it does."""
    changes = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in DISK_EVENTS) or not str(args[0]).startswith(home):
            return
        changes[0] += 1
        if changes[0] == wanted:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
