"""Keys that take duplicates and evaluation items out of the rows a stage trains on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section


class DedupSettings(Section):
    """Rows that repeat an earlier one are left out and stand in the ledger as duplicates of it."""

    near: float | None = Field(
        default=0.8,
        gt=0,
        le=1,
        description="near-duplicates: every part (prompt, answer) shares this much (Jaccard) with an earlier row's; "
        "null: exact duplicates only",
    )
    shingle: Positive = Field(default=3, description="words in a row that near-duplicates are compared by")
    across: bool = Field(default=True, description="also between sources; false: within each source only")
    ignore_case: bool = Field(default=False, description="exact duplicates may differ in upper and lower case")


class DecontaminateSettings(Section):
    """How training rows are compared with evaluation items; on_contamination says what becomes of those found."""

    n: int = Field(default=13, ge=5, description="so many words in a row of an item's question must not stand in a row")
    level: Literal["word", "token"] = Field(default="word", description="what n counts: words, or the model's tokens")
    against: list[str] = Field(
        default=[], description="evaluation sets besides the gate's suite: suites (.yaml) or files with rows"
    )
