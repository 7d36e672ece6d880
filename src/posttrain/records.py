"""The records that flow between layers. Frozen, torch-free; one field has one meaning for its whole life.

Data side:   Message → Example | Pair | Rated | Stepwise | Task → Tree (token ids with loss marks)
Sampling:    Task + Sampling → Completion → Score
Judgement:   GateReport;  identity of what was produced: ArtefactRef
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call an assistant makes. `arguments` is JSON text, so that the record can be hashed."""

    name: str
    arguments: str
    id: str = ""

    def as_dict(self) -> dict[str, Any]:
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.name, "arguments": json.loads(self.arguments)},
        }
        return call | ({"id": self.id} if self.id else {})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train=False` keeps an assistant turn as context without loss; None follows the stage's rule."""

    role: str  # system | user | assistant | tool
    content: str
    train: bool | None = None
    thinking: str = ""  # what the assistant reasons before it answers
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""  # of the tool that a tool message comes from
    tool_call_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As chat templates know it; fields that say nothing are left out."""
        optional = {
            "reasoning_content": self.thinking,
            "tool_calls": [call.as_dict() for call in self.tool_calls],
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.content} | {key: said for key, said in optional.items() if said}


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to imitate, or plain `text`, all of it scored. `id` is stable: "file.jsonl:17".

    `tools` holds the JSON schema of each tool the conversation may call, as JSON text. `n_prompt` messages are the
    prompt, where the row tells prompt and completion apart.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[str, ...] = ()
    n_prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two continuations of one prompt; `chosen` is the better one."""

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    margin: float | None = None  # by how much chosen is better, where the row says it
    source: str = ""  # where the row says it comes from
    confidence: float | None = None  # of whoever judged, where the row says it


@dataclass(frozen=True, slots=True)
class Rated:
    """One continuation of a prompt with a thumb up or down."""

    id: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    good: bool
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stepwise:
    """An answer in steps, each labelled right or wrong; a process reward model learns from it."""

    id: str
    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt with what a checker needs. `answer` is the gold answer; `extra` holds every other column of the row."""

    id: str
    prompt: tuple[Message, ...]
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


Row = Example | Pair | Rated | Stepwise | Task
Judged = Pair | Rated  # an answer preferred to another, or one with a thumb


@dataclass(frozen=True, slots=True)
class Branch:
    """One answer in token ids. `scored[i]`: token i carries loss. Sampled tokens do, tool output does not."""

    token_ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt (trunk) and the answers hanging on it. The trunk never carries loss."""

    id: str
    trunk_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.trunk_ids) + sum(len(b.token_ids) for b in self.branches)

    @property
    def n_scored(self) -> int:
        return sum(sum(b.scored) for b in self.branches)


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """After `tokens` tokens an answer whose thinking is still open gets `closing_ids`, which nobody sampled."""

    tokens: int
    opening: str  # how thinking begins, in an answer or at the end of a prompt
    closing: str
    closing_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_p 1 and top_k 0 leave the distribution whole."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    thinking_budget: ThinkingBudget | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt asked for len(seeds) completions. A seed fixes its completion whatever else is in the batch."""

    id: str
    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int | None = None  # None: what the sampling allows; it may only be less


class Status(StrEnum):
    FINISHED = "finished"  # ended with a stop token, which is kept
    CUT = "cut"  # ran into max_new_tokens
    FAILED = "failed"  # the engine could not produce it; see `detail`


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled. `logps` are under the distribution really sampled from, one per token id.

    Tokens that nobody sampled (a tool's output between turns, a forced end of thinking) stand among them: `sampled`
    is False there, their log-prob is 0 and they carry no loss.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    status: Status
    weight_version: int
    text: str = ""
    detail: str = ""
    sampled: tuple[bool, ...] | None = None  # None: every token

    @property
    def branch(self) -> Branch:
        """The answer as a branch: the tokens that were sampled carry loss."""
        return Branch(self.token_ids, self.sampled or (True,) * len(self.token_ids))

    @property
    def sampled_logps(self) -> tuple[float, ...]:
        """One log-prob for each token that carries loss."""
        return tuple(x for x, own in zip(self.logps, self.branch.scored, strict=True) if own)


@dataclass(frozen=True, slots=True)
class Opening:
    """Words that answers of a step begin with. `pays` sums, over the `n_groups` groups in which some answers begin so
    and some do not, and not all earn the same, the correlation of beginning so and reward."""

    text: str
    n_answers: int  # that begin so
    n_all: int
    pays: float
    n_groups: int


@dataclass(frozen=True, slots=True)
class Signs:
    """What figures alone do not tell of a step's answers. `notes` explains a figure: by its name, one example."""

    notes: Mapping[str, str] = field(default_factory=dict)
    openings: tuple[Opening, ...] = ()
    penalties: frozenset[str] = frozenset()  # labels of rewards of which 0 is the best


class Outcome(StrEnum):
    SCORED = "scored"
    CHECKER_FAILED = "checker_failed"
    TIMED_OUT = "timed_out"
    CUT = "cut"  # cut before answering: not wrong, not right


@dataclass(frozen=True, slots=True)
class Score:
    """What a checker said of one completion. `value` is None whenever the checker itself did not answer."""

    value: float | None
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float

    def __contains__(self, x: object) -> bool:
        return isinstance(x, int | float) and self.low <= x <= self.high


@dataclass(frozen=True, slots=True)
class Measured:
    """A share with its denominator. `numerator` may be fractional (partial credit, half a win for a tie)."""

    numerator: float
    denominator: int
    interval: Interval

    @property
    def value(self) -> float:
        return self.numerator / self.denominator


@dataclass(frozen=True, slots=True)
class Opinion:
    """A reward model that scored a suite. `fingerprint` is of its content; `shown` says how it told the suite's gold
    answers from wrong ones; `doubts` are sentences that speak against believing it."""

    model: str
    fingerprint: str
    shown: str
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model} ({self.fingerprint[:12]}…)"


@dataclass(frozen=True, slots=True)
class GateReport:
    """Parent and child on the same held-out items, and the verdict."""

    suite: str
    kind: str  # accuracy | win_rate | mean_score | pairs
    before: Measured
    after: Measured
    gain: float
    gain_interval: Interval
    method: str  # how gain_interval was computed
    p_value: float  # of the hypothesis that the child is no other than its parent, two-sided
    min_gain: float
    passed: bool
    reasons: tuple[str, ...]
    seconds: float
    parent_version: str
    child_version: str
    min_score: float | None = None
    looks: int = 1  # how often the recipe may be judged on these items; the p-value must reach 0.05 / looks
    counts: Mapping[str, int] = field(default_factory=dict)  # scored, cut, checker_failed, timed_out ... per side
    opinions: tuple[Opinion, ...] = ()  # of the reward models that scored; empty where checkers alone did


@dataclass(frozen=True, slots=True)
class ArtefactRef:
    """A finished model directory. `fingerprint` is of its meaning: parent, recipe stage, data, template, weights."""

    name: str
    version: str
    path: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"
