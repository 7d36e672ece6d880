"""What in the figures deserves attention, with the rows it is about and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from posttrain.data.audit.garbage import PIECES, RARE
from posttrain.data.audit.lengths import LONG_WORDS
from posttrain.data.audit.report import Audit
from posttrain.data.language import UNKNOWN
from posttrain.records import Measured

LONG_SHARE = 0.05  # with fewer long answers a model hardly writes any
PREAMBLE_MIX = (0.02, 0.90)  # between these, neither manner is learned
MARKDOWN_MIX = (0.10, 0.90)
TURN_MIX = (0.10, 0.90)
REFUSAL_SHARE = 0.10
CUT_SHARE = 0.01
LENGTH_BIAS = 0.60  # of pairs with the longer answer chosen, or as many with the shorter one
LANGUAGE_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class Finding:
    """`level`: fix it before training, or look whether it is meant. `ids`: the rows, where it is about some."""

    name: str
    level: Literal["fix", "look"]
    said: str
    advice: str
    ids: tuple[str, ...] = ()


def findings(audit: Audit) -> tuple[Finding, ...]:
    """What to fix first, then what to look at."""
    found = [finding for check in CHECKS for finding in check(audit)]
    return tuple(sorted(found, key=lambda finding: finding.level != "fix"))


def _dropped(a: Audit) -> Iterator[Finding]:
    if a.dropped:
        ids = tuple(row_id for of_reason in a.dropped.values() for row_id in of_reason)
        kinds = ", ".join(f"{reason} {len(of_reason):,}" for reason, of_reason in a.dropped.items())
        advice = "They are left out of training; too many stop the stage (max_drop_rate)."
        yield Finding("dropped", "fix", f"{_rows(len(ids))} from which nothing can be learnt: {kinds}.", advice, ids)


def _personal(a: Audit) -> Iterator[Finding]:
    if a.personal.ids:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in a.personal.hits.items())
        said = f"{_rows(len(a.personal.ids))} with personal data or secrets: {kinds}."
        advice = "Set filters: {pii: mask} or drop in the recipe, or write clean files with posttrain data filter."
        yield Finding("pii", "fix", said, advice, a.personal.ids)


def _garbage(a: Audit) -> Iterator[Finding]:
    if a.garbage:
        ids = tuple(dict.fromkeys(row_id for of_kind in a.garbage.values() for row_id in of_kind))
        kinds = ", ".join(f"{name} {len(of_kind):,}" for name, of_kind in a.garbage.items())
        advice = "Mend the export that made them, or set filters: {garbage: drop}."
        if RARE in a.garbage or PIECES in a.garbage:
            advice += " What is only rare here may be a stray language: no filter drops that, look."
        yield Finding("garbage", "fix", f"{_rows(len(ids))} may be damaged: {kinds}.", advice, ids)


def _copies(a: Audit) -> Iterator[Finding]:
    if a.copies.copies:
        said = f"{_rows(len(a.copies.copies))} with the content of an earlier row, letter for letter."
        yield Finding("copies", "fix", said, "A row that stands there twice counts twice: remove it.", a.copies.copies)
    if a.near_copies:
        said = f"{_rows(len(a.near_copies))} nearly the same as an earlier one."
        yield Finding("near-copies", "fix", said, "Remove them, or keep the best of each kind.", a.near_copies)
    if a.copies.asked_again:
        said = f"{_rows(len(a.copies.asked_again))} with the prompt of an earlier row and another answer."
        advice = "Fine where it is meant. Keep them on one side of a split: posttrain data split does."
        yield Finding("asked-again", "look", said, advice, a.copies.asked_again)


def _conflicts(a: Audit) -> Iterator[Finding]:
    if a.conflicts:
        said = f"{_rows(len(a.conflicts))} that another row contradicts: what is better here is worse there."
        advice = "The labels are noise, or the columns were swapped midway: look, and keep one of each."
        yield Finding("conflicts", "fix", said, advice, a.conflicts)


def _length_bias(a: Audit) -> Iterator[Finding]:
    bias = a.length_bias
    if bias is None or bias.chosen_longer is None:
        return
    longer = bias.chosen_longer
    low, high = bias.correlation_interval.low, bias.correlation_interval.high
    said = (
        f"the chosen answer is the longer one in {_share(longer)} of pairs; length–preference correlation "
        f"{bias.correlation:+.2f} ({low:+.2f} to {high:+.2f}), median ratio {bias.median_ratio:.2f}."
    )
    if longer.interval.low > LENGTH_BIAS:
        advice = "A model learns length from such pairs: add pairs whose shorter answer won, and watch answer length."
        yield Finding("length-bias", "fix", said, advice)
    elif longer.interval.high < 1 - LENGTH_BIAS:
        advice = "A model learns brevity from such pairs: add pairs whose longer answer won, and watch answer length."
        yield Finding("length-bias", "fix", said, advice)
    elif 0.5 not in longer.interval:
        yield Finding("length-bias", "look", said, "A mild pull on length: watch the length of answers in training.")


def _preambles(a: Audit) -> Iterator[Finding]:
    if a.preambles and PREAMBLE_MIX[0] < a.preambles.opened.value < PREAMBLE_MIX[1]:
        kinds = ", ".join(f"{name} {n:,}" for name, n in a.preambles.kinds.items())
        said = f"{_share(a.preambles.opened)} of answers open with a preamble, the others do not: {kinds}."
        advice = "Choose one manner: remove the preambles, or the rows."
        yield Finding("preambles", "fix", said, advice, a.preambles.opened_ids)


def _cut(a: Audit) -> Iterator[Finding]:
    if a.cut and a.cut.share.value > CUT_SHARE:
        said = f"{_share(a.cut.share)} of answers end in the middle of a sentence."
        advice = "A model learns to stop anywhere: look for a length limit in what wrote them."
        yield Finding("cut", "fix", said, advice, a.cut.ids)


def _long(a: Audit) -> Iterator[Finding]:
    if a.long_answers and a.long_answers.value < LONG_SHARE:
        said = f"{_share(a.long_answers)} of answers have {LONG_WORDS} words or more."
        advice = "A model does not write answers of a length it never saw: add some, unless short ones are wanted."
        yield Finding("long-answers", "look", said, advice)


def _markdown(a: Audit) -> Iterator[Finding]:
    if a.style and MARKDOWN_MIX[0] < a.style.markdown.value < MARKDOWN_MIX[1]:
        said = f"{_share(a.style.markdown)} of answers use markdown, the others are plain."
        yield Finding("markdown", "look", said, "Fine where the question decides; otherwise choose one style.")


def _turns(a: Audit) -> Iterator[Finding]:
    if a.turns and a.kind != "prompts" and not TURN_MIX[0] <= a.turns.multi_turn.value <= TURN_MIX[1]:
        said = f"{_share(a.turns.multi_turn)} of conversations have several turns."
        advice = "A model keeps to the kind of conversation it saw: add the other kind if it must hold both."
        yield Finding("turns", "look", said, advice)


def _refusals(a: Audit) -> Iterator[Finding]:
    if a.refusals and a.refusals.share.value > REFUSAL_SHARE:
        said = f"{_share(a.refusals.share)} of answers refuse."
        advice = "Right for safety data; elsewhere a model learns to refuse harmless questions."
        yield Finding("refusals", "look", said, advice, a.refusals.ids)


def _languages(a: Audit) -> Iterator[Finding]:
    told = {language: ids for language, ids in a.languages.rows.items() if len(ids) > LANGUAGE_SHARE * a.n_rows}
    if told:
        main = next(language for language in a.languages.counts if language != UNKNOWN)
        said = f"besides {main}: {', '.join(f'{language} in {len(ids):,}' for language, ids in told.items())} rows."
        advice = f"Fine where it is meant; otherwise set filters: {{languages: [{main}]}}."
        yield Finding("languages", "look", said, advice, tuple(row_id for ids in told.values() for row_id in ids))


CHECKS: tuple[Callable[[Audit], Iterator[Finding]], ...] = (
    _personal,
    _length_bias,
    _conflicts,
    _dropped,
    _copies,
    _garbage,
    _preambles,
    _cut,
    _long,
    _turns,
    _markdown,
    _refusals,
    _languages,
)


def percent(value: float) -> str:
    """A share for people: 0 %, 0.04 %, 4.1 %, 88 %."""
    shown = 100 * value
    digits = 0 if shown in (0, 100) or 10 <= shown <= 90 else 1 if 1 <= shown <= 99 else 2
    return f"{shown:.{digits}f} %"


def _share(measured: Measured) -> str:
    low, high = (f"{100 * bound:.1f}" for bound in (measured.interval.low, measured.interval.high))
    return f"{percent(measured.value)} ({measured.numerator:,} of {measured.denominator:,}; 95 %: {low}–{high} %)"


def _rows(n: int) -> str:
    return f"{n:,} row{'' if n == 1 else 's'}"
