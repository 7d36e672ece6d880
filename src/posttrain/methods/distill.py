"""On-policy distillation (Agarwal et al. 2024, GKD).

    L = Σ_n JSD_β(teacher_n ‖ student_n) / N        n: tokens of the answers of the optimiser step

With probability lmbda a step's answers are sampled from the student as it is, else they are the rows' own. Both models
give whole distributions, at the scored positions only and a tile of them at a time: neither's (N, V) logits ever exist.
The teacher has the student's vocabulary, token for token, and its template; its weights stay as they are.

Left out: answers sampled from the teacher, a reward beside the divergence, conversations beyond their first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.data.order import batches
from posttrain.data.render import Renderer
from posttrain.errors import DataError, ModelError, PosttrainError, RecipeError, TrainingStopped
from posttrain.losses.distill import generalised_jsd
from posttrain.losses.terms import LossSum, Mean, add_metrics
from posttrain.methods.prepared import Prepared, evaluation_rows, stage_result, training_rows
from posttrain.methods.stage import Stage, StageResult
from posttrain.models.load import weights_fingerprint
from posttrain.models.memory import must_fit
from posttrain.models.output import Head
from posttrain.models.policy import Policy, disable_dropout
from posttrain.records import Completion, Request, Sampling, Status, Tree
from posttrain.rollout.local import LocalEngine
from posttrain.seeds import derive_seed
from posttrain.settings import DistillSettings
from posttrain.train.loop import micro_batches, train
from posttrain.train.objective import Evaluation, StepBatch

TILE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits of one model that exist at once
LEAST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Item:
    tree: Tree


class Teacher:
    """A frozen model that gives distributions over the student's tokens. `width`: how many tokens both models know;
    checkpoints of one tokenizer are often padded differently."""

    def __init__(self, policy: Policy, width: int) -> None:
        policy.model.requires_grad_(False).eval()
        self.policy, self.width = policy, width
        self._fingerprint = weights_fingerprint(policy)

    @torch.no_grad()
    def hidden(self, trees: Sequence[Tree]) -> Tensor:
        """(N, D) at the scored positions, in the order of the student's."""
        with must_fit("asking the teacher", "Lower micro_batch_tokens."):
            batch = self.policy.batch(trees)
            return self.policy.hidden_at(batch, batch.table.hidden)

    def refuse_if_changed(self) -> None:
        if weights_fingerprint(self.policy) != self._fingerprint:
            raise AssertionError("the teacher's weights changed during training")


@dataclass
class DistillObjective:
    stage: Stage
    settings: DistillSettings
    trees: Sequence[Tree]  # prompts, with the rows' own answers where some steps learn from those
    held_out: Sequence[Tree]
    teacher: Teacher
    engine: LocalEngine
    steps: Sequence[tuple[int, ...]]  # row indices per optimiser step
    headline: str = "divergence"

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    def batch(self, step: int) -> StepBatch[Item]:
        s, seed = self.settings, self.stage.place.seed
        trees = [self.trees[i] for i in self.steps[step]]
        own = derive_seed(seed, "whose", step) < s.lmbda * 2.0**63
        metrics = {"on_policy_share": Mean(float(own), 1)}
        if own:
            trees, sampled = self._sampled(trees, derive_seed(seed, "answers", step), step)
            metrics |= sampled
        return StepBatch([Item(tree) for tree in trees], sum(tree.n_scored for tree in trees), metrics)

    def loss(self, items: Sequence[Item]) -> LossSum:
        s, policy = self.settings, self.stage.policy
        trees = [item.tree for item in items]
        batch = policy.batch(trees)
        hidden_ND = policy.hidden_at(batch, batch.table.hidden)
        divergence_N, agrees_N = divergences(
            hidden_ND,
            policy.head,
            self.teacher.hidden(trees),
            self.teacher.policy.head,
            beta=s.beta,
            temperature=s.temperature,
            width=self.teacher.width,
        )
        metrics = {"divergence": Mean.of(divergence_N), "same_first_choice": Mean.of(agrees_N)}
        return LossSum(divergence_N.sum(), divergence_N.numel(), metrics)

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        """The divergence on answers that the student samples to the held-out prompts, each time from the same seeds."""
        if not self.held_out:
            return None
        trees, metrics = self._sampled(self.held_out, derive_seed(self.stage.place.seed, "held out"), 0)
        for micro in micro_batches([Item(tree) for tree in trees], self.settings.micro_batch_tokens):
            add_metrics(metrics, self.loss(micro).metrics)
        values = {f"eval_{name}": mean.value for name, mean in metrics.items()}
        return Evaluation(values, values["eval_divergence"], higher_is_better=False)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        assert not state, "distillation keeps no state of its own"

    def _sampled(self, trees: Sequence[Tree], seed: int, version: int) -> tuple[list[Tree], dict[str, Mean]]:
        """The same prompts, each with an answer of the student's own."""
        self.engine.update(version)
        requests = [Request(tree.id, tree.trunk_ids, (derive_seed(seed, tree.id),)) for tree in trees]
        sampling = Sampling(
            self.settings.max_completion_length,
            self.settings.temperature,
            stop_token_ids=self.stage.renderer.stop_token_ids,
        )
        answers = [group[0] for group in self.engine.generate(requests, sampling)]
        _refuse_failed(answers)
        cut = sum(answer.status is Status.CUT for answer in answers)
        metrics = {
            "completion_tokens": Mean(sum(len(a.token_ids) for a in answers), len(answers)),
            "cut_share": Mean(cut, len(answers)),
        }
        grown = [Tree(t.id, t.trunk_ids, (a.branch,)) for t, a in zip(trees, answers, strict=True)]
        return grown, metrics


def divergences(
    student_ND: Tensor,
    head: Head,
    teacher_NE: Tensor,
    teacher_head: Head,
    *,
    beta: float,
    temperature: float,
    width: int,
) -> tuple[Tensor, Tensor]:
    """(N,) JSD_β between both models' next tokens, tile by tile; the backward pass computes each tile again. And (N,)
    whether their likeliest tokens are the same."""

    def tile(student_RD: Tensor, teacher_RE: Tensor) -> tuple[Tensor, Tensor]:
        ours_RV = _logits(head, student_RD, temperature)[:, :width].log_softmax(-1)
        with torch.no_grad():
            theirs_RV = teacher_head.logits(teacher_RE, temperature)[:, :width].log_softmax(-1).to(ours_RV.dtype)
        same_R = (ours_RV.argmax(-1) == theirs_RV.argmax(-1)).to(ours_RV.dtype)
        return generalised_jsd(ours_RV, theirs_RV, beta), same_R

    device = "cpu" if student_ND.device.type == "cpu" else "cuda"
    n_rows = max(LEAST_ROWS, TILE[device] // width)
    parts = [
        checkpoint(tile, student, teacher, use_reentrant=False)
        for student, teacher in zip(student_ND.split(n_rows), teacher_NE.split(n_rows), strict=True)
    ]
    return torch.cat([divergence for divergence, _ in parts]), torch.cat([same for _, same in parts]).detach()


def _logits(head: Head, hidden_RD: Tensor, temperature: float) -> Tensor:
    """As `Head.logits`, which works in place: under a soft cap autograd would read what is overwritten."""
    if head.softcap is None:
        return head.logits(hidden_RD, temperature)
    raw_RV = replace(head, softcap=None, scale=1.0).logits(hidden_RD)
    return torch.tanh(raw_RV * (head.scale / head.softcap)) * (head.softcap / temperature)


def run(stage: Stage, s: DistillSettings) -> StageResult:
    disable_dropout(stage.policy.model)
    teacher = open_teacher(stage, s)
    kind = "task" if s.lmbda == 1.0 else "example"
    found = training_rows(stage, s, kind)
    evaluation = evaluation_rows(stage, s, kind)
    for rows in filter(None, (found, evaluation)):
        _refuse_unfit(rows, s)
    objective = DistillObjective(
        stage=stage,
        settings=s,
        trees=found.trees,
        held_out=list(evaluation.trees) if evaluation else (),
        teacher=teacher,
        engine=LocalEngine(stage.policy, stage.renderer.answer_text),
        steps=batches(
            len(found.trees),
            s.per_device_train_batch_size,
            s.num_train_epochs,
            stage.place.seed,
            max_steps=s.max_steps,
        ),
    )
    trained = train(stage.policy, objective, s, stage.place, stage.reporter)
    teacher.refuse_if_changed()
    return stage_result(trained, found, evaluation)


def open_teacher(stage: Stage, s: DistillSettings) -> Teacher:
    if stage.reference is None:
        raise RecipeError(
            f"teacher = {s.teacher} is the very model the stage starts from: there is nothing to learn from it.",
            where=stage.name,
            remedy="Name another model.",
        )
    policy = stage.reference()
    width = common_width(stage.policy, policy, s.teacher)
    refuse_other_template(stage.renderer, policy.tokenizer, s.teacher)
    stage.reporter.line(f"{stage.name}: the teacher is {s.teacher}; both models know the same {width:,} tokens")
    return Teacher(policy, width)


def common_width(student: Policy, teacher: Policy, name: str) -> int:
    """How many tokens both output layers have in common. Refused unless both tokenizers have the same tokens."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours != theirs:
        token = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=lambda t: (len(t), t))
        raise ModelError(
            f"the teacher {name} has another vocabulary: the token {token!r} has number {ours.get(token, 'none')} in "
            f"the student's and {theirs.get(token, 'none')} in the teacher's.",
            remedy="Distillation compares distributions token by token: use a teacher of the same family, or sample "
            "answers from it and train on them with sft.",
        )
    width = min(student.head.weight_VD.shape[0], teacher.head.weight_VD.shape[0])
    if width <= max(ours.values()):
        raise ModelError(
            f"the output layers of student and teacher {name} have only {width} tokens in common, and the "
            f"tokenizer has {max(ours.values()) + 1}.",
            remedy="One of them does not fit its tokenizer: use another teacher.",
        )
    return width


def refuse_other_template(renderer: Renderer, tokenizer: Any, name: str) -> None:
    """A teacher asked in another template than it was trained with teaches noise."""
    if tokenizer.chat_template is not None:
        try:
            theirs = Renderer(tokenizer)
        except PosttrainError as e:
            e.locate(name)
            raise
        if theirs.fingerprint == renderer.fingerprint:
            return
    had = (
        "has no chat template: it never learned to answer in one"
        if tokenizer.chat_template is None
        else "has another chat template than the one the student is trained with"
    )
    raise ModelError(f"the teacher {name} {had}.", remedy="Use a teacher that was post-trained with the same template.")


def _refuse_failed(answers: Sequence[Completion]) -> None:
    failed = [a for a in answers if a.status is Status.FAILED]
    if failed:
        raise TrainingStopped(
            f"the engine failed on {len(failed)} of {len(answers)} answers. The first said: {failed[0].detail}.",
            where=failed[0].request_id,
            remedy="Lower learning_rate where logits are not finite; shorten prompts where they do not fit.",
        )


def _refuse_unfit(rows: Prepared, s: DistillSettings) -> None:
    """Of rows with answers, the prompt must be one that can be sampled from, with room for an answer."""
    if s.lmbda == 1.0:
        return  # their room was counted when they were prepared
    for tree in rows.trees:
        if len(tree.branches) != 1:
            raise DataError(
                "the chat template writes earlier answers differently once the conversation goes on, so the row is no "
                "one prompt with one answer.",
                where=tree.id,
                remedy="Split the conversation into rows that end with their first answer.",
            )
        if s.lmbda > 0 and len(tree.trunk_ids) + s.max_completion_length > s.max_length:
            raise DataError(
                f"the prompt has {len(tree.trunk_ids)} tokens, and with max_completion_length = "
                f"{s.max_completion_length} that is more than max_length = {s.max_length}.",
                where=tree.id,
                remedy="Raise max_length, or lower max_completion_length.",
            )
