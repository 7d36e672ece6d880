"""What models answered to suites, asked once and kept: the same weights are never asked the same twice.

Answers with a failed or timed-out check among them are not kept: the next run may find the machine less busy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain import __version__
from posttrain.data.render import Renderer
from posttrain.gate.answer import answer_suite, read_answers, write_answers
from posttrain.gate.suites import ItemResult, Suite
from posttrain.models.load import LoadOptions, load_policy
from posttrain.models.policy import Policy
from posttrain.registry.artefact import refuse_other_template
from posttrain.reporting import Reporter
from posttrain.rollout.judges import OpenScorer


@dataclass(frozen=True)
class Answers:
    """Answers of any number of models to one suite, under one template."""

    home: Path
    suite: Suite
    template: str | None
    reporter: Reporter
    dtype: str  # the recipe's: other arithmetic may answer otherwise
    open_scorer: OpenScorer | None = None  # of the suite's reward models, whose content is in its fingerprint

    def of(self, source: str, weights: str, label: str, options: LoadOptions) -> list[ItemResult]:
        """The graded answers of the model at `source`; it is loaded only when it was never asked."""
        path = self._path(weights)
        if path.exists():
            return read_answers(path)
        policy = load_policy(source, replace(options, gradient_checkpointing=False))
        renderer = Renderer(policy.tokenizer, self.template)
        refuse_other_template(Path(source), renderer.fingerprint)
        return self.of_loaded(policy, renderer, weights, label)

    def of_loaded(self, policy: Policy, renderer: Renderer, weights: str, label: str) -> list[ItemResult]:
        path = self._path(weights)
        if path.exists():
            return read_answers(path)
        results = answer_suite(policy, renderer, self.suite, label, self.reporter, open_scorer=self.open_scorer)
        if all(r.value is not None for r in results):
            write_answers(path, results)
        return results

    def _path(self, weights: str) -> Path:
        """`weights` identifies the model: an artefact's fingerprint or a base model's hash."""
        key = hashlib.sha256(
            f"{weights}\n{self.suite.fingerprint}\n{self.template}\n{self.dtype}\n{__version__}".encode()
        ).hexdigest()[:16]
        return self.home / "answers" / f"{key}.jsonl"
