"""Which method fits a problem: the choices there are, and the tree that leads to one. Torch-free.

The tree: start from a model that already follows instructions. Facts that change belong into retrieval. Demonstrations
teach tone and format (SFT). Comparisons teach consistent quality (DPO; KTO from thumbs, IPO where labels are noisy,
ORPO for one stage, SimPO where memory is short). What a stronger model can do already is copied from it before anything
is searched for (distillation). Reinforcement learning comes last: it wants a reward that cannot be argued with, and
compute to sample for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from posttrain.settings import METHODS

Have = Literal["pairs", "thumbs", "demonstrations", "checker", "steps", "teacher", "nothing"]
Goal = Literal["tone", "format", "quality", "reasoning", "safety", "knowledge"]
HAVE: tuple[Have, ...] = ("pairs", "thumbs", "demonstrations", "checker", "steps", "teacher", "nothing")
GOALS: tuple[Goal, ...] = ("tone", "format", "quality", "reasoning", "safety", "knowledge")


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with the settings that make it this choice. `data`: the file a recipe would name, and what it holds."""

    method: str
    when: str
    data: str
    needs: str
    cost: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_PAIRS = "pairs of a better and a worse answer to one prompt; some hundreds to start with"
_CHECKED: Mapping[str, Any] = {"rewards": ["math"], "num_generations": 8}
_TWICE = "both answers of a pair pass through the model; "

CHOICES: dict[str, Choice] = {
    "sft": Choice(
        "sft",
        "tone, format, a new task: you can write down what a good answer is",
        "data/demonstrations.jsonl",
        "prompts with good answers; a thousand excellent ones do more than many mediocre ones",
        "the cheapest: each row once per epoch, no second model",
    ),
    "dpo": Choice(
        "dpo",
        "consistent quality: people can tell the better of two answers, but not write the best",
        "data/pairs.jsonl",
        _PAIRS,
        _TWICE + "the reference is asked once, before training",
    ),
    "dpo-ipo": Choice(
        "dpo",
        "the same where labels are noisy: raters disagree, or one weak judge labelled",
        "data/pairs.jsonl",
        _PAIRS,
        "as DPO",
        {"loss_type": "ipo"},
    ),
    "dpo-safety": Choice(
        "dpo",
        "a safety pass: refusals preferred where they are due, held closer to the reference",
        "data/pairs.jsonl",
        "pairs on harmful and on harmless prompts, so that it does not learn to refuse everything",
        "as DPO",
        {"beta": 0.3},
    ),
    "kto": Choice(
        "kto",
        "thumbs up and down from use: single answers, not pairs",
        "data/thumbs.jsonl",
        "answers rated good or bad, both kinds in number",
        "one answer per row; the reference is asked about each row and one mismatched row before training, and every "
        "step has one more pass without gradients",
    ),
    "simpo": Choice(
        "simpo",
        "pairs where memory or time is short: no reference at all",
        "data/pairs.jsonl",
        _PAIRS,
        _TWICE + "no reference",
    ),
    "cpo": Choice(
        "cpo",
        "pairs with answers worth imitating (translations, for one): no reference, and likelihood of the chosen",
        "data/pairs.jsonl",
        _PAIRS,
        _TWICE + "no reference",
    ),
    "orpo": Choice(
        "orpo",
        "SFT and preference in one stage, also on a base model",
        "data/pairs.jsonl",
        _PAIRS + "; the chosen answers are also imitated",
        _TWICE + "no reference, one stage instead of two",
    ),
    "reward_model": Choice(
        "reward_model",
        "a score of whole answers, to rank many of them or as a reward in RL",
        "data/pairs.jsonl",
        _PAIRS,
        _TWICE + "nothing is sampled",
    ),
    "process_reward_model": Choice(
        "process_reward_model",
        "a score of each step of a worked answer",
        "data/steps.jsonl",
        "worked answers whose steps are marked right or wrong",
        "each row once per epoch",
    ),
    "grpo": Choice(
        "grpo",
        "reasoning, or anything a program can check: the reward cannot be argued with",
        "data/tasks.jsonl",
        "prompts with what the checker needs (a gold answer, most often), which the model sometimes solves already",
        "the dearest: several answers to every prompt are sampled at every step",
        _CHECKED,
    ),
    "dapo": Choice(
        "dapo",
        "as grpo, where many prompts are always or never solved: groups that teach nothing are replaced",
        "data/tasks.jsonl",
        "as grpo, and more prompts than one pass needs",
        "as grpo, and up to ten rounds of sampling a step",
        _CHECKED,
    ),
    "dr_grpo": Choice(
        "dr_grpo",
        "as grpo, where answers grow long without getting better: no division by length or spread",
        "data/tasks.jsonl",
        "as grpo",
        "as grpo",
        _CHECKED,
    ),
    "gspo": Choice(
        "gspo",
        "as grpo, for mixture-of-experts models or several steps a round: the ratio is of whole answers",
        "data/tasks.jsonl",
        "as grpo",
        "as grpo",
        _CHECKED,
    ),
    "cispo": Choice(
        "cispo",
        "as grpo, with many steps a round: no token loses its gradient to the clip",
        "data/tasks.jsonl",
        "as grpo",
        "as grpo",
        _CHECKED,
    ),
    "rloo": Choice(
        "rloo",
        "a reward for whole answers, such as a reward model's, held near the start by a KL",
        "data/tasks.jsonl",
        "as grpo, with two answers a prompt or more",
        "as grpo, and the reference is asked about every answer",
        _CHECKED,
    ),
    "reinforce++": Choice(
        "reinforce++",
        "as rloo, with one answer a prompt: credit is against the whole batch",
        "data/tasks.jsonl",
        "as grpo, and many prompts a step",
        "as rloo, with as few answers as one to a prompt",
        {"rewards": ["math"], "num_generations": 1, "per_device_train_batch_size": 64},
    ),
    "ppo": Choice(
        "ppo",
        "a reward model's score where answers to one prompt cannot be compared, or credit must differ within an answer",
        "data/tasks.jsonl",
        "prompts, and a reward: a reward model from pairs, or a checker",
        "the dearest in memory: a critic trains beside the policy, and reference and reward model are asked",
        {"rewards": ["math"]},
    ),
    "reject": Choice(
        "reject",
        "a first gain from a checker, or data for SFT between two stages of RL: the best answers become rows",
        "data/tasks.jsonl",
        "as grpo; a later stage names the rows as {stage: reject}",
        "several answers to every prompt, once; nothing trains",
        {"rewards": ["math"]},
    ),
    "distill": Choice(
        "distill",
        "a smaller model that should answer as a larger one of the same tokenizer does",
        "data/tasks.jsonl",
        "prompts of the kind it will be asked, without answers, and the teacher",
        "one answer to a prompt is sampled, and the teacher reads it: its weights lie in memory beside the model's",
        {"teacher": "Qwen/Qwen3-8B"},
    ),
}


COPY = (
    "A stronger model is there: it says at every token of the student's own answers what it would have said, where a "
    "label or a reward is one number for a whole answer."
)
OTHER_TOKENIZER = "That needs one tokenizer for both; a teacher with another one writes demonstrations for SFT instead."
LET_IT_WRITE = "Let the teacher answer some thousands of prompts, and keep what a check, or you, find right."


@dataclass(frozen=True, slots=True)
class Situation:
    have: frozenset[Have]
    goal: Goal
    noisy: bool = False  # labels
    memory_tight: bool = False
    base_model: bool = False  # one that was never taught to answer


@dataclass(frozen=True)
class Recommendation:
    """`stages` are names in CHOICES, in order; empty where training is not the answer."""

    stages: tuple[str, ...]
    reasons: tuple[str, ...]
    collect: str = ""  # what to gather first

    @property
    def choices(self) -> list[Choice]:
        return [CHOICES[name] for name in self.stages]


def recommend(s: Situation) -> Recommendation:
    """Walk the tree. Every reason is a sentence."""
    reasons = [] if s.base_model else ["Start from a model that already follows instructions."]
    if s.goal == "knowledge":
        return _knowledge(s, reasons)
    main, why = _main(s)
    if "teacher" in s.have:
        return _with_teacher(s, reasons, main, why)
    if main is None:
        return Recommendation(
            ("sft",),
            (*reasons, why),
            "Write some hundreds of demonstrations, or collect thumbs from use; then ask again.",
        )
    return _with_form(s, [*reasons, why], [main])


def _with_form(s: Situation, reasons: list[str], stages: list[str]) -> Recommendation:
    """SFT before the stages, where a form must be learnt first."""
    if CHOICES[stages[0]].method not in ("sft", "orpo") and (s.base_model or _format_first(s)):
        stages.insert(0, "sft")
        reasons.append(
            "SFT comes first: a base model does not answer yet."
            if s.base_model
            else "SFT comes first: your demonstrations show the form, so that the rest need not look for it."
        )
    collect = ""
    if s.base_model and "sft" in stages and "demonstrations" not in s.have:
        who = "Let the teacher write" if "teacher" in s.have else "Write"
        collect = f"{who} some hundreds of demonstrations for SFT, or start from an instruct model without it."
    return Recommendation(tuple(stages), tuple(reasons), collect)


def _with_teacher(s: Situation, reasons: list[str], main: str | None, why: str) -> Recommendation:
    """A stronger model is there. `main` and `why`: what the rest of the situation asks for."""
    alone = main is None or main == "process_reward_model"  # nothing else makes the model itself better
    if s.goal in ("tone", "format") or s.memory_tight:
        hinders = (
            f"A teacher passes on its own {s.goal}; asked for the one you want, it can write demonstrations of it."
            if s.goal in ("tone", "format")
            else "Distillation holds the teacher in memory beside the model; SFT learns from answers it wrote before."
        )
        if alone:
            return Recommendation(("sft",), (*reasons, hinders), LET_IT_WRITE)
        assert main is not None
        return _with_form(s, [*reasons, why, hinders], [main])
    reasons = [*reasons, COPY, OTHER_TOKENIZER]
    if alone or main == "sft":
        return _with_form(s, reasons, ["distill"])
    if main == "orpo":  # which would teach to answer as well
        main, why = _of_pairs(replace(s, base_model=False))
    assert main is not None
    beyond = f"A student stops at its teacher. What goes on from there: {why}"
    return _with_form(s, [*reasons, beyond], ["distill", main])


def _knowledge(s: Situation, reasons: list[str]) -> Recommendation:
    reasons = [*reasons, "Facts that change, or must be cited, belong into retrieval: training teaches how to answer."]
    if "demonstrations" not in s.have:
        return Recommendation((), tuple(reasons), "Put the passages into the prompt, and see what still goes wrong.")
    return Recommendation(
        ("sft",), (*reasons, "SFT on answers written from passages in the prompt teaches the model to use them.")
    )


def _main(s: Situation) -> tuple[str | None, str]:
    """The stage that does the work, and why; None where there is nothing to learn from."""
    if "checker" in s.have and s.goal in ("reasoning", "format", "quality") and not _form_is_shown(s):
        if not s.memory_tight:
            return "grpo", "A program can check the answers, so reinforcement learning has a clear reward."
        if s.have == {"checker"}:
            return "grpo", "Only a checker is there to learn from; with tight memory set adapter: lora."
    if s.goal in ("tone", "format") and "demonstrations" in s.have:
        return "sft", f"For {s.goal}, demonstrations are the shortest way: the model imitates them."
    if "pairs" in s.have:
        return _of_pairs(s)
    if "thumbs" in s.have:
        return "kto", "Thumbs on single answers are what KTO learns from; pairs need not be made up."
    if "demonstrations" in s.have:
        return "sft", "Demonstrations are what you have, and SFT is what learns from them."
    if "steps" in s.have:
        return "process_reward_model", "Labelled steps train a model that scores steps, which then ranks or rewards."
    if "checker" in s.have:
        return "grpo", "A program can check the answers, so reinforcement learning has a clear reward."
    return None, "Nothing to learn from is there yet. Prompt an instruct model first, and keep what it gets wrong."


def _of_pairs(s: Situation) -> tuple[str, str]:
    if s.base_model and "demonstrations" not in s.have:
        return "orpo", "ORPO learns to answer and to prefer in one stage, from the pairs alone."
    if s.memory_tight:
        return "simpo", "SimPO needs no reference, in memory or asked before."
    if s.noisy:
        return "dpo-ipo", "IPO stops at a margin, so wrong labels are not driven to extremes."
    if s.goal == "safety":
        return "dpo-safety", "DPO with β 0.3 stays closer to the reference, which keeps what was not to change."
    return "dpo", "DPO learns consistent quality from comparisons, without a reward model."


def _form_is_shown(s: Situation) -> bool:
    return s.goal == "format" and "demonstrations" in s.have


def _format_first(s: Situation) -> bool:
    return "demonstrations" in s.have


def recipe_text(found: Recommendation, s: Situation) -> str:
    """A recipe to start from, as YAML. `posttrain check` accepts it once its data files are there."""
    name = "Qwen/Qwen3-0.6B-Base" if s.base_model else "Qwen/Qwen3-0.6B"
    lines = ["name: my-model", f"model: {name} # yours: a folder or a Hub name", "stages:"]
    for i, choice in enumerate(found.choices):
        lines.append(f"  - {choice.method}:")
        lines += [f"      {line}" for line in _settings(choice, s, first=i == 0)]
    return "\n".join(lines) + "\n"


def _settings(choice: Choice, s: Situation, *, first: bool) -> Iterator[str]:
    yield f"# {choice.needs}"
    yield f"datasets: [{{path: {choice.data}}}]"
    for key, value in choice.settings.items():
        yield f"{key}: {_yaml(value)}"
    if s.memory_tight:
        yield "adapter: lora"
        yield "gradient_checkpointing: true"
    if first and "allow_without_sft" in METHODS[choice.method].model_fields:
        yield "allow_without_sft: true # an instruct model has had it elsewhere"
    yield "# gate: {suite: suite.yaml, min_gain: 0.02} # without a gate nothing is registered"


def _yaml(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def table() -> str:
    """The method chooser of docs/methods.md, in Markdown."""
    rows = ["| Choose | For | Data | Cost |", "|---|---|---|---|"]
    for choice in CHOICES.values():
        extra = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in choice.settings.items() if key != "rewards")
        label = f"`{choice.method}`" + (f" with {extra}" if extra and choice.method == "dpo" else "")
        rows.append(f"| {label} | {choice.when} | {choice.needs} | {choice.cost} |")
    return "\n".join(rows) + "\n"
