"""Plain numbers, read without a computer algebra system: 1,234 · $18 · 50% · -3.50 · 5 apples · 2 million.

Anything else (fractions, LaTeX, units of one letter, two numbers) is not plain: `read` returns None and the
question goes to math-verify. Values are exact decimals, so five thousand nines cost no more than one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_NUMBER = re.compile(
    r"""(?P<sign>[-+]?) \s* (?P<currency>[$€£]?) \s* (?P<sign_after>[-+]?)
        (?P<digits>[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)? | [0-9]+(?:\.[0-9]*)? | \.[0-9]+)
        \s* (?P<mark>[%$€£]?)
        (?P<words>(?:\s+[A-Za-z]{2,20}){0,4})""",
    re.VERBOSE,
)
_MULTIPLIERS = {
    "dozen": Decimal(12),
    "hundred": Decimal(10**2),
    "thousand": Decimal(10**3),
    "million": Decimal(10**6),
    "billion": Decimal(10**9),
    "trillion": Decimal(10**12),
}
# Words that make a formula, a second answer or a doubt of what would otherwise be a number with its unit.
_NOT_UNITS = frozenset(
    ("and", "or", "not", "pi", "minus", "plus", "times", "over", "divided", "squared", "cubed", "to", "if", "percent")
)
MAX_LENGTH = 10_000


@dataclass(frozen=True, slots=True)
class Plain:
    value: Decimal
    percent: bool


def read(text: str) -> Plain | None:
    """The number that `text` as a whole states, or None where it is anything but a plain number."""
    match = _NUMBER.fullmatch(_tidy(text)) if len(text) <= MAX_LENGTH else None
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    words = match["words"].lower().split()
    value = Decimal(match["digits"].replace(",", ""))
    while words and words[0] in _MULTIPLIERS:
        value *= _MULTIPLIERS[words.pop(0)]
    percent = match["mark"] == "%" or words == ["percent"]
    if words != ["percent"] and not _NOT_UNITS.isdisjoint(words):
        return None
    return Plain(-value if "-" in (match["sign"], match["sign_after"]) else value, percent)


def equal(a: Plain, b: Plain) -> bool | None:
    """Whether two plain numbers are the same. None leaves it to math-verify, whose rounding rules then decide."""
    if a.value == b.value:
        return True
    if a.percent != b.percent:
        return None  # 50 % and 0.5
    both_whole = a.value == a.value.to_integral_value() and b.value == b.value.to_integral_value()
    if both_whole or abs(a.value - b.value) > Decimal("0.0001"):
        return False
    return None


def _tidy(text: str) -> str:
    text = " ".join(text.split()).strip("*_` ")
    text = text.replace("\\$", "$").replace("\\%", "%").replace("−", "-")
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1]  # an inline formula, not a currency
    return text.rstrip(".,;:! ").strip("*_` ")
