"""Held-out rows chosen by what a row asks, never by where it stands.

A row's side is a function of the seed and its prompt alone. So copies and re-asked prompts stay on one side, every
process and machine splits alike, and rows added later move none of the others.
"""

from __future__ import annotations

import re
import unicodedata

from posttrain.seeds import derive_seed

SPACE = re.compile(r"\s+")


def held_out(content: str, share: float, seed: int) -> bool:
    """Whether a row with this content belongs to the evaluation side; true for about `share` of all contents."""
    return derive_seed(seed, "split", normal(content)) < share * 2**63


def normal(content: str) -> str:
    """Content up to case, white space and Unicode spelling: what people would call the same question."""
    return SPACE.sub(" ", unicodedata.normalize("NFKC", content)).strip().casefold()
