"""What every training method is handed, and what it hands back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.formats import Source
from posttrain.data.hygiene.passages import Document
from posttrain.data.ledger import Counts
from posttrain.data.render import Renderer
from posttrain.errors import ModelError
from posttrain.models.policy import Policy
from posttrain.registry.files import write_text_atomic
from posttrain.registry.home import PREPARED
from posttrain.reporting import Reporter
from posttrain.rewards.sandbox.level import Level
from posttrain.rollout.scorer import Scorer
from posttrain.settings import ScorerSettings
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
    home: Path | None = None  # None: the stage keeps everything to itself
    open_scorer: Callable[[ScorerSettings], Scorer] | None = None  # loads a reward model that is among the rewards

    @property
    def name(self) -> str:
        return self.place.label

    @property
    def prepared(self) -> Path:
        """Where prepared rows are kept: in the home, for every stage and run that asks for the same."""
        return (self.home or self.place.directory) / PREPARED


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a method hands back; the trained weights are in the stage's policy."""

    trained: Trained
    sources: tuple[Source, ...]
    rows: Counts  # where the training rows ended
    evaluated: Counts | None = None  # and those of eval_datasets


def record_sandboxes(stage: Stage, levels: Sequence[Level]) -> None:
    """Say how programs that the model writes are contained, and keep it beside the stage's metrics."""
    for level in dict.fromkeys(levels):
        stage.reporter.line(f"{stage.name}: {level.sentence}.")
        write_text_atomic(stage.place.directory / "sandbox.json", json.dumps(level.as_dict()) + "\n")


def refuse_beyond_positions(stage: Stage, n_tokens: int) -> None:
    limit = getattr(stage.policy.model.config, "max_position_embeddings", None)
    if limit is not None and n_tokens > limit:
        raise ModelError(
            f"max_length {n_tokens} is more than the {limit} positions this model knows.",
            where=stage.name,
            remedy=f"Set max_length to at most {limit}.",
        )
