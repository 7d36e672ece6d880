"""What a stage's rows look like: how many, how long, and the trees of its largest micro-batch.

With a tokenizer the longest rows are rendered for real; without one (a folder with only config.json) a row is assumed
to be as long as the recipe allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.formats import read_examples, read_pairs, read_tasks
from posttrain.data.render import Renderer
from posttrain.recipe import Recipe, Stage
from posttrain.records import Branch, Example, Message, Task, Tree
from posttrain.settings import DPOSettings, GRPOSettings, SFTSettings, StageSettings
from posttrain.train.loop import micro_batches

LONGEST = 48  # rows rendered for the largest micro-batch, the longest by characters
SAMPLED = 128  # rows rendered for the mean
PROMPT_SHARE = 4  # assumed where rows cannot be read: a quarter of a row is its prompt


@dataclass(frozen=True, slots=True)
class Item:
    """What `micro_batches` wants of a tree."""

    tree: Tree


@dataclass(frozen=True, slots=True)
class Rows:
    n_rows: int | None
    mean_tokens: float  # of an item: a prompt with all its answers
    mean_prompt: float
    worst: tuple[Tree, ...]  # the largest micro-batch
    several: bool  # whether an optimiser step has more than one micro-batch
    said: str  # where this comes from, for people


def rows_of(recipe: Recipe, stage: Stage, renderer: Renderer | None, vocabulary: int) -> Rows:
    s = stage.settings
    if renderer is None:
        return _assumed(s)
    items = _render(recipe, s, renderer)
    longest = sorted(items.longest, key=lambda item: item.tree.n_tokens, reverse=True)
    # The largest micro-batch there could be: the longest rows meet in one step.
    fullest = next(micro_batches(longest, s.micro_batch_tokens))
    mean = sum(item.tree.n_tokens for item in items.sampled) / len(items.sampled)
    prompts = sum(len(item.tree.trunk_ids) for item in items.sampled) / len(items.sampled)
    step_tokens = sum(item.tree.n_tokens for item in longest[: s.per_device_train_batch_size])
    said = f"{items.n_rows:,} rows of {mean:,.0f} tokens on average, the longest {longest[0].tree.n_tokens:,}"
    return Rows(items.n_rows, mean, prompts, tuple(i.tree for i in fullest), step_tokens > s.micro_batch_tokens, said)


@dataclass(frozen=True, slots=True)
class _Rendered:
    n_rows: int
    longest: list[Item]
    sampled: list[Item]


def _render(recipe: Recipe, s: StageSettings, renderer: Renderer) -> _Rendered:
    read, render, cut = _READERS[type(s)]
    rows = read(s, recipe.resolve)
    by_length = sorted(rows, key=_characters, reverse=True)[:LONGEST]
    sample = random.Random(0).sample(list(rows), min(SAMPLED, len(rows)))

    def trees(some: Sequence[Any]) -> list[Item]:
        return [Item(cut(tree, s)) for tree in render(renderer, some, s)]

    return _Rendered(len(rows), trees(by_length), trees(sample))


def _read_examples(s: StageSettings, resolve: Callable[[str], Any]) -> Sequence[Any]:
    return read_examples(s.datasets, resolve).rows


def _read_pairs(s: StageSettings, resolve: Callable[[str], Any]) -> Sequence[Any]:
    return read_pairs(s.datasets, resolve).rows


def _read_tasks(s: StageSettings, resolve: Callable[[str], Any]) -> Sequence[Any]:
    return read_tasks(s.datasets, resolve, require_answer=False).rows


def _examples(renderer: Renderer, rows: Sequence[Any], s: StageSettings) -> list[Tree]:
    assert isinstance(s, SFTSettings)
    return renderer.examples(rows, s.train_on)


def _pairs(renderer: Renderer, rows: Sequence[Any], s: StageSettings) -> list[Tree]:
    del s
    return renderer.pairs(rows)


def _groups(renderer: Renderer, rows: Sequence[Task], s: StageSettings) -> list[Tree]:
    """A prompt with the longest answers it may get."""
    assert isinstance(s, GRPOSettings)
    return [_group(renderer.prompt_ids(row.prompt, row.id), s) for row in rows]


def _group(prompt: tuple[int, ...], s: GRPOSettings) -> Tree:
    n = s.max_completion_length
    return Tree("group", prompt, tuple(Branch((0,) * n, (True,) * n) for _ in range(s.num_generations)))


def _cut(tree: Tree, s: StageSettings) -> Tree:
    """A row that is too long is cut, dropped or refused: in no case is it longer than this in training."""
    trunk = tree.trunk_ids[: s.max_length]
    room = s.max_length - len(trunk)
    return Tree(tree.id, trunk, tuple(Branch(b.token_ids[:room], b.scored[:room]) for b in tree.branches))


_READERS: dict[type[StageSettings], tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    SFTSettings: (_read_examples, _examples, _cut),
    DPOSettings: (_read_pairs, _pairs, _cut),
    GRPOSettings: (_read_tasks, _groups, _cut),
}


def _characters(row: Any) -> int:
    if isinstance(row, Example) and row.text is not None:
        return len(row.text)
    parts: list[Message] = []
    for name in ("messages", "prompt", "chosen", "rejected"):
        parts += getattr(row, name, ())
    return sum(len(message.content) for message in parts)


def _assumed(s: StageSettings) -> Rows:
    """Rows as long as the recipe allows, as many as a micro-batch takes."""
    n = s.max_length
    if isinstance(s, GRPOSettings):
        tree = _group((0,) * max(1, n - s.max_completion_length), s)
    else:
        prompt = max(1, n // PROMPT_SHARE)
        n_branches = 1 if isinstance(s, SFTSettings) else 2
        answer = Branch((0,) * (n - prompt), (True,) * (n - prompt))
        tree = Tree("row", (0,) * prompt, (answer,) * n_branches)
    fullest = max(1, s.micro_batch_tokens // tree.n_tokens)
    in_step = s.per_device_train_batch_size
    said = f"every row {n:,} tokens long, which is max_length, a quarter of it prompt (no tokenizer to count with)"
    if isinstance(s, GRPOSettings):
        said = f"every prompt with its answers {n:,} tokens long, which is max_length (no tokenizer to count with)"
    return Rows(None, tree.n_tokens, len(tree.trunk_ids), (tree,) * min(fullest, in_step), in_step > fullest, said)
