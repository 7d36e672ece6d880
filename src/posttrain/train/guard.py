"""Acts on what health rules find: warns, adapts a setting, sends the run back to a good checkpoint, or stops it.

A checkpoint is good when, as it was written, no rule that may roll back held or was near to it. The newest good one is
kept beside the newest one. All that is known here is in every checkpoint, so a run that was killed does the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import TrainingStopped
from posttrain.losses.terms import Mean
from posttrain.records import Signs
from posttrain.registry.files import write_text_atomic
from posttrain.reporting import Reporter
from posttrain.settings import StageSettings
from posttrain.settings.health import ADAPTABLE, WatchSettings
from posttrain.train.health import Finding, blind, findings, in_doubt, may_roll_back
from posttrain.train.history import History
from posttrain.train.objective import Adaptable, Objective

HEALTH = "health.jsonl"  # in the stage's directory: one line an action
BLIND_AFTER = 10  # steps until a rule whose figure never came is told


@dataclass(frozen=True, slots=True)
class Lever:
    """How `adapt` moves a setting: times `factor`, between the bounds; from 0 it goes to `first`."""

    factor: float
    least: float
    most: float
    first: float = 0.0

    def moved(self, value: float) -> float:
        wanted = value * self.factor if value else self.first
        return min(max(wanted, self.least), self.most)


LEVERS: Mapping[str, Lever] = {
    "beta": Lever(2.0, 0.0, 1.0),
    "entropy_coef": Lever(2.0, 0.0, 0.01, first=0.001),
    "learning_rate": Lever(0.5, 1e-9, 1.0),
}


@dataclass
class Guard:
    """`wants_back` is the finding for which the loop must go back to the checkpoint of step `good`."""

    settings: StageSettings  # as they are now: what was adapted is in them
    label: str
    directory: Path
    reporter: Reporter
    objective: Objective[Any]
    good: int | None = None
    ended: bool = False
    wants_back: Finding | None = None
    changed: dict[str, float] = field(default_factory=dict)
    actions: list[dict[str, Any]] = field(default_factory=list)  # the lines of health.jsonl
    _told: dict[str, int] = field(default_factory=dict)  # the step a rule last spoke at
    _held: dict[str, int] = field(default_factory=dict)  # and the last one it held at
    _history: History = field(init=False)

    def __post_init__(self) -> None:
        rules = self.rules
        looked_back = [r.steps for _, r in rules if hasattr(r, "steps")] if rules else []
        own = [o.steps for o in rules.own] if rules else []
        self._history = History(length=max([*looked_back, *own, 1]))

    @property
    def rules(self) -> WatchSettings | None:
        """None: nothing watches stages of this kind."""
        return getattr(self.settings, "health", None)

    @property
    def needs_start(self) -> bool:
        """Whether the weights before the first step must be on disk, to go back to."""
        return self.rules is not None and may_roll_back(self.rules)

    def after_step(self, step: int, figures: Mapping[str, Mean], signs: Signs, evaluation: Mapping[str, float]) -> None:
        """Look at step `step` (from 1). Raises TrainingStopped; else see `wants_back` and `settings`."""
        rules = self.rules
        if rules is None:
            return
        self._history.add(step, figures, signs, evaluation or None)
        if step == BLIND_AFTER:
            for said in blind(rules, self._history):
                self._say(f"warning: {said}")
        found = list(findings(rules, self._history))
        for finding, action in sorted(found, key=lambda f: ("stop", "rollback", "adapt", "warn").index(f[1])):
            if action == "stop":
                self._note(step, finding, "stop")
                raise TrainingStopped(
                    finding.what,
                    where=f"{self.label} health.{finding.rule}",
                    remedy=finding.remedy,
                )
            if action == "rollback":
                self.wants_back = self.wants_back or finding
            elif self._is_due(finding, step, again=action == "adapt"):
                self._adapt(step, finding) if action == "adapt" else self._warn(step, finding)
        self._forget(step)

    def saving(self, step: int) -> int | None:
        """Call before the checkpoint of step `step` is written: the older one that must stay, if any."""
        if self.needs_start and not (self.rules and in_doubt(self.rules, self._history)):
            self.good = step
        return self.good

    def returned(self, saved: Mapping[str, Any], step: int) -> None:
        """The loop is back at the good checkpoint, whose state was `saved`. What was done so far stays on record."""
        finding, rules = self.wants_back, self.rules
        assert finding is not None
        assert rules is not None
        actions, before = self.actions, self.settings.learning_rate
        changed = dict(self.changed)
        self.restore(saved)
        self.changed, self.actions, self.wants_back = changed, actions, None
        n_before = sum(action["action"] == "rollback" for action in actions)
        if n_before < rules.max_rollbacks:
            self._change({**changed, "learning_rate": before * rules.rollback_factor})
            fate = f"it goes on with learning_rate {self.settings.learning_rate:.3g}, before {before:.3g}"
            self._note(step, finding, "rollback", returned_to=self.good, changed={
                "learning_rate": [before, self.settings.learning_rate]})  # fmt: skip
        else:
            self._change(changed)
            self.ended = True
            fate = "the stage ends there"
            self._note(step, finding, "rollback", returned_to=self.good, ended=True)
        back = f"Back at step {self.good}, the last good checkpoint; {fate}."
        self._say(f"rolled back at step {step}: {finding.what} {finding.remedy} {back}")
        if self.ended and not self.good:
            raise TrainingStopped(
                f"{finding.cause} ({finding.evidence}), and no good checkpoint was written before it.",
                where=f"{self.label} health.{finding.rule}",
                remedy=finding.remedy,
            )

    def figures(self) -> dict[str, float]:
        """For the summary and the manifest: what was done, counted."""
        counts = {kind: sum(a["action"] == kind for a in self.actions) for kind in ("warn", "adapt", "rollback")}
        said = {f"health_{kind}": float(n) for kind, n in counts.items() if n}
        return said | ({"health_ended_early": 1.0} if self.ended else {})

    def state(self) -> dict[str, Any]:
        return {
            "history": self._history.state(),
            "told": self._told,
            "held": self._held,
            "actions": self.actions,
            "changed": self.changed,
            "good": self.good,
            "ended": self.ended,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._history.restore(state["history"])
        self._told, self._held = dict(state["told"]), dict(state["held"])
        self.actions = list(state["actions"])
        self.good, self.ended = state["good"], state["ended"]
        self._change(state["changed"])

    def write(self) -> None:
        """health.jsonl as it stands; a run that goes on forgets what a killed one did after its checkpoint."""
        path = self.directory / HEALTH
        if self.actions or path.exists():
            write_text_atomic(path, "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in self.actions))

    # -- what is done

    def _warn(self, step: int, finding: Finding) -> None:
        self._note(step, finding, "warn")
        self._say(f"warning at step {step}: {finding.what} {finding.remedy}")

    def _adapt(self, step: int, finding: Finding) -> None:
        key = ADAPTABLE[finding.rule]
        before = getattr(self.settings, key, None)
        after = None if before is None else LEVERS[key].moved(before)
        reachable = key == "learning_rate" or isinstance(self.objective, Adaptable)
        if before is None or after is None or after == before or not reachable:
            why = f"{key} is at its bound {before:g}" if before is not None else f"this stage has no {key}"
            self._note(step, finding, "warn", instead_of="adapt", why=why)
            self._say(f"warning at step {step}: {finding.what} {finding.remedy} Not adapted: {why}")
            return
        self._change({**self.changed, key: after})
        self._note(step, finding, "adapt", changed={key: [before, after]})
        self._say(f"adapted at step {step}: {key} {before:.3g} → {after:.3g}, because {finding.what}")

    def _change(self, values: Mapping[str, float]) -> None:
        self.changed = dict(values)
        self.settings = self.settings.model_copy(update=self.changed)
        if isinstance(self.objective, Adaptable):
            for key, value in self.changed.items():
                self.objective.change(key, value)

    def _note(self, step: int, finding: Finding, action: str, **more: Any) -> None:
        line = {"step": step, "rule": finding.rule, "action": action, "cause": finding.cause}
        line |= {"evidence": finding.evidence, "remedy": finding.remedy, "onset": finding.onset}
        self.actions.append({**line, **more})
        self.write()

    def _say(self, text: str) -> None:
        self.reporter.line(f"{self.label}: health: {text}")

    # -- once per onset

    def _is_due(self, finding: Finding, step: int, *, again: bool) -> bool:
        """At the onset; with `again` also each time the rule has held for as long as anything is looked back on."""
        due = finding.rule not in self._told or (again and step - self._told[finding.rule] >= self._history.length)
        if due:
            self._told[finding.rule] = step
        self._held[finding.rule] = step
        return due

    def _forget(self, step: int) -> None:
        """A rule may speak again when it has not held for as long."""
        for rule, last in list(self._held.items()):
            if step - last > self._history.length:
                del self._held[rule], self._told[rule]
