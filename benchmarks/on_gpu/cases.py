"""The cases: one step of each method by posttrain's parts, and by plain transformers and peft, on the same rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
import work
from bench import Bench, Case, chunks, load_of, picked
from torch import Tensor

from posttrain.losses.pairs import PairLogps
from posttrain.losses.policy import Sampled, Terms, policy_loss
from posttrain.losses.preference import sigmoid
from posttrain.losses.sft import nll
from posttrain.losses.tokens import per_branch_sum
from posttrain.models.attention import IMPLEMENTATION
from posttrain.records import Branch, Completion, Request, Sampling, Tree
from posttrain.rollout.local import LocalEngine

DOCUMENTS = (0.30, 0.22, 0.17, 0.13, 0.10, 0.08)  # shares of a packed row
PROMPT_SHARE = 0.4  # of a document
PROMPTS, ANSWERS = 8, 8
BETA = 0.1


def sft(bench: Bench, tokens: int, name: str) -> Case:
    """A row of documents packed to `tokens`, answers scored; no document sees another."""
    trees = documents(bench, tokens)
    load = load_of(trees)
    rows = [(*t.trunk_ids, *t.branches[0].token_ids) for t in trees]
    ids_1T = bench.tensor([[token for row in rows for token in row]])
    place_1T = bench.tensor([[i for row in rows for i in range(len(row))]])
    scored_T = bench.tensor([s for t in trees for s in (*[False] * len(t.trunk_ids), *t.branches[0].scored)])
    labels_1T = torch.where(scored_T, ids_1T, -100)

    def ours() -> Iterator[Tensor]:
        scored, _ = bench.policy.score(trees)
        yield nll(scored.logp_N, scored.entropy_N).total / load.scored

    def theirs() -> Iterator[Tensor]:
        with bench.autocast():
            yield bench.model(input_ids=ids_1T, position_ids=place_1T, labels=labels_1T, use_cache=False).loss

    def compare() -> tuple[Tensor, Tensor]:
        bench.attend(bench.attention)
        with bench.autocast():
            logit_TV = bench.model(input_ids=ids_1T, position_ids=place_1T, use_cache=False).logits[0]
        plain = picked(logit_TV[:-1][scored_T[1:]], ids_1T[0, 1:][scored_T[1:]])
        return _scored_by_us(bench, trees), plain

    lora = bench.policy.adapter is not None
    count = work.lora_step if lora else work.full_step
    return Case(
        name, 0.50, load.tokens, (bench.ours(lambda: bench.learn(ours())), bench.theirs(lambda: bench.learn(theirs()))),
        compare, work=count(bench.shape, load),
    )  # fmt: skip


def dpo(bench: Bench, tokens: int) -> Case:
    """Four pairs, each sharing its prompt, and the reference's pass. The reference is the model as it stands, so that
    neither side needs a second copy of the weights."""
    trees = pairs(bench, tokens)
    load = load_of(trees)
    rows = [(t.trunk_ids, b.token_ids) for t in trees for b in t.branches]

    def ours() -> Iterator[Tensor]:
        reference_N, table = bench.policy.logps(trees)
        reference = _pair_logps(per_branch_sum(reference_N, table.branch_N, table.n_branches))
        scored, table = bench.policy.score(trees)
        policy = _pair_logps(per_branch_sum(scored.logp_N, table.branch_N, table.n_branches))
        yield sigmoid(policy, reference, beta=BETA).total / len(trees)

    def theirs() -> Iterator[Tensor]:
        for part in _pairwise_chunks([len(p) + len(a) for p, a in rows], bench.budget):
            batch = Padded.of(bench, rows[part])
            with torch.no_grad():
                reference_B = batch.sums(bench)
            margin_B = BETA * (batch.sums(bench) - reference_B)
            yield -F.logsigmoid(margin_B[::2] - margin_B[1::2]).sum() / len(trees)

    def compare() -> tuple[Tensor, Tensor]:
        ours = _scored_by_us(bench, trees)
        return ours, _padded_logps(bench, rows)

    return Case(
        "DPO, 4 pairs with their reference", 0.45, load.tokens,
        (bench.ours(lambda: bench.learn(ours())), bench.theirs(lambda: bench.learn(theirs()))),
        compare, work=work.dpo_step(bench.shape, load),
    )  # fmt: skip


def rollouts(bench: Bench, n_prompt: int, n_new: int) -> Case:
    """64 answers to 8 prompts; every answer has its full length, for nothing stops a random model."""
    sampler = Sampler(bench, n_prompt)

    def compare() -> tuple[Tensor, Tensor]:
        found = sampler.ours(n_new)
        rows = [(sampler.prompts[i], c.token_ids) for i, group in enumerate(found) for c in group]
        drawn = [x for group in found for c in group for x in c.logps]
        return torch.tensor(drawn, device=bench.machine.device), _padded_logps(bench, rows)

    groups = [(n_prompt, ANSWERS)] * PROMPTS
    return Case(
        f"rollouts, {PROMPTS} × {ANSWERS} answers of {n_new}", 0.50, PROMPTS * ANSWERS * n_new,
        (
            bench.ours(lambda: sampler.ours(n_new), lambda: sampler.ours(1)),
            bench.theirs(lambda: sampler.theirs(n_new), lambda: sampler.theirs(1)),
        ),
        compare, read=work.decode_bytes(bench.shape, groups, n_new, bench.compute_type.itemsize),
    )  # fmt: skip


def grpo(bench: Bench, n_prompt: int, n_new: int) -> Case:
    """Sample, then one step on the answers with made-up advantages; β 0. The ratio is measured from the sampler's
    log-probs here, from those of the step's own forward pass on the other side."""
    sampler = Sampler(bench, n_prompt)
    advantages = [1.0 if i % 2 else -1.0 for i in range(ANSWERS)]
    n_sampled = PROMPTS * ANSWERS * n_new

    def ours() -> Iterator[Tensor]:
        groups = sampler.ours(n_new)
        trees = [sampler.tree(i, group) for i, group in enumerate(groups)]
        for part in chunks([t.n_tokens for t in trees], bench.budget):
            scored, table = bench.policy.score(trees[part])
            old_N = scored.logp_N.new_tensor([x for group in groups[part] for c in group for x in c.logps])
            each_N = scored.logp_N.new_tensor([a for _ in groups[part] for a in advantages for _ in range(n_new)])
            sampled = Sampled(each_N, old_N, table.branch_N, table.n_branches)
            yield policy_loss(scored.logp_N, scored.entropy_N, sampled, Terms()).total / (PROMPTS * ANSWERS)

    def theirs() -> Iterator[Tensor]:
        ids = sampler.theirs(n_new)
        each_B1 = torch.tensor(advantages * PROMPTS, device=ids.device)[:, None]
        bench.model.train()
        for part in chunks([ids.shape[1]] * len(ids), bench.budget):
            with bench.autocast():
                out = bench.model(input_ids=ids[part], logits_to_keep=n_new + 1, use_cache=False)
            logp_BN = picked(out.logits[:, :-1], ids[part, -n_new:])
            ratio_BN = torch.exp(logp_BN - logp_BN.detach())
            surrogate = torch.minimum(ratio_BN * each_B1[part], ratio_BN.clamp(0.8, 1.2) * each_B1[part])
            yield -surrogate.mean(1).sum() / len(ids)

    return Case(
        f"GRPO step, {PROMPTS} × {ANSWERS} answers of {n_new}", None, n_sampled,
        (bench.ours(lambda: bench.learn(ours())), bench.theirs(lambda: bench.learn(theirs()))),
        rollouts(bench, n_prompt, n_new).compare,
    )  # fmt: skip


class Sampler:
    """Both sides' sampling of the same prompts."""

    def __init__(self, bench: Bench, n_prompt: int) -> None:
        draw = random.Random(1)
        self._bench = bench
        self.prompts = [_ids(bench, n_prompt, draw) for _ in range(PROMPTS)]
        self._rows = bench.tensor([p for p in self.prompts for _ in range(ANSWERS)])
        self._engine = LocalEngine(bench.policy, lambda _: "")
        self._round = 0

    def ours(self, n_new: int) -> list[list[Completion]]:
        self._round += 1
        self._bench.attend(IMPLEMENTATION)
        requests = [
            Request(str(i), prompt, tuple(1000 * self._round + ANSWERS * i + j for j in range(ANSWERS)))
            for i, prompt in enumerate(self.prompts)
        ]
        return self._engine.generate(requests, Sampling(max_new_tokens=n_new))

    @torch.no_grad()
    def theirs(self, n_new: int) -> Tensor:
        self._bench.model.eval()
        with self._bench.autocast():
            return self._bench.model.generate(
                self._rows, attention_mask=torch.ones_like(self._rows), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=n_new, min_new_tokens=n_new, use_cache=True, pad_token_id=0,
            )  # fmt: skip

    def tree(self, i: int, group: Sequence[Completion]) -> Tree:
        return Tree(str(i), self.prompts[i], tuple(c.branch for c in group))


# --- rows ---------------------------------------------------------------------------------------------------------


def documents(bench: Bench, tokens: int) -> list[Tree]:
    draw = random.Random(0)
    ends = [round(tokens * sum(DOCUMENTS[:i])) for i in range(len(DOCUMENTS) + 1)]
    return [
        _tree(bench, str(first), round(PROMPT_SHARE * (end - first)), [end - first], draw)
        for first, end in pairwise(ends)
    ]


def pairs(bench: Bench, tokens: int) -> list[Tree]:
    """Of every 4 tokens of a pair 2 are its prompt, and its answers differ in length."""
    draw = random.Random(0)
    unit = tokens // 16
    bends = [unit // 4, -unit // 8, unit // 8, -unit // 4]
    return [_tree(bench, str(i), 2 * unit, [3 * unit + bend, 3 * unit - bend], draw) for i, bend in enumerate(bends)]


def _tree(bench: Bench, name: str, n_prompt: int, ends: Sequence[int], draw: random.Random) -> Tree:
    """`ends`: where each answer ends, counted from the prompt's start."""
    branches = [_ids(bench, end - n_prompt, draw) for end in ends]
    return Tree(name, _ids(bench, n_prompt, draw), tuple(Branch(ids, (True,) * len(ids)) for ids in branches))


def _ids(bench: Bench, n: int, draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(1, bench.shape.vocabulary) for _ in range(n))


# --- plain rows ---------------------------------------------------------------------------------------------------

Row = tuple[Sequence[int], Sequence[int]]  # prompt, answer


class Padded:
    """Rows of prompt and answer, padded on the right to the longest."""

    def __init__(self, ids_BL: Tensor, mask_BL: Tensor, scored_BL: Tensor) -> None:
        self.ids_BL, self.mask_BL, self.scored_BL = ids_BL, mask_BL, scored_BL

    @classmethod
    def of(cls, bench: Bench, rows: Sequence[Row]) -> Padded:
        longest = max(len(p) + len(a) for p, a in rows)
        space = [longest - len(p) - len(a) for p, a in rows]
        ids = [[*p, *a, *[0] * n] for (p, a), n in zip(rows, space, strict=True)]
        mask = [[1] * (longest - n) + [0] * n for n in space]
        scored = [[0] * len(p) + [1] * len(a) + [0] * n for (p, a), n in zip(rows, space, strict=True)]
        return cls(bench.tensor(ids), bench.tensor(mask), bench.tensor(scored)[:, 1:].bool())

    def logps(self, bench: Bench) -> Tensor:
        """(B, L − 1) of every next token, 0 where it is not scored."""
        with bench.autocast():
            logit_BLV = bench.model(input_ids=self.ids_BL, attention_mask=self.mask_BL, use_cache=False).logits
        return picked(logit_BLV[:, :-1], self.ids_BL[:, 1:]).masked_fill(~self.scored_BL, 0.0)

    def sums(self, bench: Bench) -> Tensor:
        return self.logps(bench).sum(1)


def _scored_by_us(bench: Bench, trees: Sequence[Tree]) -> Tensor:
    bench.attend(IMPLEMENTATION)
    return bench.policy.score(trees)[0].logp_N


def _padded_logps(bench: Bench, rows: Sequence[Row]) -> Tensor:
    """Log-probs of all answers' tokens, row after row."""
    bench.attend(bench.attention)
    found = []
    for part in chunks([len(p) + len(a) for p, a in rows], bench.budget):
        batch = Padded.of(bench, rows[part])
        found.append(batch.logps(bench)[batch.scored_BL])
    return torch.cat(found)


def _pairwise_chunks(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Chunks that never part a pair."""
    longest = [max(a, b) for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
    for part in chunks(longest, budget // 2):
        yield slice(2 * part.start, 2 * part.stop)


def _pair_logps(sum_B: Tensor) -> PairLogps:
    return PairLogps.of(sum_B, torch.ones_like(sum_B))


# --- the list -----------------------------------------------------------------------------------------------------


def _with_lora(bench: Bench, tokens: int) -> Case:
    bench.add_lora()
    return sft(bench, tokens, f"SFT, LoRA, {tokens} packed tokens")


CASES: dict[str, Callable[[Bench, int, int], Case]] = {
    "sft": lambda bench, tokens, _: sft(bench, tokens, f"SFT, all weights, {tokens} packed tokens"),
    "lora": lambda bench, tokens, _: _with_lora(bench, tokens),
    "dpo": lambda bench, tokens, _: dpo(bench, tokens),
    "rollouts": lambda bench, tokens, n_new: rollouts(bench, tokens // 16, n_new),
    "grpo": lambda bench, tokens, n_new: grpo(bench, tokens // 16, n_new),
}
