"""The in-process sampler. It shares the trainer's weights: nothing is copied, nothing can be stale.

Axes: P groups (prompts), S slots (answers under way), V vocabulary.

Prompts are prefilled as forest trunks; each group then decodes from one copy of its prompt's keys and values.
Finished answers leave: dead slots are compacted away, and waiting prompts join the running batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.models.attention import ForestAttention
from posttrain.models.decode import Logits
from posttrain.models.forest import build_forest
from posttrain.models.memory import must_fit
from posttrain.models.policy import Policy
from posttrain.records import Completion, Request, Sampling, Status, Tree
from posttrain.rollout.cache import ForestCache, prefill_cache
from posttrain.rollout.engine import Progress
from posttrain.rollout.recompute import next_logits
from posttrain.rollout.room import Group, room_on
from posttrain.rollout.sampling import draw, uniform
from posttrain.rollout.thinking import overspent

COMPACT_BELOW = 0.8  # share of slots alive under which dead ones are compacted away
ADMIT_BELOW = 0.5  # waiting prompts join when so few of the slots they were admitted with are alive
MAX_SLOTS = 1024
# Decode steps of fewer multiplications run on one CPU thread: two would spend the time waiting for each other, and
# many times it where other programs want the second core.
ONE_THREAD_BELOW = 1 << 24


@dataclass
class Answer:
    """One completion under construction."""

    request: int
    index: int
    seed: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)  # tokens that come next, whatever is drawn
    not_sampled: list[int] = field(default_factory=list)  # places of tokens that were forced
    status: Status | None = None
    detail: str = ""

    @property
    def sampled(self) -> tuple[bool, ...] | None:
        """Which tokens were drawn; None: all."""
        forced = set(self.not_sampled)
        return tuple(i not in forced for i in range(len(self.token_ids))) if forced else None


@dataclass
class Running:
    """The batch being decoded: one answer per slot of the cache."""

    cache: ForestCache
    answers: list[Answer]
    last_token_S: Tensor

    @property
    def alive(self) -> np.ndarray:
        return np.array([a.status is None for a in self.answers], dtype=bool)

    @property
    def groups(self) -> list[Group]:
        counts = np.bincount(self.cache.group_S, minlength=len(self.cache.prompt_length_P))
        return [Group(n, count) for n, count in zip(self.cache.prompt_length_P.tolist(), counts.tolist(), strict=True)]


class LocalEngine:
    def __init__(self, policy: Policy, decode: Callable[[Sequence[int]], str], *, max_slots: int = MAX_SLOTS) -> None:
        self._policy, self._decode, self._max_slots = policy, decode, max_slots
        self._version = 0

    @property
    def weight_version(self) -> int:
        return self._version

    def update(self, version: int) -> None:
        self._version = version

    def health(self) -> str:
        return f"in-process sampler on {self._policy.device}, {self._policy.layout} layout, weights {self._version}"

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Completion]]:
        groups = [
            [Answer(i, j, seed, r.prompt_ids, _limit(r, sampling)) for j, seed in enumerate(r.seeds)]
            for i, r in enumerate(requests)
        ]
        self._fail_unusable(groups)
        waiting = deque(g for g in groups if g and g[0].status is None)
        n_all = sum(len(g) for g in groups)
        was_training, n_threads = self._policy.model.training, torch.get_num_threads()
        self._policy.model.eval()
        try:
            with must_fit(f"sampling {n_all:,} answers", _smaller_sampling(sampling)):
                self._run(
                    waiting,
                    sampling,
                    lambda: progress(sum(a.status is not None for g in groups for a in g), n_all) if progress else None,
                )
        finally:
            self._policy.model.train(was_training)
            torch.set_num_threads(n_threads)
        return [[self._completion(a, requests[a.request]) for a in g] for g in groups]

    def _run(self, waiting: deque[list[Answer]], sampling: Sampling, report: Callable[[], None]) -> None:
        if self._policy.layout == "padded":
            self._run_recomputing(waiting, sampling, report)
            return
        policy = self._policy
        compute = policy.autocast or policy.model.dtype
        room = room_on(policy.device, policy.model.config, compute, self._max_slots, sampling.max_new_tokens)
        n_positions = max((len(g[0].prompt_ids) for g in waiting), default=0) + sampling.max_new_tokens
        logits = policy.for_sampling(n_positions)
        n_threads, n_weights = torch.get_num_threads(), sum(p.numel() for p in policy.model.parameters())
        running: Running | None = None
        full = 0  # slots alive when the last prompts joined
        while waiting or running:
            n_alive = int(running.alive.sum()) if running else 0
            if waiting and n_alive <= ADMIT_BELOW * full:
                torch.set_num_threads(n_threads)
                running = _compact(running)
                asking = [Group(len(g[0].prompt_ids), len(g)) for g in waiting]
                if ready := room.admit(running.groups if running else [], asking):
                    running = _join(running, self._admit(logits, [waiting.popleft() for _ in range(ready)], sampling))
                full = int(running.alive.sum()) if running else 0
            elif running and n_alive < COMPACT_BELOW * len(running.answers):
                running = _compact(running)
            if running is None:
                continue
            small = policy.device.type == "cpu" and len(running.answers) * n_weights < ONE_THREAD_BELOW
            torch.set_num_threads(1 if small else n_threads)
            self._step(logits, running, sampling)
            if not running.alive.any():
                running = None
            report()

    def _admit(self, logits: Logits, admitted: Sequence[list[Answer]], sampling: Sampling) -> Running:
        """Prefill these groups and draw every answer's first token."""
        trees = [Tree(str(g[0].request), g[0].prompt_ids, ()) for g in admitted]
        batch = build_forest(trees, self._policy.device)
        attention = ForestAttention(batch, keep_keys=True)
        lengths = [len(t.trunk_ids) for t in trees]
        last_P = torch.tensor(lengths, device=batch.token_ids_T.device).cumsum(0) - 1
        logits_PV = logits(batch.token_ids_T, batch.position_ids_T, attention, last_P)
        n_slots = [len(g) for g in admitted]
        answers = [a for g in admitted for a in g]
        logits_SV = logits_PV.repeat_interleave(torch.tensor(n_slots, device=logits_PV.device), dim=0)
        token_S = self._draw_and_record(answers, logits_SV, sampling)
        return Running(prefill_cache(attention.kept, lengths, n_slots, sampling.max_new_tokens), answers, token_S)

    def _step(self, logits: Logits, running: Running, sampling: Sampling) -> None:
        if not running.alive.any():
            return
        depth_S = torch.from_numpy(running.cache.depth_S).to(running.last_token_S.device)
        logits_SV = logits(running.last_token_S, depth_S, running.cache, None)
        running.cache.advance()
        running.last_token_S = self._draw_and_record(running.answers, logits_SV, sampling)

    def _run_recomputing(self, waiting: deque[list[Answer]], sampling: Sampling, report: Callable[[], None]) -> None:
        """For architectures the forest cannot serve: every step runs the whole row again. Right, and slow."""
        while waiting:
            answers: list[Answer] = []
            while waiting and len(answers) < self._max_slots:
                answers += waiting.popleft()
            while answers := [a for a in answers if a.status is None]:
                rows = [(*a.prompt_ids, *a.token_ids) for a in answers]
                self._draw_and_record(answers, next_logits(self._policy, rows), sampling)
                report()

    def _draw_and_record(self, answers: Sequence[Answer], logits_SV: Tensor, sampling: Sampling) -> Tensor:
        """Draw one token per slot and append it to the answers still alive, ending those that stop, run out or break.
        Returns the token of each slot that the next one follows: what was drawn, or forced in its place."""
        seeds = np.array([a.seed for a in answers], dtype=np.uint64)
        positions = np.array([len(a.token_ids) for a in answers], dtype=np.uint64)
        drawn = draw(logits_SV, sampling, uniform(seeds, positions))
        tokens, replaced = drawn.token_B.tolist(), False
        for slot, (a, logp) in enumerate(zip(answers, drawn.logp_B.tolist(), strict=True)):
            if a.status is not None:
                continue
            if not np.isfinite(logp):
                a.status, a.detail = Status.FAILED, "the model's logits are not finite"
                continue
            if a.forced:
                tokens[slot], logp, replaced = a.forced.popleft(), 0.0, True
                a.not_sampled.append(len(a.token_ids))
            a.token_ids.append(tokens[slot])
            a.logps.append(logp)
            if tokens[slot] in sampling.stop_token_ids:
                a.status = Status.FINISHED
            elif len(a.token_ids) >= a.max_new_tokens:
                a.status = Status.CUT
            elif sampling.thinking_budget is not None and not a.forced:
                a.forced += overspent(sampling.thinking_budget, a.prompt_ids, a.token_ids, self._policy.tokenizer)
        return drawn.token_B.new_tensor(tokens) if replaced else drawn.token_B

    def _fail_unusable(self, groups: list[list[Answer]]) -> None:
        """Prompts that cannot be answered fail by themselves; the others go on."""
        limit = getattr(self._policy.model.config, "max_position_embeddings", None)
        for a in (a for group in groups for a in group):
            if not a.prompt_ids:
                a.status, a.detail = Status.FAILED, "the prompt is empty"
            elif limit is not None and len(a.prompt_ids) + a.max_new_tokens > limit:
                a.status = Status.FAILED
                a.detail = (
                    f"prompt of {len(a.prompt_ids)} tokens and {a.max_new_tokens} new ones "
                    f"exceed the model's {limit} positions"
                )

    def _completion(self, a: Answer, request: Request) -> Completion:
        assert a.status is not None
        return Completion(
            request_id=request.id,
            index=a.index,
            token_ids=tuple(a.token_ids),
            logps=tuple(a.logps),
            status=a.status,
            weight_version=self._version,
            text=self._decode(a.token_ids),
            detail=a.detail,
            sampled=a.sampled,
        )


def _limit(request: Request, sampling: Sampling) -> int:
    return min(request.max_new_tokens or sampling.max_new_tokens, sampling.max_new_tokens)


def _smaller_sampling(sampling: Sampling) -> str:
    return (
        "Lower the length of answers (max_completion_length in a recipe, max_new_tokens in a suite), now "
        f"{sampling.max_new_tokens}; then num_generations."
    )


def _compact(running: Running | None) -> Running | None:
    """Without the answers that have ended, and without groups that have no other."""
    if running is None or not running.alive.any():
        return None
    order_K = running.cache.keep(np.flatnonzero(running.alive))
    token_K = running.last_token_S[torch.from_numpy(order_K).to(running.last_token_S.device)]
    return Running(running.cache, [running.answers[s] for s in order_K], token_K)


def _join(running: Running | None, admitted: Running) -> Running:
    if running is None:
        return admitted
    return Running(
        running.cache.join(admitted.cache),
        running.answers + admitted.answers,
        torch.cat([running.last_token_S, admitted.last_token_S]),
    )
