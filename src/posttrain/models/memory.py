"""Out of memory is a fault of size, not of the program: said with the first setting to change, exit code 5."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from posttrain.errors import DoesNotFit

# What torch's CPU allocator says in a plain RuntimeError.
CPU_SAYS = ("can't allocate memory", "not enough memory")

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


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
