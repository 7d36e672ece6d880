"""Memory of the process: how freed blocks are kept, and what is said where there is not enough of it (exit code 5)."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from posttrain.errors import DoesNotFit

# What torch's CPU allocator says in a plain RuntimeError.
CPU_SAYS = ("can't allocate memory", "not enough memory")

# glibc's mallopt: from which size a block is a mapping of its own, and how much free memory its heap may hold.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_FROM = 16 << 20
HELD = 256 << 20

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


def holds_freed_memory() -> bool:
    return platform.libc_ver()[0] == "glibc"


@cache
def hold_freed_memory() -> None:
    """Every step on a CPU asks for the same blocks of some MiB as the step before. glibc maps such blocks anew each
    time, and the kernel fills every page of them with zeros first: as long as the arithmetic takes, for a small model.
    Other C libraries are left as they are."""
    if not holds_freed_memory():
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    glibc.mallopt(M_TRIM_THRESHOLD, HELD)


@contextmanager
def must_fit(what: str, remedy: str) -> Iterator[None]:
    """Turn any allocator's refusal into DoesNotFit. `what` is what was being done."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        asked = ASKED.search(str(e))
        detail = f": {asked[1]} more were asked for" if asked else ""
        raise DoesNotFit(f"out of memory while {what}{detail}.", remedy=remedy) from e


def is_out_of_memory(e: BaseException) -> bool:
    if isinstance(e, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(e, RuntimeError) and any(said in str(e) for said in CPU_SAYS)
