"""Let a model answer a suite. The answers are kept beside the verdict, so that anybody can read what was judged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.data.render import Renderer
from posttrain.errors import DataError
from posttrain.gate.suites import ItemResult, Suite, grade
from posttrain.models.policy import Policy
from posttrain.records import Outcome, Request, Sampling
from posttrain.registry.files import write_text_atomic
from posttrain.reporting import Reporter
from posttrain.rollout.engine import Engine
from posttrain.rollout.environments import in_environment
from posttrain.rollout.judges import OpenScorer, open_judges
from posttrain.rollout.local import LocalEngine
from posttrain.seeds import derive_seed


def answer_suite(
    policy: Policy,
    renderer: Renderer,
    suite: Suite,
    label: str,
    reporter: Reporter,
    *,
    seed: int = 0,
    open_scorer: OpenScorer | None = None,
) -> list[ItemResult]:
    """One sampled answer per item, graded, in the suite's order. `open_scorer` loads the suite's reward models."""
    sampling = Sampling(
        max_new_tokens=suite.sampling.max_new_tokens,
        temperature=suite.sampling.temperature,
        top_p=suite.sampling.top_p,
        top_k=suite.sampling.top_k,
        stop_token_ids=renderer.stop_token_ids,
    )
    engine: Engine = LocalEngine(policy, renderer.answer_text)
    if world := in_environment(suite.environment, engine, renderer, Path):
        engine, prompts = world, world.begin(suite.items)
    else:
        prompts = {item.id: renderer.prompt_ids(item.prompt, item.id, item.tools) for item in suite.items}
    requests = [Request(item.id, prompts[item.id], (derive_seed(seed, "suite", item.id),)) for item in suite.items]
    _refuse_beyond_positions(policy, suite, requests)
    with reporter.task(f"{label} on {suite.name}", len(requests)) as task:
        completions = [group[0] for group in engine.generate(requests, sampling, lambda done, _: task.update(done))]
    with open_judges(suite.score, open_scorer) as judges:
        for level in judges.sandboxes:
            reporter.line(f"{suite.name}: {level.sentence}.")
        return grade(suite, completions, judges)


def _refuse_beyond_positions(policy: Policy, suite: Suite, requests: Sequence[Request]) -> None:
    """An item the model has no room to answer would count as a failed check of every model."""
    limit = getattr(policy.model.config, "max_position_embeddings", None)
    longest = max(requests, key=lambda request: len(request.prompt_ids))
    room, wanted = (limit or 0) - len(longest.prompt_ids), suite.sampling.max_new_tokens
    if limit is not None and wanted > room:
        raise DataError(
            f"suite {suite.name} asks for {wanted} new tokens after a prompt of {len(longest.prompt_ids)}, and the "
            f"model knows {limit} positions.",
            where=longest.id,
            remedy=f"Set sampling: {{max_new_tokens: {room}}} in the suite."
            if room > 0
            else "Leave out items that long.",
        )


def write_answers(path: Path, results: Sequence[ItemResult]) -> None:
    write_text_atomic(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in results))


def read_answers(path: Path) -> list[ItemResult]:
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: answers may hold other line ends
    rows = [json.loads(line) for line in whole]
    return [ItemResult(**{**row, "outcome": Outcome(row["outcome"])}) for row in rows]
