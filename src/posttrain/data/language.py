"""Which language a text is in, offline, by py3langid's naive Bayes over byte n-grams (139 languages).

A short text, code or a list of numbers has no language that could be told: it is `UNKNOWN`, which no filter drops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.errors import DoesNotFit

UNKNOWN = "unknown"
NOT_A_LANGUAGE = "zxx"  # what the library calls markup, numbers and identifiers
MIN_LETTERS = 20  # with fewer, "Yes." and "Test" come out as Kabyle
IDEOGRAPH = 4  # letters that a character of a script without an alphabet counts for
_FIRST_IDEOGRAPH = "\u2e80"
ENOUGH = 1000  # characters; more of a text does not change what language it is in

LETTERS = re.compile(r"[^\W\d_]+")
NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|<<[^<>\n]*>>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Guess:
    """A language by its ISO 639 code, and how sure the detector is of it (0 to 1)."""

    language: str
    confidence: float


def guess(text: str, min_confidence: float = 0.0) -> Guess:
    """The language of a text, or `UNKNOWN` where there are too few words or the detector is less sure than asked."""
    prose = NOT_PROSE.sub(" ", text[: 2 * ENOUGH])[:ENOUGH]
    if letters(prose) < MIN_LETTERS:
        return Guess(UNKNOWN, 0.0)
    language, confidence = _identifier().classify(prose)
    if language == NOT_A_LANGUAGE or confidence < min_confidence:
        return Guess(UNKNOWN, float(confidence))
    return Guess(str(language), float(confidence))


def letters(text: str) -> int:
    """How much is written there: letters, an ideograph or syllable sign counting as several."""
    found = "".join(LETTERS.findall(text))
    if found.isascii():
        return len(found)
    return sum(IDEOGRAPH if c >= _FIRST_IDEOGRAPH else 1 for c in found)


@cache
def known_languages() -> frozenset[str]:
    """Every code the detector can answer with."""
    return frozenset(map(str, _identifier().labels)) - {NOT_A_LANGUAGE}


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DoesNotFit(
            "languages are told apart by py3langid, which is not installed here.",
            remedy="pip install 'py3langid>=0.4'.",
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
