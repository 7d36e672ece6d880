from __future__ import annotations

import sys

import pytest

from posttrain.data.language import UNKNOWN, _identifier, guess, known_languages, letters
from posttrain.errors import DoesNotFit
from posttrain.settings.filters import LANGUAGES

SAID = {
    "en": "The train to the coast leaves at noon, and we should be at the station a little earlier than that.",
    "de": "Der Zug an die Küste fährt um zwölf Uhr ab, und wir sollten etwas früher am Bahnhof sein.",
    "fr": "Le train pour la côte part à midi, et nous devrions être à la gare un peu plus tôt que cela.",
    "es": "El tren a la costa sale al mediodía, y deberíamos estar en la estación un poco antes.",
    "ru": "Поезд к побережью отправляется в полдень, и нам следует быть на вокзале немного раньше.",
    "zh": "开往海边的火车中午出发，我们应该早一点到车站。",
    "ja": "海岸行きの電車は正午に出発しますので、少し早めに駅に着くようにしましょう。",
    "ar": "يغادر القطار المتجه إلى الساحل ظهرا، وينبغي أن نكون في المحطة قبل ذلك بقليل.",
}


@pytest.mark.parametrize(("language", "text"), SAID.items())
def test_a_sentence_is_enough(language: str, text: str) -> None:
    found = guess(text, 0.8)
    assert found.language == language


@pytest.mark.parametrize(
    "text", ["", "Yes.", "OK", "42", "Test", "12 + 30 = 42", "🐱😺🐾🧶🧸", "https://a.b/cdefghijklmnopqrst"]
)
def test_too_little_is_unknown(text: str) -> None:
    assert guess(text).language == UNKNOWN


def test_code_says_nothing_about_language() -> None:
    code = "```python\ndef f(values):\n    return sorted(values)\n```"
    assert guess(code).language == UNKNOWN
    assert guess(f"{SAID['de']}\n{code}", 0.8).language == "de"


def test_an_unsure_detector_says_so() -> None:
    mixed = "Scottish Unicorns: 27(1/3)=9, female: 9(2/3)=6 unicorns"
    assert guess(mixed, 0.8).language == UNKNOWN
    assert guess(mixed, 0.0).language != UNKNOWN


def test_ideographs_count_for_more_than_letters() -> None:
    assert (letters("ab 1!"), letters("火车")) == (2, 8)


def test_the_recipe_knows_what_the_detector_knows() -> None:
    assert known_languages() == LANGUAGES


def test_a_missing_detector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    _identifier.cache_clear()
    with pytest.raises(DoesNotFit, match="py3langid, which is not installed here") as fault:
        guess(SAID["en"])
    assert fault.value.exit_code == 5
