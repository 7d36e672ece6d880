"""IFEval: each kind of instruction on answers that follow it and answers that do not, strict and loose."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.records import Task
from posttrain.rewards import ifeval
from posttrain.rewards.ifeval_kinds import KINDS, count_sentences
from posttrain.rewards.language import SENTENCES
from posttrain.rewards.nasty import NASTY

# kind → arguments, an answer that follows, answers that do not
CASES: dict[str, list[tuple[dict[str, Any], list[str], list[str]]]] = {
    "keywords:existence": [({"keywords": ["talented", "tianjin"]}, ["Talented in Tianjin."], ["talented", "tianjin"])],
    "keywords:frequency": [
        ({"keyword": "ai", "frequency": 2, "relation": "at least"}, ["AI, ai"], ["AI", "a i a i"]),
        ({"keyword": "ai", "frequency": 2, "relation": "less than"}, ["AI", "none"], ["AI ai"]),
    ],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["bad", "c++"]}, ["badly put", "C+"], ["Bad.", "I like C++!"]),
    ],
    "keywords:letter_frequency": [
        ({"letter": "z", "let_frequency": 3, "let_relation": "at least"}, ["Zzz", "z, z, z"], ["zz"]),
        ({"letter": "!", "let_frequency": 1, "let_relation": "less than"}, ["no"], ["no!"]),
    ],
    "language:response_language": [
        ({"language": "de"}, [SENTENCES["de"]], [SENTENCES["en"], "Ja"]),
        ({"language": "hi"}, [SENTENCES["hi"]], [SENTENCES["ar"]]),
    ],
    "length_constraints:number_sentences": [
        (
            {"num_sentences": 2, "relation": "at least"},
            ["One. Two!", "A? B."],
            ["One.", "Mr. Fox and Dr. Owl, e.g. here."],
        ),
        ({"num_sentences": 2, "relation": "less than"}, ["One, no stop"], ["One. Two."]),
    ],
    "length_constraints:number_paragraphs": [
        (
            {"num_paragraphs": 2},
            ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
            ["a", "a\n\nb", "a***b***c", "a******b"],
        ),
    ],
    "length_constraints:number_words": [
        ({"num_words": 3, "relation": "at least"}, ["one two three", "a-b c"], ["one, two"]),
        ({"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ],
    "length_constraints:nth_paragraph_first_word": [
        (
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
            ["a\n\nWeekend, at last", 'a\n\n"weekend" it is'],
            ["weekend\n\na", "a\n\nweekends", "a\n\nweekend\n\nb", "weekend"],
        ),
    ],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 2}, ["[name] of [place]"], ["[name]", "[[name]", "[a\nb] [c"]),
    ],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, ["Bye.\nP.S. Write!", "p. s. so"], ["Bye.", "PS so"]),
        ({"postscript_marker": "P.P.S"}, ["P.P.S one more"], ["P.S. one more"]),
    ],
    "detectable_format:number_bullet_lists": [
        (
            {"num_bullets": 2},
            ["* a\n* b", "- a\n  - b", "List:\n* a\n- b"],
            ["* a", "* a\n* b\n* c", "**a**\n**b**", "* a\u2028* b"],
        ),
    ],
    "detectable_format:constrained_response": [
        ({}, ["My answer is yes.", "Well. My answer is maybe."], ["yes", "my answer is yes", "My answer is yes"]),
    ],
    "detectable_format:number_highlighted_sections": [
        ({"num_highlights": 2}, ["*a* and *b*", "**a** and *b*"], ["*a*", "**a**", "** ** * *", "* a\n* b"]),
    ],
    "detectable_format:multiple_sections": [
        (
            {"section_spliter": "SECTION", "num_sections": 2},
            ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2"],
            ["SECTION 1\na", "SECTION one SECTION two", "Section 1 Section 2"],
        ),
    ],
    "detectable_format:json_format": [
        ({}, ['{"a": 1}', '```json\n{"a": [1]}\n```', "[]"], ['{"a": 1', "a", '{"a": 1} so', "[" * 100_000]),
    ],
    "detectable_format:title": [
        ({}, ["<<Joy>>\nand more", "so <<a b>>", "<<a\u2028b>>"], ["<Joy>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<"]),
    ],
    "combination:two_responses": [
        ({}, ["a\n******\nb", "******a******b"], ["a", "a******a", "a******b******c", "a************b"]),
    ],
    "combination:repeat_prompt": [
        ({"prompt_to_repeat": "Write a poem."}, ["write a poem.\n\nRoses"], ["Roses", "I will. Write a poem."]),
    ],
    "startend:end_checker": [
        ({"end_phrase": "Any questions?"}, ["Bye. any questions?", '"Any questions?"\n'], ["Any questions? Bye.", "?"]),
    ],
    "startend:quotation": [({}, ['"so"', ' "a "b" c" '], ['"', '"so', "'so'", 'a "b"'])],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 2, "capital_relation": "at least"}, ["AB and CD", "I AM"], ["AB and Cd"]),
        ({"capital_frequency": 2, "capital_relation": "less than"}, ["AB and Cd", "none"], ["AB CD"]),
    ],
    "change_case:english_capital": [
        ({}, [SENTENCES["en"].upper()], [SENTENCES["en"], SENTENCES["de"].upper(), "1 2 3"]),
    ],
    "change_case:english_lowercase": [
        ({}, [SENTENCES["en"].lower()], [SENTENCES["en"], SENTENCES["de"].lower(), "1 2 3"]),
    ],
    "punctuation:no_comma": [({}, ["no comma here"], ["one, two"])],
}


def row(*asked: tuple[str, Any]) -> Task:
    extra = {"instruction_id_list": [name for name, _ in asked], "kwargs": [given for _, given in asked]}
    return Task(id="rows.jsonl:7", prompt=(), extra=extra)


def paid(text: str, task: Task, **options: str) -> float:
    return ifeval.check(text, **ifeval.arguments(task, **options))


def test_all_25_kinds_of_the_paper_have_cases() -> None:
    assert CASES.keys() == KINDS.keys()
    assert len(KINDS) == 25


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_follows_what_it_says(name: str) -> None:
    for given, follow, break_it in CASES[name]:
        task = row((name, given))
        assert [text for text in follow if paid(text, task) != 1.0] == []
        assert [text for text in break_it if paid(text, task) != 0.0] == []
        assert paid("", task) == paid(" \n", task) == 0.0, "silence follows nothing"


def test_sentences_end_where_a_reader_says() -> None:
    known = {
        "": 0,
        "...": 0,
        "One": 1,
        "One. Two": 2,
        "3.14 is pi.": 1,
        "Why?! No...": 2,
        'He said "Go." Then left.': 2,
        "U.S. ships, i.e. two, left. All did.": 2,
    }
    assert {text: count_sentences(text) for text in known} == known


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_takes_long_over_a_giant(name: str) -> None:
    giants = [text for text in NASTY.values() if len(text) >= 20_000] + ['"' * 100_000, ". " * 50_000, "<<" * 50_000]
    assert len(giants) >= 8
    for given, _, _ in CASES[name]:
        task = row((name, given))
        for text in giants:
            began = time.process_time()
            paid(text, task)
            assert time.process_time() - began < 2, text[:20]


def test_all_or_the_share_of_them() -> None:
    task = row(("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {}))
    assert paid("<<a>>", task) == 0.0
    assert paid("<<a>>", task, count="share") == pytest.approx(2 / 3)
    assert paid('"<<a>>"', task) == 1.0
    assert paid("", task, count="share") == 0.0


def test_loose_forgives_a_frame_around_the_answer() -> None:
    task = row(("detectable_format:json_format", {}))
    framed = 'Sure, here it is:\n{"a": 1}\nI hope this helps!'
    assert paid(framed, task) == 0.0
    assert paid(framed, task, mode="loose") == 1.0
    assert paid("**[1]**", task) == 0.0
    assert paid("**[1]**", task, mode="loose") == 1.0
    assert len(ifeval.variants(framed)) == 8
    assert paid("one line", row(("punctuation:no_comma", {})), mode="loose") == 1.0
    assert paid("one,line", row(("punctuation:no_comma", {})), mode="loose") == 0.0, "an empty variant follows nothing"


def test_rows_as_the_data_set_writes_them() -> None:
    """Arguments that an instruction does not take are null, and whole numbers may have become floats."""
    given = {"num_words": 2.0, "relation": "at least", "keywords": None, "num_bullets": None}
    assert paid("one two", row(("length_constraints:number_words", given))) == 1.0
    as_text = Task(
        "rows.jsonl:7", (), extra={"instruction_id_list": '["startend:quotation"]', "kwargs": json.dumps([{}])}
    )
    assert paid('"so"', as_text) == 1.0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("punctuation:no_coma", {}), "Did you mean 'punctuation:no_comma'"),
        (("keywords:existence", {}), "needs the argument 'keywords'"),
        (("keywords:existence", {"keywords": []}), "must be a list of texts"),
        (("keywords:existence", {"keywords": [" "]}), "must be a list of texts"),
        (("startend:quotation", {"num_words": 3}), "knows no argument 'num_words'"),
        (("length_constraints:number_words", {"num_words": "3"}), "must be a whole number"),
        (("length_constraints:number_words", {"num_words": True}), "must be a whole number"),
        (("length_constraints:number_words", {"num_words": 3, "relation": "more than"}), "less than or at least"),
        (("startend:end_checker", {"end_phrase": " "}), "is blank"),
        (("startend:quotation", [1]), "not an object"),
    ],
)
def test_a_row_that_asks_for_something_else_is_named(asked: tuple[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7") as caught:
        ifeval.arguments(row(asked))
    assert message in str(caught.value)


def test_every_instruction_needs_its_arguments() -> None:
    broken = Task("rows.jsonl:7", (), extra={"instruction_id_list": ["startend:quotation"], "kwargs": []})
    with pytest.raises(DataError, match=r"names 1 instructions and kwargs holds arguments for 0"):
        ifeval.arguments(broken)
    with pytest.raises(DataError, match=r"needs a list in the column 'instruction_id_list'"):
        ifeval.arguments(Task("rows.jsonl:7", ()))
