"""Keys of a data set."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section


class DatasetSettings(Section):
    """One source of rows."""

    path: str = Field(description="a .jsonl or .jsonl.gz file, relative to the recipe; or builtin:NAME")
    format: Literal["auto", "messages", "prompt_completion", "text", "preference", "task"] = "auto"
    columns: dict[str, str] = Field(
        default={}, description="our name: the file's column, e.g. {prompt: question, completion: answer}"
    )
    limit: Positive | None = Field(default=None, description="take the first N rows")
