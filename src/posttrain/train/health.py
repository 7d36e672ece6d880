"""Rules that watch a run: each looks at the figures of the steps so far and says what it found, or nothing.

Everything here is a pure function of settings and history. What is done about a finding is `train/guard.py`'s part.
Limits, and what each rule means, stand in docs/health.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from posttrain.losses.terms import Mean
from posttrain.settings.health import OwnRule, RuleSettings, WatchSettings
from posttrain.train.history import Checkup, History

MIN_FAILURES = 3  # failed answers in the window before a failing or hanging reward is named
MIN_GROUPS = 8  # groups that show a correlation
GROWN = 1.05  # answers must be longer than at first by this before a reward is said to pay length
SPREADING = 0.1  # a beginning must be used by this share of the answers more than at first
CONVERGED = 0.9  # a policy that earns this much has little left to explore, or to gain
NO_GAIN = 0.02  # a reward that gained no more than this is flat
MIN_ANSWERS = 64  # preferred answers in the window before they are said to fall


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that holds: why, the numbers it goes by, and the one setting to change."""

    rule: str
    cause: str
    evidence: str
    remedy: str
    onset: int  # first of the steps the evidence is taken from

    @property
    def what(self) -> str:
        return f"{self.cause} ({self.evidence})."


Find = Callable[[RuleSettings, History], Finding | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """`name`: its key. `metrics`: any one of them must be measured. `ease`: the limit times this is where doubt begins,
    in which a checkpoint is no longer taken to be good; `pooled`: that is seen over all its steps, not in the last."""

    name: str
    metrics: tuple[str, ...]
    find: Find
    ease: float = 1.0
    pooled: bool = False

    def doubts(self, r: RuleSettings, history: History) -> bool:
        doubtful = r.model_copy(update={"limit": r.limit * self.ease, "steps": r.steps if self.pooled else 1})
        return self.find(doubtful, history) is not None


def asked(settings: WatchSettings) -> Iterator[tuple[Rule, RuleSettings]]:
    """The rules that watch stages of this kind."""
    for rule in RULES:
        r = getattr(settings, rule.name, None)
        if isinstance(r, RuleSettings):
            yield rule, r


def findings(settings: WatchSettings, history: History) -> Iterator[tuple[Finding, str]]:
    """Every rule that holds after the last step, in the order of `RULES`, with the action the recipe wants."""
    for rule, r in asked(settings):
        if r.action != "ignore" and (found := rule.find(r, history)) is not None:
            yield replace(found, rule=rule.name), r.action
    for own in settings.own:
        if (found := _own(own, history)) is not None:
            yield found, own.action


def in_doubt(settings: WatchSettings, history: History) -> bool:
    """Whether a rule that may roll back holds at the last step, or is near to it."""
    return any(r.action == "rollback" and rule.doubts(r, history) for rule, r in asked(settings)) or any(
        own.action == "rollback" and _own(own.model_copy(update={"steps": 1}), history) is not None
        for own in settings.own
    )


def may_roll_back(settings: WatchSettings) -> bool:
    actions = [*(r.action for _, r in asked(settings)), *(own.action for own in settings.own)]
    return "rollback" in actions


def blind(settings: WatchSettings, history: History) -> list[str]:
    """Rules that the recipe names and whose figures this stage has not measured so far: they can never speak."""
    rules = [rule for rule, r in asked(settings) if rule.name in settings.model_fields_set and r.action != "ignore"]
    named = [(f"health.{rule.name}", rule.metrics) for rule in rules]
    named += [(f"health.own[{i}]", (own.metric,)) for i, own in enumerate(settings.own)]
    return [
        f"{key} watches {' or '.join(metrics)}, which this stage does not measure: it never speaks"
        for key, metrics in named
        if not any(history.measured(metric) for metric in metrics)
    ]


# -- rules on one figure that stays beyond a limit

Value = tuple[int, float]  # step, figure


def _held(history: History, metric: str, steps: int, beyond: Callable[[float], bool]) -> list[Value]:
    """The last `steps` measurements, if each of them is beyond; else none."""
    values = history.values(metric)[-steps:]
    return values if len(values) == steps and all(beyond(value) for _, value in values) else []


def _numbers(metric: str, values: Sequence[Value]) -> str:
    first, last = values[0][0], values[-1][0]
    shown = [f"{value:.3g}" for _, value in values]
    if len(shown) > 5:
        shown = [*shown[:2], "…", *shown[-2:]]
    steps = f"step {last}" if first == last else f"steps {first} to {last}"
    return f"{metric} {', '.join(shown)} at {steps}"


def _at_least(metrics: str | Sequence[str], cause: str, remedy: str) -> Find:
    """Holds while any of `metrics` stays at or above the limit."""
    names = [metrics] if isinstance(metrics, str) else metrics

    def find(r: RuleSettings, history: History) -> Finding | None:
        for name in names:
            if values := _held(history, name, r.steps, lambda value: value >= r.limit):
                return Finding("", cause.format(values[-1][1]), _numbers(name, values), remedy, values[0][0])
        return None

    return find


def _few_effective(r: RuleSettings, history: History) -> Finding | None:
    values = _held(history, "ess_share", r.steps, lambda value: value <= r.limit)
    if not values:
        return None
    cause = f"importance weights leave {values[-1][1]:.0%} of the answers to learn from"
    return Finding("", cause, _numbers("ess_share", values), "Lower num_iterations or learning_rate.", values[0][0])


def _own(own: OwnRule, history: History) -> Finding | None:
    above, below = own.above, own.below
    beyond = (lambda v: v > above) if above is not None else (lambda v: v < (below if below is not None else v))
    values = _held(history, own.metric, own.steps, beyond)
    if not values:
        return None
    side = f"above {above:g}" if above is not None else f"below {below:g}"
    cause = f"{own.metric} stays {side}"
    return Finding(f"own: {own.metric}", cause, _numbers(own.metric, values), "See what moves it.", values[0][0])


# -- what the rewards give


def _dead_signal(r: RuleSettings, history: History) -> Finding | None:
    values: list[Value] = []
    for step, n_batches in reversed(history.values("dead_batches")):
        if n_batches < r.limit:
            break
        values.insert(0, (step, n_batches))
    n_dead = sum(n for _, n in values)
    if n_dead < r.steps:
        return None
    at = history.at(values[-1][0])
    reward, cut = at.figure("reward"), at.figure("cut_share")
    if cut > 0.5:
        why, remedy = f"{cut:.0%} of the answers were cut before they ended", "Raise max_completion_length."
    elif reward > 0.99:
        why, remedy = "every answer is already right", "Give harder prompts."
    elif abs(reward) < 0.01:
        why = "no answer earned anything"
        remedy = "Run SFT on this format first, give easier prompts, or add a reward with partial credit."
    else:
        why, remedy = "all answers of a group earn the same", "Raise temperature or num_generations."
    cause = f"the reward signal is dead: for {n_dead:.0f} batches no group had two different rewards; {why}"
    evidence = f"mean reward {reward:.3g} at step {values[-1][0]}; {_numbers('dead_batches', values)}"
    return Finding("", cause, evidence, remedy, values[0][0])


def _silent_reward(r: RuleSettings, history: History) -> Finding | None:
    parts = history.parts()
    for name in parts if len(parts) > 1 else ():
        if values := _held(history, name, r.steps, lambda value: abs(value) <= r.limit):
            label = name.removeprefix("reward_")
            cause = f"the reward {label} paid nothing to any answer for {len(values)} batches"
            remedy = f"Look at the answers with posttrain rollouts, then mend or remove {label} in rewards."
            return Finding("", cause, _numbers(name, values), remedy, values[0][0])
    return None


def _failing(metric: str, cause: str, remedy: str, *, but: str = "") -> Find:
    """A share of answers over the whole window, without those that `but` counts, with one of them as an example."""

    def find(r: RuleSettings, history: History) -> Finding | None:
        window = history.measuring(metric)[-r.steps :]
        pooled = sum((at.figures[metric] for at in window), Mean(0.0, 0.0))
        pooled += Mean(-sum(at.figures[but].total for at in window if but in at.figures), 0.0)
        if pooled.total < MIN_FAILURES or pooled.value < r.limit:
            return None
        example = next((at.notes[metric] for at in reversed(window) if metric in at.notes), "")
        evidence = f"{pooled.total:.0f} of {pooled.count:.0f} answers at steps {window[0].step} to {window[-1].step}"
        return Finding("", f"{cause}; {example}" if example else cause, evidence, remedy, window[0].step)

    return find


def _slow_rewards(r: RuleSettings, history: History) -> Finding | None:
    window = [at for at in history.measuring("reward_seconds") if at.figure("seconds") > 0][-r.steps :]
    shares = [(at.step, at.figures["reward_seconds"].total / at.figure("seconds")) for at in window]
    if len(shares) < r.steps or min(share for _, share in shares) < r.limit:
        return None
    cause = f"rewards take {shares[-1][1]:.0%} of a step's time"
    return Finding(
        "", cause, _numbers("reward_seconds / seconds", shares), "Make the slowest reward cheaper.", shares[0][0]
    )


# -- what the answers turn into


def _entropy_collapse(r: RuleSettings, history: History) -> Finding | None:
    start = max((mean.value for mean in history.first("sampled_entropy")), default=0.0)
    values = _held(history, "sampled_entropy", r.steps, lambda value: value <= r.limit * start)
    converged = history.pooled("reward", r.steps) >= CONVERGED
    if not values or start <= 0 or converged:
        return None
    left = max(0.0, values[-1][1] / start)
    cause = f"the policy stopped exploring: its entropy is {left:.1%} of what it was"
    evidence = f"{_numbers('sampled_entropy', values)}, {start:.3g} at first"
    return Finding("", cause, evidence, "Lower learning_rate.", values[0][0])


def _length_growth(r: RuleSettings, history: History) -> Finding | None:
    window = history.measuring("completion_tokens")[-r.steps :]
    before, after = history.start("completion_tokens"), history.pooled("completion_tokens", r.steps)
    gain = history.pooled("reward", r.steps) - history.start("reward")
    if len(window) < r.steps or not after >= r.limit * before or not gain <= NO_GAIN:
        return None
    cause = f"answers grow longer and earn no more: {after:.0f} tokens, {before:.0f} at first; reward {gain:+.3f}"
    evidence = _numbers("completion_tokens", [(at.step, at.figure("completion_tokens")) for at in window])
    remedy = "Add a length reward, or raise beta."
    return Finding("", cause, evidence, remedy, window[0].step)


def _length_pays(r: RuleSettings, history: History) -> Finding | None:
    window = history.measuring("length_pays")[-r.steps :]
    pooled = sum((at.figures["length_pays"] for at in window), Mean(0.0, 0.0))
    before, after = history.start("completion_tokens"), history.pooled("completion_tokens", r.steps)
    if len(window) < r.steps or pooled.count < MIN_GROUPS or pooled.value < r.limit or not after >= GROWN * before:
        return None
    cause = (
        f"the reward pays length: among answers to one prompt the longer earn more (correlation {pooled.value:.2f} in "
        f"{pooled.count:.0f} groups), and answers grew from {before:.0f} to {after:.0f} tokens"
    )
    evidence = _numbers("length_pays", [(at.step, at.figure("length_pays")) for at in window])
    remedy = "Mend the reward, or add a length reward that pays against it."
    return Finding("", cause, evidence, remedy, window[0].step)


def _preamble_pays(r: RuleSettings, history: History) -> Finding | None:
    window = [at for at in history.recent if at.openings][-r.steps :]
    best: tuple[float, str, float, float, int] | None = None
    for opening in window[-1].openings if window else ():
        seen = [o for at in window for o in at.openings if o.text == opening.text]
        groups, pays = sum(o.n_groups for o in seen), sum(o.pays for o in seen)
        now, before = opening.n_answers / opening.n_all, history.opening_at_first(opening.text)
        if groups < MIN_GROUPS or pays < r.limit * groups or now - before < SPREADING:
            continue
        if best is None or pays / groups > best[0]:
            best = (pays / groups, opening.text, before, now, groups)
    if best is None:
        return None
    correlation, text, before, now, groups = best
    cause = (
        f"the reward pays the preamble {text!r}: {now:.0%} of the answers begin with it, {before:.0%} at first, and "
        f"those that do earn more than others to the same prompt"
    )
    evidence = f"correlation {correlation:.2f} in {groups} groups at steps {window[0].step} to {window[-1].step}"
    remedy = "Mend the reward; where it is meant to pay this beginning, set health.preamble_pays.action: ignore."
    return Finding("", cause, evidence, remedy, window[0].step)


def _reward_hacking(r: RuleSettings, history: History) -> Finding | None:
    points: list[Checkup] = list(history.checkups)[-r.steps :]
    if len(points) < r.steps:
        return None
    rise = points[-1].opinion - points[0].opinion
    gain = points[-1].checked - points[0].checked
    settled = min(points[0].checked, points[-1].checked) >= CONVERGED  # checks that can hardly rise
    if not rise >= r.limit or gain > 0 or settled:
        return None
    cause = "the policy is learning the reward model's mistakes: its score rises, held-out checks do not"
    opinions, checks = [(p.step, p.opinion) for p in points], [(p.step, p.checked) for p in points]
    evidence = f"{_numbers('reward model', opinions)}; {_numbers('held-out checks', checks)}"
    return Finding("", cause, evidence, "Raise beta, or give checkers more weight among rewards.", points[0].step)


# -- preferred answers


def _chosen_falling(r: RuleSettings, history: History) -> Finding | None:
    """The better answers become less likely than under the reference. The step says what to change in its notes."""
    pairs = history.measured("chosen_fallen_share")
    metric = "chosen_fallen_share" if pairs else "good_fallen_share"
    window = history.measuring(metric)[-r.steps :]
    fallen = sum((at.figures[metric] for at in window), Mean(0.0, 0.0))
    if fallen.count < MIN_ANSWERS or fallen.value < r.limit:
        return None
    margin = history.pooled("reward_margin", r.steps)
    if not pairs:
        margin = history.pooled("reward_good", r.steps) - history.pooled("reward_bad", r.steps)
    cause = f"{fallen.value:.0%} of the better answers are less likely than under the reference, "
    remedy = window[-1].notes.get(metric, "Raise beta.")
    if margin > 0:
        cause += "while the margin grows: the others are pushed down, and what takes their place is neither"
    else:
        cause += "and the others are not worse off: both are lost"
        remedy = "Lower learning_rate."
    evidence = f"{fallen.total:.0f} of {fallen.count:.0f} answers at steps {window[0].step} to {window[-1].step}"
    return Finding("", cause, f"{evidence}; margin {margin:.3g}", remedy, window[0].step)


RULES: tuple[Rule, ...] = (
    Rule("dead_signal", ("dead_batches",), _dead_signal),
    Rule("reward_hacking", ("reward_reward_model",), _reward_hacking),
    Rule("entropy_collapse", ("sampled_entropy",), _entropy_collapse, ease=2.0),
    Rule(
        "kl_drift",
        ("kl_k3_to_reference", "kl_k1_to_reference"),
        _at_least(
            ("kl_k3_to_reference", "kl_k1_to_reference"),
            "the policy has drifted {:.2g} nats per token from the reference",
            "Raise beta.",
        ),
        ease=0.5,
    ),
    Rule(
        "sampler_mismatch",
        ("mismatch_k3",),
        _at_least(
            "mismatch_k3",
            "trainer and sampler disagree by {:.2g} nats per token: what is learned from is not what was sampled",
            "Lower num_iterations or learning_rate.",
        ),
        ease=0.5,
    ),
    Rule(
        "clipping",
        ("clipped_low_share", "clipped_high_share"),
        _at_least(
            ("clipped_low_share", "clipped_high_share"),
            "{:.0%} of the sampled tokens are clipped and teach nothing",
            "Lower learning_rate or num_iterations.",
        ),
        ease=0.5,
    ),
    Rule("few_effective", ("ess_share",), _few_effective, ease=1.5),
    Rule(
        "checker_failures",
        ("checker_failed_share",),
        _failing(
            "checker_failed_share",
            "a reward fails on some answers",
            "Mend the reward for such answers.",
            but="timed_out_share",
        ),
    ),
    Rule(
        "hanging_checker",
        ("timed_out_share",),
        _failing("timed_out_share", "a reward hangs on some answers", "Mend the reward, or give it more time."),
    ),
    Rule("slow_rewards", ("reward_seconds",), _slow_rewards),
    Rule("length_pays", ("length_pays",), _length_pays),
    Rule("preamble_pays", ("reward",), _preamble_pays),
    Rule("length_growth", ("completion_tokens",), _length_growth),
    Rule(
        "cut_answers",
        ("cut_share",),
        _at_least("cut_share", "{:.0%} of the answers are cut before they end", "Raise max_completion_length."),
    ),
    Rule(
        "all_right",
        ("all_right_share",),
        _at_least("all_right_share", "in {:.0%} of the groups every answer is right", "Give harder prompts."),
    ),
    Rule(
        "all_wrong",
        ("all_wrong_share",),
        _at_least("all_wrong_share", "in {:.0%} of the groups every answer is wrong", "Give easier prompts."),
    ),
    Rule("silent_reward", ("reward",), _silent_reward),
    Rule("chosen_falling", ("chosen_fallen_share", "good_fallen_share"), _chosen_falling, ease=0.9, pooled=True),
)
