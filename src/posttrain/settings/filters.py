"""Keys that leave rows out, or mask them, before a stage trains on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.settings.base import Positive, Section, Share

# What the detector can answer with (ISO 639); a test compares the list with the library's.
LANGUAGES = frozenset(
    (
        "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr "
        "fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko "
        "ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru "
        "rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue "
        "zh zu"
    ).split()
)


class FilterSettings(Section):
    """Rows that are left out stand in the ledger as dropped, with the reason; they count towards max_drop_rate."""

    pii: Literal["off", "report", "mask", "drop"] = Field(
        default="off",
        description="personal data and secrets: e-mail, telephone, IP, card, IBAN, keys. mask writes [EMAIL] instead",
    )
    languages: list[str] = Field(
        default=[], description="keep answers in these, e.g. [en, de]; too short or unsure ones are kept and counted"
    )
    min_language_confidence: Share = Field(
        default=0.8, description="drop for its language only where the detector is at least this sure"
    )
    min_answer_chars: Positive | None = Field(default=None, description="drop rows with a shorter answer")
    max_answer_chars: Positive | None = Field(default=None, description="drop rows with a longer answer")
    garbage: Literal["keep", "drop"] = Field(
        default="keep", description="broken encodings, control characters, endless repetition, mostly symbols"
    )
