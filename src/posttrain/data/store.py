"""Trees on disk: flat arrays that are mapped into memory, and a tree built only when it is looked at.

tokens    every tree's trunk, then its branches, end to end; uint16 where the vocabulary fits, else uint32
scored    one bit a token, lowest bit first: does it carry loss
segments  where each trunk or branch ends in `tokens`
trees     the first segment of each tree, and one beyond the last
ids       the trees' ids as UTF-8, end to end; `id_ends` says where each ends
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from posttrain.records import Branch, Tree

TOKENS, SCORED, SEGMENTS, TREES, IDS, ID_ENDS = "tokens", "scored", "segments", "trees", "ids", "id_ends"
FILES = (TOKENS, SCORED, SEGMENTS, TREES, IDS, ID_ENDS)
SHAPE = "trees.json"  # how many trees, and the type of a token

Array = NDArray[Any]
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Packed:
    """Some trees as arrays; small enough to be sent to another process."""

    ids: tuple[str, ...]
    tokens: Array
    scored: Array  # bool, one a token
    segments: Array  # lengths
    n_segments: Array  # of each tree


def token_type(n_vocabulary: int) -> str:
    return "uint16" if n_vocabulary <= 1 << 16 else "uint32"


def pack(trees: Sequence[Tree], dtype: str) -> Packed:
    tokens: list[int] = []
    scored: list[bool] = []
    segments: list[int] = []
    for tree in trees:
        tokens += tree.trunk_ids
        scored += [False] * len(tree.trunk_ids)
        segments.append(len(tree.trunk_ids))
        for branch in tree.branches:
            tokens += branch.token_ids
            scored += branch.scored
            segments.append(len(branch.token_ids))
    return Packed(
        ids=tuple(tree.id for tree in trees),
        tokens=np.array(tokens, dtype),
        scored=np.array(scored, bool),
        segments=np.array(segments, np.int64),
        n_segments=np.array([1 + len(tree.branches) for tree in trees], np.int64),
    )


class TreeWriter:
    """Appends trees to the files of a directory. That nobody sees them half-written is the caller's business."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self._directory, self._dtype = directory, dtype
        self._open = ExitStack()
        self._files = {name: self._open.enter_context((directory / name).open("wb")) for name in FILES}
        self._n_trees = self._n_tokens = self._n_segments = self._n_id_bytes = 0
        self._bits = np.zeros(0, bool)  # fewer than eight that do not fill a byte yet
        self._append(TREES, np.zeros(1, np.int64))

    def add(self, some: Packed) -> None:
        self._append(TOKENS, some.tokens)
        bits = np.concatenate([self._bits, some.scored])
        whole = bits.size // 8 * 8
        self._append(SCORED, np.packbits(bits[:whole], bitorder="little"))
        self._bits = bits[whole:]
        self._append(SEGMENTS, self._n_tokens + np.cumsum(some.segments))
        self._append(TREES, self._n_segments + np.cumsum(some.n_segments))
        names = [row_id.encode() for row_id in some.ids]
        self._files[IDS].write(b"".join(names))
        self._append(ID_ENDS, self._n_id_bytes + np.cumsum([len(name) for name in names], dtype=np.int64))
        self._n_trees += len(some.ids)
        self._n_tokens += some.tokens.size
        self._n_segments += some.segments.size
        self._n_id_bytes += sum(map(len, names))

    @property
    def n_trees(self) -> int:
        return self._n_trees

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        with self._open:
            if kind is None:
                self._append(SCORED, np.packbits(self._bits, bitorder="little"))
                (self._directory / SHAPE).write_text(json.dumps({"n_trees": self._n_trees, "tokens": self._dtype}))

    def _append(self, name: str, values: Array) -> None:
        self._files[name].write(values.tobytes())


class PreparedTrees(Sequence[Tree]):
    """The trees of a directory that `TreeWriter` filled. Only what is looked at is read from disk."""

    def __init__(self, directory: Path) -> None:
        shape = json.loads((directory / SHAPE).read_text(encoding="utf-8"))
        self._n_trees: int = shape["n_trees"]
        self._tokens = _mapped(directory / TOKENS, shape["tokens"])
        self._scored = _mapped(directory / SCORED, "uint8")
        self._segments = _mapped(directory / SEGMENTS, "int64")
        self._trees = _mapped(directory / TREES, "int64")
        self._ids = _mapped(directory / IDS, "uint8")
        self._id_ends = _mapped(directory / ID_ENDS, "int64")

    def __len__(self) -> int:
        return self._n_trees

    @overload
    def __getitem__(self, at: int) -> Tree: ...
    @overload
    def __getitem__(self, at: slice) -> list[Tree]: ...
    def __getitem__(self, at: int | slice) -> Tree | list[Tree]:
        if isinstance(at, slice):
            return [self._tree(i) for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"tree {at} of {len(self)}")
        return self._tree(at % len(self))

    def row_id(self, at: int) -> str:
        start = int(self._id_ends[at - 1]) if at else 0
        return self._ids[start : int(self._id_ends[at])].tobytes().decode()

    def _tree(self, at: int) -> Tree:
        first, beyond = int(self._trees[at]), int(self._trees[at + 1])
        ends = self._segments[first:beyond].tolist()
        start = int(self._segments[first - 1]) if first else 0
        tokens = tuple(self._tokens[start : ends[-1]].tolist())
        bits = np.unpackbits(self._scored[start // 8 : (ends[-1] + 7) // 8], bitorder="little")
        scored = tuple(bits[start % 8 : start % 8 + len(tokens)].astype(bool).tolist())
        cuts = [end - start for end in ends]
        branches = tuple(Branch(tokens[a:b], scored[a:b]) for a, b in pairwise(cuts))
        return Tree(self.row_id(at), tokens[: cuts[0]], branches)


class Mapped(Sequence[U], Generic[T, U]):
    """`make` of each item, made when it is looked at."""

    def __init__(self, make: Callable[[T], U], items: Sequence[T]) -> None:
        self._make, self._items = make, items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, at: int) -> U: ...
    @overload
    def __getitem__(self, at: slice) -> list[U]: ...
    def __getitem__(self, at: int | slice) -> U | list[U]:
        if isinstance(at, slice):
            return [self._make(item) for item in self._items[at]]
        return self._make(self._items[at])


def _mapped(path: Path, dtype: str) -> Array:
    """A plain array over the mapped file: slicing np.memmap itself costs a new object of that class each time."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
