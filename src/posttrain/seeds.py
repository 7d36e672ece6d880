"""Stateless randomness: every random choice takes its seed from what it is for, never from a generator's history.

So a resumed run, another process and another order of calls all draw the same numbers.
"""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: int | float | str) -> int:
    """A 63-bit seed from named parts, e.g. derive_seed(recipe_seed, "order", epoch). 1 and "1" differ."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
