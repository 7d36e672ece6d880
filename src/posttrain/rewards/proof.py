"""A reward proves itself on the very rows it will judge, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import DataError
from posttrain.records import Outcome, Task
from posttrain.rewards.mix import Part, RewardMix


@dataclass(frozen=True, slots=True)
class Proof:
    """`reward` gave `value` to a text of this `case`: "gold" must be 1, "empty" 0, "adversarial" below 1."""

    reward: str
    row_id: str
    case: str
    text: str
    value: float | None
    outcome: Outcome

    @property
    def holds(self) -> bool:
        if self.case == "gold":
            return self.value == 1.0
        if self.case == "empty":
            return self.value == 0.0
        return self.value != 1.0 and self.outcome is not Outcome.CHECKER_FAILED  # running out of time pays nothing


def prove(mix: RewardMix, tasks: Sequence[Task], *, max_rows: int = 64) -> list[Proof]:
    """Every reward on gold, empty and adversarial answers of up to `max_rows` rows, spread evenly over the data.

    Whether a row has the fields a reward needs is looked at for all rows. Raises DataError at the first failure.
    """
    stride = max(1, -(-len(tasks) // max_rows))
    proofs = []
    for part in mix.parts:
        for task in tasks:
            part.reward.arguments(task, **part.options)
        proofs += _prove(RewardMix((part,), mix.pool), part, tasks[::stride])
    return proofs


def unproven(mix: RewardMix, proofs: Sequence[Proof]) -> list[str]:
    """One sentence for each reward that was shown no gold answer, so that nobody knows whether it ever pays."""
    shown = {proof.reward for proof in proofs if proof.case == "gold"}
    return [
        f"the reward {part.label} was shown no right answer to prove itself on. Give it `example`, which must score 1."
        for part in mix.parts
        if part.label not in shown
    ]


def _prove(alone: RewardMix, part: Part, tasks: Sequence[Task]) -> list[Proof]:
    texts = [
        (task, case, text)
        for task in tasks
        for case, group in (
            ("gold", part.reward.gold_texts(task, **part.options)),
            ("empty", [""]),
            ("adversarial", part.reward.adversarial_texts(task, **part.options)),
        )
        for text in group
    ]
    scores = [mixed.total for mixed in alone.judge([(text, task) for task, _, text in texts])]
    proofs = []
    for (task, case, text), score in zip(texts, scores, strict=True):
        proof = Proof(part.label, task.id, case, text, score.value, score.outcome)
        if not proof.holds:
            raise DataError(_complaint(proof, score.detail), where=task.id, remedy=_REMEDIES[case])
        proofs.append(proof)
    return proofs


def _complaint(proof: Proof, detail: str) -> str:
    must = {"gold": "must give 1 to", "empty": "must give 0 to", "adversarial": "must not give 1 to"}[proof.case]
    shown = proof.text if len(proof.text) <= 80 else proof.text[:77] + "..."
    got = f"gave {proof.value:g}" if proof.value is not None else f"failed ({detail})"
    return f"the reward {proof.reward} {must} the {proof.case} answer {shown!r} and {got}."


_REMEDIES = {
    "gold": "Check the answer column of this row, or the reward's options.",
    "empty": "A reward that pays for silence teaches silence.",
    "adversarial": "A reward that pays for this teaches it.",
}
