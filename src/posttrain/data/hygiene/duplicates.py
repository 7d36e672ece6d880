"""Rows that say the same again: letter for letter (but for white space), or nearly so.

The first row stays. A later one is a near-duplicate of it when every part of the two is near: see `minhash`. Rows that
meet there are compared shingle by shingle, so nothing that is less alike than the threshold is taken out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from posttrain.data.hygiene.minhash import COLUMNS, bands, jaccard, rows_per_band, shingles, signatures
from posttrain.data.hygiene.passages import said
from posttrain.data.hygiene.text import U64, mixed, plain
from posttrain.records import Example, Message, Pair, Rated, Row, Stepwise, Task

NEAR = 0.8
SHINGLE = 3
CHUNK = 512
# Signatures of 128 columns estimate a Jaccard index to ±0.035; what is estimated far too low is not compared at all.
SLACK = 0.16

Read = Callable[[], Iterable["Content"]]


@dataclass(frozen=True, slots=True)
class Content:
    """A row as duplicates see it: its parts, and what must agree besides: the label of near ones, the roles of who
    speaks of exact ones."""

    id: str
    source: str
    parts: tuple[str, ...]
    label: str = ""
    roles: str = ""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row that repeats an earlier one. `jaccard` is the least over the parts; None: letter for letter the same."""

    id: str
    of: str
    jaccard: float | None = None

    def __str__(self) -> str:
        return (
            f"duplicate of {self.of}" if self.jaccard is None else f"near-duplicate of {self.of} ({self.jaccard:.2f})"
        )


def content(row: Row) -> Content:
    """What makes two rows the same: prompt and answer; of pairs prompt, chosen and rejected; of tasks prompt and gold
    answer. Other columns do not count, marks of what is trained neither."""
    source = row.id.rpartition(":")[0]

    def of(*parts: Sequence[Message], more: Sequence[str] = (), label: str = "") -> Content:
        roles = "|".join(" ".join(m.role for m in part) for part in parts)
        texts = ["\n\n".join(map(said, part)) for part in parts]
        texts[0] = "\n\n".join((texts[0], *getattr(row, "tools", ())))
        return Content(row.id, source, (*texts, *more), label, roles)

    match row:
        case Example(text=str(text)):
            return Content(row.id, source, (text,))
        case Example():
            asked = [m for m in row.messages if m.role != "assistant"]
            return of(asked, [m for m in row.messages if m.role == "assistant"])
        case Pair():
            return of(row.prompt, row.chosen, row.rejected)
        case Rated():
            return of(row.prompt, row.completion, label="good" if row.good else "bad")
        case Stepwise():
            labels = "".join("+" if label else "-" for label in row.labels)
            return of(row.prompt, more=("\n\n".join(row.steps),), label=labels)
        case Task():
            return of(row.prompt, more=(row.answer or "",))


@dataclass(frozen=True, slots=True)
class Rules:
    """When two rows are the same. `near`: the least Jaccard index of shingles of `shingle` words; None: exact ones
    only. `across`: also when they come from different sources."""

    near: float | None = NEAR
    shingle: int = SHINGLE
    across: bool = True
    ignore_case: bool = False


def digest(row: Content, *, across: bool = True, ignore_case: bool = False) -> bytes:
    """16 bytes that exact duplicates have in common."""
    parts = [plain(part, ignore_case=ignore_case) for part in row.parts]
    text = "\x1f".join(("" if across else row.source, row.label, row.roles, *parts))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def same_prompts(rows: Iterable[Content]) -> int:
    """How many rows have their prompt, but not all they say, in common with another row."""
    said: dict[bytes, set[bytes]] = defaultdict(set)
    prompts = []
    for row in rows:
        if len(row.parts) > 1:
            prompts.append(digest(Content("", "", row.parts[:1])))
            said[prompts[-1]].add(digest(row))
    return sum(len(said[prompt]) > 1 for prompt in prompts)


def find_duplicates(read: Read, rules: Rules, without: Collection[str] = ()) -> dict[str, Duplicate]:
    """Every row that repeats an earlier one, by id. `read` starts reading anew each time: near-duplicates take a second
    look. Rows in `without` are not there at all. Memory: about 1 KB a row, and the shingles of rows that meet."""
    exact = Exact(rules)
    signed = _Signed(rules) if rules.near is not None else None
    for chunk in _chunks(row for row in read() if row.id not in without):
        at = len(exact.ids)
        fresh = [(at + i, row) for i, row in enumerate(chunk) if exact.add(row)]
        if signed is not None:
            for n_parts in sorted({len(row.parts) for _, row in fresh}):
                signed.add([(at, row) for at, row in fresh if len(row.parts) == n_parts])
    found = exact.duplicates()
    if signed is not None and rules.near is not None:
        found |= {near.id: near for near in _near(exact.ids, signed, read, rules.near, rules.shingle)}
    return found


class Exact:
    """Rows seen so far, by what they say."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._first: dict[bytes, int] = {}
        self._repeats: dict[int, int] = {}
        self.ids: list[str] = []

    def add(self, row: Content) -> bool:
        """Whether nothing before said the same."""
        at = len(self.ids)
        self.ids.append(row.id)
        first = self._first.setdefault(digest(row, across=self._rules.across, ignore_case=self._rules.ignore_case), at)
        if first != at:
            self._repeats[at] = first
        return first == at

    def duplicates(self) -> dict[str, Duplicate]:
        return {self.ids[j]: Duplicate(self.ids[j], self.ids[i]) for j, i in self._repeats.items()}


class _Signed:
    """Signatures of the rows that are no exact duplicates: enough to see which of them meet."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._row: list[int] = []  # the number of each signed row among all
        self._bands: list[U64] = []
        self._low_bits: list[NDArray[np.uint8]] = []

    def add(self, rows: Sequence[tuple[int, Content]]) -> None:
        """Sign numbered rows, all with the same number of parts."""
        assert self._rules.near is not None
        signed = signatures([[shingles(part, self._rules.shingle) for part in row.parts] for _, row in rows])
        value_RB = bands(signed, rows_per_band(self._rules.near))
        apart = [f"{len(row.parts)} {row.label} {'' if self._rules.across else row.source}" for _, row in rows]
        salt_R = np.asarray([int.from_bytes(blake2b(a.encode(), digest_size=8).digest()) for a in apart], np.uint64)
        self._row += [at for at, _ in rows]
        self._bands.append(mixed(value_RB ^ salt_R[:, None]))
        self._low_bits.append(signed.astype(np.uint8))

    def meeting(self) -> tuple[dict[int, list[int]], NDArray[np.uint8]]:
        """Rows that share a band with others, in order: the row's number and the groups it meets others in.
        Beside them the low bits of their signatures, one line each."""
        if not self._bands:
            return {}, np.zeros((0, COLUMNS), np.uint8)
        row_R, value_RB = np.asarray(self._row), np.concatenate(self._bands)
        in_order = np.argsort(row_R)  # within a chunk, rows are signed by their number of parts
        row_R, value_RB = row_R[in_order], value_RB[in_order]
        shared: dict[int, list[int]] = defaultdict(list)
        n_groups = 0
        for value_R in value_RB.T:
            _, group_R, size = np.unique(value_R, return_inverse=True, return_counts=True)
            for at in np.flatnonzero(size[group_R] > 1).tolist():
                shared[at].append(n_groups + int(group_R[at]))
            n_groups += len(size)
        meeting = sorted(shared)
        low_bits = np.concatenate(self._low_bits)[in_order][meeting]
        return {int(row_R[at]): shared[at] for at in meeting}, low_bits


def _near(ids: Sequence[str], signed: _Signed, read: Read, near: float, size: int) -> Iterator[Duplicate]:
    """Rows that meet an earlier one which stays, and are near it. The earliest is named."""
    groups_of, low_bits = signed.meeting()
    if not groups_of:
        return
    line_of = {row: line for line, row in enumerate(groups_of)}
    wanted = {ids[row] for row in groups_of}
    parts_of = {row.id: [np.unique(shingles(part, size)) for part in row.parts] for row in read() if row.id in wanted}
    staying: dict[int, list[int]] = defaultdict(list)  # group: its rows that stay
    for j, groups in groups_of.items():
        earlier = sorted({i for group in groups for i in staying[group]})
        alike_E = (low_bits[[line_of[i] for i in earlier]] == low_bits[line_of[j]]).mean(axis=1)
        for i in (i for i, alike in zip(earlier, alike_E.tolist(), strict=True) if alike >= near - SLACK):
            least = min(map(jaccard, parts_of[ids[j]], parts_of[ids[i]]))
            if least >= near:
                yield Duplicate(ids[j], ids[i], least)
                break
        else:
            for group in groups:
                staying[group].append(j)


def _chunks(rows: Iterable[Content]) -> Iterator[list[Content]]:
    source = iter(rows)
    return iter(lambda: list(islice(source, CHUNK)), [])
