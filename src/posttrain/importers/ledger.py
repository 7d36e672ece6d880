"""Every key of a foreign configuration, and what became of it: exactly one of carried, not needed here, lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.recipe.views import leaves
from posttrain.recipe.yaml_lines import KeyPath, key_name

OFF: tuple[Any, ...] = (
    None,
    False,
    0,
    "",
    "no",
    "none",
    "null",
    "false",
    "off",
    [],
    {},
)  # how configurations say that something is off


@dataclass(frozen=True)
class Carried:
    """A key that stands in the recipe, under our name and with our value."""

    key: str
    line: int | None
    ours: str
    value: Any


@dataclass(frozen=True)
class Left:
    """A key that does not: why it is not needed here, or what to do instead. Its value may be a secret."""

    key: str
    line: int | None
    why: str


@dataclass(frozen=True)
class Added:
    """A key that the recipe has and the file does not: the other tool's own default, or something only we ask for."""

    ours: str
    value: Any
    why: str


def is_off(value: Any) -> bool:
    return any(value == off and type(value) in (type(off), float) for off in OFF) or (
        isinstance(value, str) and value.lower() in OFF
    )


def is_on(value: Any) -> bool:
    """Whether a switch is on. Other tools read YAML 1.1, in which yes and on are true."""
    return value is True or (isinstance(value, str) and value.lower() in ("true", "yes", "on", "y", "auto"))


def section(value: Any) -> dict[str, Any]:
    """A section of keys; whatever else stands there has none."""
    return value if isinstance(value, dict) else {}


class Ledger:
    """The keys of one configuration. A key is a value that is not a section of keys; lists of values are one."""

    def __init__(self, data: dict[str, Any], lines: dict[KeyPath, int]) -> None:
        self.data = data
        self._lines = lines
        self._fates: dict[KeyPath, Carried | tuple[str, Left] | None] = {path: None for path, _ in leaves(data)}

    def get(self, *path: str | int, default: Any = None) -> Any:
        """What the file says at `path`; `default` also where it says nothing but the key."""
        value: Any = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return default
        return default if value is None else value

    def says(self, *path: str | int) -> bool:
        return self.get(*path) is not None

    def line(self, path: KeyPath) -> int | None:
        return self._lines.get(path)

    def carried(self, path: KeyPath, ours: str, value: Any) -> None:
        for at in self._open(path):
            self._fates[at] = Carried(key_name(at), self.line(at), ours, value)

    def not_needed(self, path: KeyPath, why: str) -> None:
        for at in self._open(path):
            self._fates[at] = ("not needed", Left(key_name(at), self.line(at), why))

    def lost(self, path: KeyPath, remedy: str) -> None:
        for at in self._open(path):
            self._fates[at] = ("lost", Left(key_name(at), self.line(at), remedy))

    def open(self, path: KeyPath = ()) -> bool:
        """Whether some key at or under `path` has no fate yet."""
        return any(self._open(path))

    def open_keys(self) -> list[KeyPath]:
        return list(self._open(()))

    def __len__(self) -> int:
        return len(self._fates)

    def all_carried(self) -> tuple[Carried, ...]:
        return tuple(fate for fate in self._fates.values() if isinstance(fate, Carried))

    def all_left(self, kind: str) -> tuple[Left, ...]:
        return tuple(fate[1] for fate in self._fates.values() if isinstance(fate, tuple) and fate[0] == kind)

    def _open(self, path: KeyPath) -> Iterator[KeyPath]:
        return iter([at for at, fate in self._fates.items() if fate is None and at[: len(path)] == path])
