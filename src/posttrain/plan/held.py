"""What a stage holds in memory, phase by phase, each part under its name.

A phase's parts exist together; the stage needs as much as its largest phase. Everything is computed: weights and
gradients from the config, activations by tracing the training code (`trace`), caches from the sampler's own rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from posttrain.errors import ModelError
from posttrain.models.memory import HELD, holds_freed_memory
from posttrain.pipeline.stage import load_options
from posttrain.plan.beside import Critic, critic_of, with_critic, with_teacher
from posttrain.plan.rows import Rows, sampled
from posttrain.plan.shape import Shape
from posttrain.plan.target import Target
from posttrain.plan.trace import Counts, Setup, Traced, count, sampler_copies, trace_scoring, trace_training
from posttrain.records import Branch, Tree
from posttrain.rollout.cache import GROW
from posttrain.rollout.local import MAX_SLOTS
from posttrain.rollout.room import MEMORY_SHARE, PREFILL_TOKENS
from posttrain.settings import (
    DPOSettings,
    GRPOSettings,
    LoraSettings,
    PPOSettings,
    SFTSettings,
    StageSettings,
)
from posttrain.settings.preference import ReferenceSettings
from posttrain.settings.reward import ScoringSettings

# bitsandbytes: half a byte per weight, a scale byte per 64 weights, and a float32 per 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of optimiser state per trained number. 8-bit states have one scale (float32) per 256 numbers, twice; paged ones
# live on the host while there is no room.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
DRAWING = 24  # bytes per logit while a token is drawn: log-probs in float32, then their sums in float64


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    parts: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Held:
    """One stage's phases, and the counts and traces they come from."""

    counts: Counts
    phases: tuple[Phase, ...]
    training: Traced
    setup: Setup
    critic: Critic | None = None

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)


def setup_of(s: StageSettings, device: str) -> Setup:
    """As `load_policy` and the methods would hold the model."""
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    compute = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}[s.dtype]
    return Setup(
        kept=compute if load_options(s).frozen_base else torch.float32,
        compute=compute,
        device=device,
        adapter=s.adapter,
        lora=s.lora if s.adapter != "none" else LoraSettings(),
        checkpointing=s.gradient_checkpointing,
        layout="padded" if s.forest == "off" else "forest",
        dropout=isinstance(s, SFTSettings | ScoringSettings),
        scores=isinstance(s, ScoringSettings),
    )


def hold(
    shape: Shape,
    s: StageSettings,
    rows: Rows,
    target: Target,
    *,
    other_reference: bool = False,
    suite: Asking | None = None,
    judges: int = 0,
    suite_judges: int = 0,
    scorer: Shape | None = None,
    teacher: Shape | None = None,
) -> Held:
    """`other_reference`: ratios are measured against a model that is not the one the stage starts from. `suite`: what
    the stage's gate asks. `judges`: bytes of reward models that judge the answers, `suite_judges` of those that score
    the suite. `scorer`: the one among them that
    PPO's critic starts from. `teacher`: of distillation."""
    setup = setup_of(s, target.device)
    counts = count(shape, setup)
    _refuse_unpacked(shape, setup, counts)
    weights = {"process": target.overhead, "weights": weight_bytes(setup, counts)}
    if judges:
        weights["reward models"] = judges
    if teacher is not None:
        weights["teacher"] = _frozen(teacher, setup)
    states = {"optimiser": int(STATE_BYTES[s.optim] * counts.n_trainable)}
    critic = critic_of(s, shape, setup, scorer) if isinstance(s, PPOSettings) else None
    lasting = reference_parts(shape, s, setup)
    if critic is not None:
        lasting["critic"] = critic.weights
        states["critic's optimiser"] = int(STATE_BYTES[s.optim] * critic.n_trainable)
    training, tiles = _traced(shape, s, setup, rows, critic, teacher)
    phases = [Phase("load", {**weights, **_loading(shape, setup)})]
    answers = sampled(s)
    if isinstance(s, ReferenceSettings) and "reference copy" not in lasting:
        extra = {"reference": _frozen(shape, setup)} if other_reference else {}
        phases.append(Phase("ask the reference", {**weights, **extra, **_scoring(shape, setup, rows)}))
    phases += _training(weights | lasting, states, counts, training, setup, rows, critic)
    if s.eval_datasets and answers is None:
        phases.append(Phase("evaluate", {**weights, **lasting, **states, **_scoring(shape, setup, rows), **tiles}))
    if answers is not None:
        asking = Asking(answers.n_prompts, answers.n_each, rows.longest_prompt, answers.n_tokens)
        sampling = sampling_parts(shape, setup, target, asking)
        phases.append(Phase("sample", {**weights, **lasting, **states, **sampling}))
    merging = {"merged weights": counts.merged_bytes} if counts.merged_bytes else {}
    saved = {"saved model": _saved(shape, setup)}
    phases += [Phase("save", {**weights, **merging}), Phase("prove what was saved", {**weights, **saved})]
    if suite is not None:
        judged = {"process": target.overhead, "weights": _frozen(shape, setup)}
        plain = dataclasses.replace(setup, kept=setup.compute, adapter="none")  # as it was saved
        phases.append(Phase("gate", judged | sampling_parts(shape, plain, target, suite)))
        if suite_judges:
            phases.append(Phase("gate: reward models", judged | {"reward models": suite_judges}))
    return Held(counts, tuple(phases), training, setup, critic)


def _refuse_unpacked(shape: Shape, setup: Setup, counts: Counts) -> None:
    """As loading it would."""
    if setup.adapter == "qlora" and counts.stacked_params > counts.linear_params / 10:
        raise ModelError(
            f"adapter: qlora would leave {counts.stacked_params:,} weights of {shape.text.model_type} as they are: its "
            "experts are stacked in tensors that bitsandbytes does not know.",
            remedy="Use adapter: lora.",
        )


def _traced(
    shape: Shape, s: StageSettings, setup: Setup, rows: Rows, critic: Critic | None, teacher: Shape | None
) -> tuple[Traced, dict[str, int]]:
    """One micro-batch, forward and backward; and what every look at a teacher's distributions takes besides."""
    if teacher is not None:
        found, tile = with_teacher(shape, setup, teacher, rows.worst, accumulating=rows.several)
        return found, {"distributions": tile}
    # Others ask the reference together with the rollouts.
    reference_too = isinstance(s, GRPOSettings) and s.beta > 0 and s.kl_in == "loss"
    found = trace_training(shape, setup, rows.worst, accumulating=rows.several, reference_too=reference_too)
    return (found if critic is None else with_critic(found, critic, rows.worst, accumulating=rows.several)), {}


def _training(
    held: Mapping[str, int],
    states: Mapping[str, int],
    counts: Counts,
    training: Traced,
    setup: Setup,
    rows: Rows,
    critic: Critic | None,
) -> list[Phase]:
    """The forward and backward pass, and the optimiser's step. Gradients of the first micro-batch of a step are born
    during its backward pass; those of later ones lie there throughout."""
    unpacked = {"a layer unpacked": _largest_linear(counts, setup)} if setup.adapter == "qlora" else {}
    gradients = {"gradients": counts.trainable_bytes}
    if critic is not None:
        gradients["critic's gradients"] = critic.gradients
    pass_ = {"activations": training.peak, **unpacked}
    if not rows.several:
        pass_ = {"activations, and gradients as they come": training.peak, **unpacked}
    if setup.device == "cpu" and holds_freed_memory():
        pass_["freed and not given back"] = min(training.held, HELD)
    return [
        Phase("train", {**held, **states, **(gradients if rows.several else {}), **pass_}),
        Phase("take a step", {**held, **states, **gradients}),
    ]


def _scoring(shape: Shape, setup: Setup, rows: Rows) -> dict[str, int]:
    return {"scoring": trace_scoring(shape, setup, rows.worst).peak}


# --- parts -------------------------------------------------------------------------------------------------------


def weight_bytes(setup: Setup, counts: Counts) -> int:
    """All weights, adapters included. Of a 4-bit base only linear layers are packed."""
    if setup.adapter != "qlora":
        return counts.weight_bytes
    packed = counts.linear_params
    unpacked = counts.n_params - counts.n_trainable - packed
    return int(packed * NF4_BYTES) + unpacked * setup.kept.itemsize + counts.trainable_bytes


def reference_parts(shape: Shape, s: StageSettings, setup: Setup) -> dict[str, int]:
    """A reference that must last while the policy trains. An adapter's is its base, and costs nothing."""
    if isinstance(s, ReferenceSettings):
        moves = isinstance(s, DPOSettings) and s.sync_ref_model
        lasts = moves or not s.precompute_ref_log_probs
    else:
        lasts = isinstance(s, GRPOSettings | PPOSettings) and s.beta > 0
    return {"reference copy": _copy(shape, setup)} if lasts and setup.adapter == "none" else {}


@dataclass(frozen=True, slots=True)
class Asking:
    """What the sampler is asked for at once."""

    n_prompts: int
    n_answers: int  # to each
    prompt: int  # tokens of the longest
    answer: int  # tokens an answer may get


def sampling_parts(shape: Shape, setup: Setup, target: Target, asking: Asking) -> dict[str, int]:
    """Keys and values of all prompts and answers that run at once, and what a step of the sampler needs beside them."""
    element = setup.compute.itemsize
    answer = -(-asking.answer // GROW) * GROW
    cell = shape.kv_width * shape.n_layers * element
    per_group = asking.prompt + asking.n_answers * asking.answer
    fits = min(MAX_SLOTS // asking.n_answers, int(MEMORY_SHARE * target.memory / cell) // per_group)
    groups = max(1, min(asking.n_prompts, fits))
    slots = groups * asking.n_answers
    cache = cell * (groups * asking.prompt + slots * answer)
    scores = 4 * slots * shape.text.num_attention_heads * (asking.prompt + answer) * 4
    growing = slots * answer * shape.kv_width // 2 * element  # a layer's keys, while they move to a longer place
    drawing = slots * shape.vocabulary * DRAWING
    decode = cache + max(scores, growing, drawing)
    parts = {
        f"keys and values of {slots:,} answers": cache,
        "a prefill or decode step": max(decode, _prefill(shape, setup, asking, groups, cell, cache)) - cache,
    }
    copies = sampler_copies(shape, setup, asking.prompt + asking.answer)
    return parts | ({"weights joined for sampling": copies} if copies else {})


def _prefill(shape: Shape, setup: Setup, asking: Asking, groups: int, cell: int, cache: int) -> int:
    """Reading the prompts. Their keys and values are kept layer by layer as the pass makes them, and then laid out in
    the cache once more. Prompts that are read later find the cache of the earlier ones there."""
    n_prompts = max(1, min(groups, PREFILL_TOKENS // asking.prompt))
    prompts = [Tree("prompt", (0,) * asking.prompt, (Branch((0,), (True,)),))] * n_prompts
    kept = cell * n_prompts * asking.prompt
    read = kept + max(trace_scoring(shape, setup, prompts).peak, kept)
    return read if n_prompts == groups else read + cache


def _copy(shape: Shape, setup: Setup) -> int:
    """Of the weights as they train."""
    return shape.n_params * setup.kept.itemsize


def _frozen(shape: Shape, setup: Setup) -> int:
    """A model that is loaded only to be asked is kept in the type it computes in."""
    return shape.n_params * setup.compute.itemsize


def _saved(shape: Shape, setup: Setup) -> int:
    """The saved model is loaded beside the trained one, in the type the trained one is kept in."""
    return shape.n_params * setup.kept.itemsize


def _loading(shape: Shape, setup: Setup) -> dict[str, int]:
    """On a CPU the file's pages count until they are converted; of the same type they are the weights."""
    if setup.device != "cpu" or shape.file_dtype == setup.kept:
        return {}
    return {"file being read": shape.n_params * shape.file_dtype.itemsize}


def _largest_linear(counts: Counts, setup: Setup) -> int:
    return counts.largest_linear * setup.compute.itemsize
