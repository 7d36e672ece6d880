"""The keys at the top of a recipe."""

from __future__ import annotations

from pydantic import Field

from posttrain.settings.base import Section


class RecipeSettings(Section):
    """The top of a recipe: one model's history. `stages` stands beside these keys, as a list of {method: settings}."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what this history is called")
    model: str = Field(min_length=1, description="the base: a folder, a Hub id, or builtin:NAME")
    seed: int = Field(default=0, ge=0)
    chat_template: str | None = Field(
        default=None, description="a .jinja file, relative to the recipe; default: the tokenizer's own"
    )
    register_as: str | None = Field(
        default=None,
        alias="register",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the registry name; default: `name`",
    )
