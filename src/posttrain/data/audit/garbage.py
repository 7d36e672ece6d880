"""Rows that are damaged rather than wrong: broken encodings, control characters, endless repetition, stray scripts."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from posttrain.data.audit.look import Look

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
MOJIBAKE = re.compile(r"Ã[\x80-\xbf]|â€[\x80-\xbf™œ“”¦˜š]|Â[\xa0-\xbf](?=[\w\s])|ï»¿|ðŸ")  # UTF-8 read as Latin-1
HIDDEN = re.compile(r"[\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ue000-\uf8ff]")
ONE_CHARACTER = re.compile(r"([^\s\d=\-_.*#~+|/\\─═·•])\1{19,}")
ALPHANUMERIC = re.compile(r"[^\W_]+")
SYMBOLS_FROM = 50  # characters without white space
SYMBOLS_SHARE = 0.2  # fewer letters and digits than this: not prose, not code
REPEATS_FROM = 500  # bytes
REPEATS_RATIO = 0.1  # compressed to less: the same words over and over
RARE = "rare characters"
RARE_ROWS = 0.01  # a character that stands in fewer rows is rare in this data
RARE_SHARE = 0.2  # of the characters of a row
PIECES = "many tokens for little text"
PIECES_FROM = 50  # characters of a row
PIECES_RATIO = 0.5  # of the median of characters per token
RARE_FROM_ROWS = 200  # fewer rows do not say what is rare


def garbage(text: str) -> tuple[str, ...]:
    """What is wrong with a text taken alone."""
    return tuple(name for name, test in TESTS.items() if test(text))


def garbage_rows(looks: Sequence[Look], tokens: Callable[[str], int] | None = None) -> dict[str, tuple[str, ...]]:
    """Row ids by what is wrong with them: each text alone, characters that are rare among all rows, and, where a
    tokenizer is given, texts it takes to pieces."""
    found: dict[str, list[str]] = {}
    for look in looks:
        for name in dict.fromkeys(name for text in _texts(look) for name in garbage(text)):
            found.setdefault(name, []).append(look.id)
    if strange := rare([(look.id, "".join(_texts(look))) for look in looks]):
        found[RARE] = strange
    if tokens is not None and (pieces := in_pieces([(look.id, "".join(_texts(look))) for look in looks], tokens)):
        found[PIECES] = pieces
    return {name: tuple(ids) for name, ids in found.items()}


def rare(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Ids of rows of which much is written in characters that hardly any row holds. `rows` are (id, text)."""
    if len(rows) < RARE_FROM_ROWS:
        return []
    held = Counter(character for _, text in rows for character in set(text))
    strange = {character for character, n in held.items() if n < RARE_ROWS * len(rows) and not character.isspace()}
    found = []
    for row_id, text in rows:
        if not strange.isdisjoint(text):
            of: Mapping[str, int] = Counter(c for c in text if not c.isspace())
            if sum(n for c, n in of.items() if c in strange) >= RARE_SHARE * sum(of.values()):
                found.append(row_id)
    return found


def in_pieces(rows: Sequence[tuple[str, str]], tokens: Callable[[str], int]) -> list[str]:
    """Ids of rows with much shorter tokens than the median row: text of a kind that the tokenizer never saw."""
    sizes = [(row_id, len(text) / max(1, tokens(text))) for row_id, text in rows if len(text) >= PIECES_FROM]
    usual = median(size for _, size in sizes) if sizes else 0.0
    return [row_id for row_id, size in sizes if size < PIECES_RATIO * usual]


def _texts(look: Look) -> tuple[str, ...]:
    return (look.prompt, *look.answers, *look.rejected)


def _mostly_symbols(text: str) -> bool:
    if len(text) < SYMBOLS_FROM:
        return False
    written = sum(map(len, text.split()))
    return written >= SYMBOLS_FROM and sum(map(len, ALPHANUMERIC.findall(text))) < SYMBOLS_SHARE * written


def _repeats_itself(text: str) -> bool:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) >= REPEATS_FROM and len(zlib.compress(raw)) < REPEATS_RATIO * len(raw)


def _holds(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None


TESTS: dict[str, Callable[[str], bool]] = {
    "control characters": _holds(CONTROL),
    "replacement characters": lambda text: "\ufffd" in text,
    "broken encoding": _holds(MOJIBAKE),
    "hidden characters": _holds(HIDDEN),
    "one character repeated": _holds(ONE_CHARACTER),
    "mostly symbols": _mostly_symbols,
    "repeats itself": _repeats_itself,
}
