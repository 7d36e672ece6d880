"""What every training method is handed, and the steps they share on the way from files to trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.filters import apply
from posttrain.data.formats import Loaded, Source
from posttrain.data.hygiene import overlaps, refuse_overlap
from posttrain.data.ledger import Bucket, Ledger, fit
from posttrain.data.render import Renderer
from posttrain.errors import DataError, ModelError
from posttrain.models.policy import Policy
from posttrain.records import Example, Message, Pair, Task, Tree
from posttrain.registry.files import writing
from posttrain.reporting import Reporter
from posttrain.settings import StageSettings
from posttrain.train.loop import Place, Trained


@dataclass(frozen=True)
class Stage:
    """One training stage about to run: the model it starts from, and where it lives."""

    policy: Policy
    renderer: Renderer
    resolve: Callable[[str], Path]
    place: Place
    reporter: Reporter
    held_out: Sequence[tuple[str, str]]  # (id, prompt text) of the gate's items: never to be trained on

    @property
    def name(self) -> str:
        return self.place.label


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a method hands back; the trained weights are in the stage's policy."""

    trained: Trained
    sources: tuple[Source, ...]
    ledger: dict[str, int]  # training rows per bucket


def account(stage: Stage, loaded: Loaded[Any], s: StageSettings) -> tuple[Ledger, list[Any]]:
    """Open the ledger, filter the rows, take out those that hold evaluation items, and return what remains."""
    for source in loaded.sources:
        stage.reporter.line(f"{stage.name}: {source}")
    ledger = Ledger.of(loaded)
    filtered = apply(loaded.rows, s.filters)
    for row_id, reason in filtered.dropped:
        ledger.put(row_id, Bucket.DROPPED, reason)
    for said in filtered.said:
        stage.reporter.line(f"{stage.name}: {said}")
    texts = [(row.id, _asked(row)) for row in filtered.rows]
    if s.on_contamination == "error":
        refuse_overlap(texts, stage.held_out)
        return ledger, list(filtered.rows)
    hits = {hit.train_id: hit for hit in overlaps(texts, stage.held_out)}
    for hit in hits.values():
        ledger.put(hit.train_id, Bucket.CONTAMINATED, str(hit))
    return ledger, [row for row in filtered.rows if row.id not in hits]


def fit_rows(stage: Stage, trees: Sequence[Tree], ledger: Ledger, s: StageSettings) -> list[Tree]:
    """Apply max_length, close the ledger and write rows.jsonl."""
    _refuse_beyond_positions(stage, s.max_length)
    kept = fit(trees, s.max_length, s.on_overflow, s.max_drop_rate, ledger)
    stage.reporter.line(f"{stage.name}: {ledger.summary()}")
    with writing(stage.place.directory):
        ledger.write(stage.place.directory / "rows.jsonl")
    return kept


def refuse_unending(stage: Stage, trees: Sequence[Tree]) -> None:
    """The model learns to stop only from answers that end with a token the sampler stops on, and that carries loss."""
    stops = frozenset(stage.renderer.stop_token_ids)
    answers = [branch for tree in trees for branch in tree.branches]
    n_ending = sum(b.token_ids[-1] in stops and b.scored[-1] for b in answers)
    end = stage.renderer.template.end.strip()
    stage.reporter.line(f"{stage.name}: {n_ending:,} of {len(answers):,} answers end with {end}, where sampling stops")
    if not n_ending:
        raise DataError(
            f"not one of {len(answers):,} answers ends with {end} as a token with loss, so the model would never learn "
            "to stop.",
            where=trees[0].id,
            remedy="Raise max_length so that whole answers fit, or set on_overflow: drop.",
        )


def fit_evaluation(trees: Sequence[Tree], loaded: Loaded[Any], s: StageSettings) -> list[Tree]:
    """Evaluation rows obey the same length rule and have a ledger of their own."""
    return fit(trees, s.max_length, s.on_overflow, s.max_drop_rate, Ledger.of(loaded), bucket=Bucket.EVALUATED)


def counts(ledger: Ledger) -> dict[str, int]:
    return {str(bucket): ledger.count(bucket) for bucket in Bucket if ledger.count(bucket)}


def _refuse_beyond_positions(stage: Stage, n_tokens: int) -> None:
    limit = getattr(stage.policy.model.config, "max_position_embeddings", None)
    if limit is not None and n_tokens > limit:
        raise ModelError(
            f"max_length {n_tokens} is more than the {limit} positions this model knows.",
            where=stage.name,
            remedy=f"Set max_length to at most {limit}.",
        )


def prompt_text(messages: Iterable[Message]) -> str:
    """What the user says in a conversation: the part that identifies an item."""
    return "\n".join(m.content for m in messages if m.role == "user")


def _asked(row: Example | Pair | Task) -> str:
    if isinstance(row, Example):
        return row.text if row.text is not None else prompt_text(row.messages)
    return prompt_text(row.prompt)
