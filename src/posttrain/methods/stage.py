"""What every training method is handed, and the steps they share on the way from files to trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.filters import apply
from posttrain.data.formats import Loaded, Source
from posttrain.data.hygiene.contamination import Index
from posttrain.data.hygiene.duplicates import Rules
from posttrain.data.hygiene.passages import Document
from posttrain.data.hygiene.screens import Contamination, Repetition, Screen, screened
from posttrain.data.hygiene.units import TokenEncoder
from posttrain.data.ledger import Bucket, Ledger, fit
from posttrain.data.render import Renderer
from posttrain.errors import DataError, ModelError
from posttrain.models.policy import Policy
from posttrain.records import Tree
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
    held_out: Sequence[Document]  # evaluation items: never to be trained on
    reference: Callable[[], Policy] | None = None  # loads the reference where it is not the model the stage starts from

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
    """Open the ledger, filter the rows, take out what must not be trained on, and return what remains."""
    for source in loaded.sources:
        stage.reporter.line(f"{stage.name}: {source}")
    ledger = Ledger.of(loaded)
    filtered = apply(loaded.rows, s.filters)
    for row_id, reason in filtered.dropped:
        ledger.put(row_id, Bucket.DROPPED, reason)
    for said in filtered.said:
        stage.reporter.line(f"{stage.name}: {said}")
    screens = screens_of(stage, s)
    kept = []
    for row, verdict in screened(filtered.rows, screens):
        if verdict is None:
            kept.append(row)
        else:
            ledger.put(row.id, verdict.bucket, verdict.reason)
    for screen in screens:
        for note in screen.notes():
            stage.reporter.line(f"{stage.name}: {note}")
    return ledger, kept


def screens_of(stage: Stage, s: StageSettings) -> list[Screen]:
    """What every row goes through: evaluation items in it, contradictions, duplicates."""
    encode = TokenEncoder(stage.renderer.tokenizer) if s.decontaminate.level == "token" else None
    index = Index.of(stage.held_out, s.decontaminate.n, encode)
    rules = None
    if s.dedup is not None:
        rules = Rules(s.dedup.near, s.dedup.shingle, s.dedup.across, s.dedup.ignore_case)
    return [Contamination(index, s.on_contamination), Repetition(rules, s.on_conflict)]


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
