"""A trained model that scores answers, ready to be asked: for a suite of pairs, for best-of-N, as a reward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from posttrain.data.render import STEP_END, Renderer
from posttrain.errors import DataError, ModelError, PosttrainError
from posttrain.losses.reward import STEP_AGGREGATES
from posttrain.models.load import LoadOptions
from posttrain.models.policy import Policy
from posttrain.models.value import at_ends, load_scorer, read_scores, reads_steps
from posttrain.records import Message, Pair, Rated, Stepwise, Tree

TOKENS = 8192  # in one forward pass
BLOCK = 512  # trees sorted by length together


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt, as text."""

    prompt: tuple[Message, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`scores`: the model's own, one per step, or one. `value` is their aggregate in 0..1, None where the answer could
    not be read; `detail` then says why."""

    value: float | None
    scores: tuple[float, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Scorer:
    """`label` is what people call it. `aggregate` counts only where steps are scored."""

    model: Policy
    renderer: Renderer
    label: str
    aggregate: str = "min"

    @property
    def steps(self) -> bool:
        return reads_steps(self.model)

    def pairs(self, rows: Iterable[Pair]) -> list[tuple[float, float]]:
        """Scores of chosen and rejected; of a process reward model the logit of the aggregate of its steps."""
        rows = list(rows)
        if not self.steps:
            trees = [at_ends(tree) for tree in self.renderer.pairs(rows)]
            self._refuse_too_long(trees)
            found = self.trees(trees)
            return [(chosen[0], rejected[0]) for chosen, rejected in found]
        sides = [
            Answer(row.prompt + side[:-1], side[-1].content) for row in rows for side in (row.chosen, row.rejected)
        ]
        verdicts = iter(self.answers(sides))
        return [(logit(next(verdicts)), logit(next(verdicts))) for _ in rows]

    def answers(self, asked: Sequence[Answer]) -> list[Verdict]:
        """One verdict per answer, in order. One that cannot be read, or is too long, gets none; the others do."""
        verdicts: list[Verdict] = [Verdict(None)] * len(asked)
        trees: list[Tree] = []
        places: list[int] = []
        for place, answer in enumerate(asked):
            try:
                tree = self._tree(answer, str(place))
            except PosttrainError as e:
                verdicts[place] = Verdict(None, detail=e.what)
                continue
            if tree.n_tokens > self.room:
                verdicts[place] = Verdict(None, detail=f"{tree.n_tokens} tokens, and {self.label} knows {self.room}")
                continue
            trees.append(tree)
            places.append(place)
        for place, (scores,) in zip(places, self.trees(trees), strict=True):
            if all(map(math.isfinite, scores)):
                verdicts[place] = Verdict(self._value(scores), scores)
            else:
                verdicts[place] = Verdict(None, detail=f"{self.label} scores it {', '.join(map(str, scores))}")
        return verdicts

    def _refuse_too_long(self, trees: Sequence[Tree]) -> None:
        for tree in trees:
            longest = len(tree.trunk_ids) + max(len(branch.token_ids) for branch in tree.branches)
            if longest > self.room:
                raise DataError(
                    f"prompt and answer are {longest} tokens, and {self.label} knows {self.room} positions.",
                    where=tree.id,
                    remedy="Leave out pairs that long.",
                )

    @property
    def room(self) -> int:
        limit = getattr(self.model.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit is not None else 1 << 30

    def trees(self, trees: Sequence[Tree]) -> list[tuple[tuple[float, ...], ...]]:
        """Scores at the marked tokens, by branch of each tree, in order. Neighbours with one prompt share it."""
        found: list[tuple[tuple[float, ...], ...]] = []
        rest = iter(trees)
        while block := list(islice(rest, BLOCK)):
            found += self._block(block)
        return found

    @torch.no_grad()
    def _block(self, trees: Sequence[Tree]) -> list[tuple[tuple[float, ...], ...]]:
        shared = _with_common_trunks(trees)
        by_branch: list[tuple[tuple[float, ...], ...]] = [()] * len(shared)
        for places in _cut(shared):
            score_N, table = read_scores(self.model, [shared[i] for i in places])
            n_marks = torch.bincount(table.branch_N, minlength=table.n_branches).tolist()
            parts = iter(tuple(part.tolist()) for part in score_N.split(n_marks))
            for i in places:
                by_branch[i] = tuple(next(parts) for _ in shared[i].branches)
        flat = iter(scores for branches in by_branch for scores in branches)
        return [tuple(next(flat) for _ in tree.branches) for tree in trees]

    def _tree(self, answer: Answer, name: str) -> Tree:
        if self.steps:
            steps = tuple(line for line in answer.text.split(STEP_END) if line.strip()) or ("",)
            return self.renderer.stepwise([Stepwise(name, answer.prompt, steps, (True,) * len(steps))])[0]
        row = Rated(name, answer.prompt, (Message("assistant", answer.text),), good=True)
        return at_ends(self.renderer.rated([row])[0])

    def _value(self, scores: Sequence[float]) -> float:
        p_K = torch.tensor(scores, dtype=torch.float64).sigmoid()
        return float(STEP_AGGREGATES[self.aggregate](p_K))


def open_scorer(
    source: str, label: str, *, template: str | None = None, aggregate: str = "min", dtype: str = "auto"
) -> Scorer:
    """Load a reward model to be asked; `template` None: its own."""
    model = load_scorer(source, LoadOptions(dtype, frozen_base=True))
    _refuse_other_tokenizer(model, source)
    model.model.requires_grad_(False)
    return Scorer(model, Renderer(model.tokenizer, template), label, aggregate)


def _refuse_other_tokenizer(model: Policy, source: str) -> None:
    """A tokenizer that was put beside weights of another; one of the same size shows only in what it scores."""
    n_tokens = max(model.tokenizer.get_vocab().values()) + 1
    n_known = model.model.get_input_embeddings().weight.shape[0]
    if n_tokens > n_known:
        raise ModelError(
            f"the tokenizer beside the reward model has {n_tokens:,} tokens, and the model knows {n_known:,}.",
            where=source,
            remedy="It is another model's: put back the tokenizer that it was trained with.",
        )


def logit(verdict: Verdict) -> float:
    """One number for the answer, as unbounded as the model's own: its score, or the logit of its steps' aggregate."""
    if len(verdict.scores) == 1:
        return verdict.scores[0]
    if verdict.value is None:
        raise PosttrainError(f"an answer of a pair could not be scored: {verdict.detail}.")
    p = min(max(verdict.value, 1e-12), 1 - 1e-12)
    return math.log(p / (1 - p))


def _with_common_trunks(trees: Sequence[Tree]) -> list[Tree]:
    """Neighbouring trees with the same prompt as one tree; branches keep their order."""
    shared: list[Tree] = []
    for tree in trees:
        if shared and shared[-1].trunk_ids == tree.trunk_ids and tree.trunk_ids:
            shared[-1] = replace(shared[-1], branches=shared[-1].branches + tree.branches)
        else:
            shared.append(tree)
    return shared


def _cut(trees: Sequence[Tree]) -> Iterable[list[int]]:
    """Places of trees by length, longest first, as many as fit the token budget."""
    part: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(trees)), key=lambda i: trees[i].n_tokens, reverse=True):
        if part and n_tokens + trees[i].n_tokens > TOKENS:
            yield part
            part, n_tokens = [], 0
        part.append(i)
        n_tokens += trees[i].n_tokens
    if part:
        yield part
