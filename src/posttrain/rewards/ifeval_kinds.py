"""The 25 kinds of verifiable instructions of IFEval (Zhou et al. 2023, table 1), one function each.

A function gets the answer and the instruction's own arguments, by the names the data set gives them, and says whether
the answer follows. None is ever asked about a blank answer. All take time linear in the answer, save language
detection, which looks at its beginning only. Where the paper's code asks a tokenizer of NLTK, rules stand here: a word
is a run of letters and digits, a sentence ends at `.`, `!` or `?` before white space, common abbreviations aside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from posttrain.rewards.language import detect

_WORD = re.compile(r"\w+")
_ABBREVIATION = re.compile(
    r"(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|no|fig|inc|ltd|co)", re.I
)
_ONE_OF = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("less than", "at least")


def _related(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


# --- keywords -----------------------------------------------------------------------------------------------------


def existence(text: str, keywords: list[str]) -> bool:
    return all(word.casefold() in text.casefold() for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _related(text.casefold().count(keyword.strip().casefold()), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _related(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


# --- language and length ------------------------------------------------------------------------------------------


def response_language(text: str, language: str) -> bool:
    return detect(text)[0] == language


def number_sentences(text: str, num_sentences: int, relation: str = "at least") -> bool:
    return _related(count_sentences(text), relation, num_sentences)


def count_sentences(text: str) -> int:
    count, said = 0, False  # said: whether the sentence at hand holds a word
    for token in text.split():
        said = said or _WORD.search(token) is not None
        token = token.rstrip("\"'”’)]")
        if said and token.endswith((".", "!", "?")) and not _abbreviated(token):
            count, said = count + 1, False
    return count + said


def _abbreviated(token: str) -> bool:
    """One full stop after something that is written with one."""
    word = token[:-1].lstrip("\"'“‘([")
    return token.endswith(".") and _ABBREVIATION.fullmatch(word) is not None


def number_words(text: str, num_words: int, relation: str = "at least") -> bool:
    return _related(len(_WORD.findall(text)), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***."""
    found = [part.strip() for part in text.split("***")]
    return all(found[1:-1]) and sum(map(bool, found)) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by a blank line."""
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    word = re.split(r"[\s.,?!'\"]", found[nth_paragraph - 1].lstrip("'\""), maxsplit=1)[0]
    return word.lower() == first_word.strip().lower()


# --- content and form ---------------------------------------------------------------------------------------------


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip().lower()
    spaced = {"p.s.": r"p\.\s?s\.", "p.p.s": r"p\.\s?p\.\s?s"}.get(marker, re.escape(marker))
    return re.search(rf"(?<!\w){spaced}", text.lower()) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    lines = [line.strip() for line in text.split("\n")]
    return sum((line[:1] == "*" and line[1:2] not in ("", "*")) or line[:1] == "-" for line in lines) == num_bullets


def constrained_response(text: str) -> bool:
    return any(choice in text for choice in _ONE_OF)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """*so* or **so**."""
    doubles = [m for m in re.findall(r"\*\*([^\n*]+)\*\*", text) if m.strip()]
    rest = re.sub(r"\*\*[^\n*]+\*\*", " ", text)
    return len(doubles) + len([m for m in re.findall(r"\*([^\n*]+)\*", rest) if m.strip()]) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """<<so>> on one line."""
    for line in text.split("\n"):
        start, stop = line.find("<<"), line.rfind(">>")
        if 0 <= start < stop and line[start + 2 : stop].strip("<> \t"):
            return True
    return False


# --- combination, start and end, case, punctuation ---------------------------------------------------------------


def two_responses(text: str) -> bool:
    """Divided by ******."""
    found = [part.strip() for part in text.split("******")]
    inner = [part for part in found if part]
    return all(found[1:-1]) and len(inner) == 2 and inner[0] != inner[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    return _related(sum(word.isupper() for word in re.findall(r"[\w'-]+", text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and detect(text.lower())[0] == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and detect(text)[0] == "en"


def no_comma(text: str) -> bool:
    return "," not in text


@dataclass(frozen=True, slots=True)
class Kind:
    """`needs` and `may` are the arguments that must and may be given, with their types."""

    follows: Callable[..., bool]
    needs: Mapping[str, type]
    may: Mapping[str, type]
    detects_language: bool = False


def _kind(follows: Callable[..., bool], detects_language: bool = False, may: str = "", **needs: type) -> Kind:
    return Kind(follows, needs, {may: str} if may else {}, detects_language)


KINDS: dict[str, Kind] = {
    "keywords:existence": _kind(existence, keywords=list),
    "keywords:frequency": _kind(frequency, keyword=str, frequency=int, may="relation"),
    "keywords:forbidden_words": _kind(forbidden_words, forbidden_words=list),
    "keywords:letter_frequency": _kind(letter_frequency, letter=str, let_frequency=int, may="let_relation"),
    "language:response_language": _kind(response_language, detects_language=True, language=str),
    "length_constraints:number_sentences": _kind(number_sentences, num_sentences=int, may="relation"),
    "length_constraints:number_paragraphs": _kind(number_paragraphs, num_paragraphs=int),
    "length_constraints:number_words": _kind(number_words, num_words=int, may="relation"),
    "length_constraints:nth_paragraph_first_word": _kind(
        nth_paragraph_first_word, num_paragraphs=int, nth_paragraph=int, first_word=str
    ),
    "detectable_content:number_placeholders": _kind(number_placeholders, num_placeholders=int),
    "detectable_content:postscript": _kind(postscript, postscript_marker=str),
    "detectable_format:number_bullet_lists": _kind(number_bullet_lists, num_bullets=int),
    "detectable_format:constrained_response": _kind(constrained_response),
    "detectable_format:number_highlighted_sections": _kind(number_highlighted_sections, num_highlights=int),
    "detectable_format:multiple_sections": _kind(multiple_sections, section_spliter=str, num_sections=int),
    "detectable_format:json_format": _kind(json_format),
    "detectable_format:title": _kind(title),
    "combination:two_responses": _kind(two_responses),
    "combination:repeat_prompt": _kind(repeat_prompt, prompt_to_repeat=str),
    "startend:end_checker": _kind(end_checker, end_phrase=str),
    "startend:quotation": _kind(quotation),
    "change_case:capital_word_frequency": _kind(capital_word_frequency, capital_frequency=int, may="capital_relation"),
    "change_case:english_capital": _kind(english_capital, detects_language=True),
    "change_case:english_lowercase": _kind(english_lowercase, detects_language=True),
    "punctuation:no_comma": _kind(no_comma),
}
