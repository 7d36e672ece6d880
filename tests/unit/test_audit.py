"""Each statistic on rows small enough to be worked by hand; each finding on a planted fault."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser

import pytest

from posttrain.data.audit.copies import copies
from posttrain.data.audit.findings import Finding, findings, percent
from posttrain.data.audit.garbage import RARE, garbage, garbage_rows, in_pieces, rare
from posttrain.data.audit.lengths import Bin, distribution, long_answers
from posttrain.data.audit.look import Look, look
from posttrain.data.audit.manner import (
    looks_cut,
    markdown,
    opening,
    preamble,
    preambles,
    refuses,
    style,
    turns,
)
from posttrain.data.audit.page import page
from posttrain.data.audit.preference import length_bias
from posttrain.data.audit.report import Audit, audit
from posttrain.records import Example, Message, Pair, Rated, Row, Stepwise, Task

SENTENCE = "The kettle stands on the stove and will be hot soon."


def example(row_id: str, answer: str, prompt: str = "Hi", *, system: bool = False) -> Example:
    head = (Message("system", "Be brief."),) if system else ()
    return Example(row_id, (*head, Message("user", prompt), Message("assistant", answer)))


def pair(row_id: str, chosen: str, rejected: str, prompt: str = "Hi") -> Pair:
    return Pair(row_id, (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),))


def answers(*texts: str) -> list[Look]:
    return [look(example(f"r{i}", text, prompt=f"Question {i}")) for i, text in enumerate(texts)]


def found(*rows: Row) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(audit(rows))}


def test_a_row_is_looked_at_by_what_it_teaches() -> None:
    said = (
        Message("user", "a"),
        Message("assistant", "b", train=False),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    seen = look(Example("r", said))
    assert (seen.prompt, seen.answers, seen.n_turns, seen.has_system) == ("a\n\nc", ("d",), 2, False)
    assert look(Example("t", text="all of it")).answers == ("all of it",)
    assert (look(pair("p", "x", "y")).answers, look(pair("p", "x", "y")).rejected) == (("x",), ("y",))
    assert look(Rated("r", said[:1], said[3:], good=True)).answers == ("d",)
    assert look(Stepwise("s", said[:1], ("one", "two"), (True, False))).answers == ("one\ntwo",)
    assert look(Task("t", said[:1], answer="7")).answers == ()
    good, bad = (Rated("r", said[:1], said[3:], good=thumb) for thumb in (True, False))
    assert look(good).key != look(bad).key


def test_distribution_by_hand() -> None:
    d = distribution([1, 2, 3, 4, 10])
    assert (d.n, d.mean, d.shortest, d.longest) == (5, 4.0, 1, 10)
    assert d.percentiles == {"5": 1, "25": 2, "50": 3, "75": 4, "95": 10, "99": 10}
    assert d.bins == (Bin(1, 1, 1), Bin(2, 3, 2), Bin(4, 7, 1), Bin(8, 15, 1))
    assert distribution([0, 0]).bins == (Bin(0, 0, 2),)


def test_long_answers_are_counted_from_400_words() -> None:
    share = long_answers(answers("w " * 400, "w " * 399, "short"))
    assert share is not None
    assert (share.numerator, share.denominator) == (1, 3)
    assert "long-answers" in found(*(example(f"r{i}", SENTENCE) for i in range(30)))
    assert "long-answers" not in found(*(example(f"r{i}", "w " * (500 if i < 3 else 5)) for i in range(30)))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Sure, here you go.", "sure"),
        ("Sure thing! It is 4.", "sure"),
        ("Certainly! The answer is 4.", "certainly"),
        ("Of course. It is 4.", "of course"),
        ("Absolutely! Yes.", "absolutely"),
        ("Great question! It is 4.", "great question"),
        ("That's a good question. It is 4.", "great question"),
        ("I'd be happy to help. It is 4.", "happy to help"),
        ("Here's the list: 1, 2.", "here is"),
        ("As an AI language model, I cannot feel.", "as an AI"),
        ("Surely not.", None),
        ("Certainly not every kettle whistles.", None),
        ("The answer is 4. Sure!", None),
        ("As an aid to memory, write it down.", None),
    ],
)
def test_preambles(answer: str, kind: str | None) -> None:
    assert preamble(answer) == kind


def test_preamble_census_and_consistency() -> None:
    census = preambles(answers("Sure, 1.", "Sure! 2.", "Certainly, 3.", "It is 4.", "It is 5."))
    assert census is not None
    assert census.opened.value == 3 / 5
    assert census.kinds == {"sure": 2, "certainly": 1}
    assert census.opened_ids == ("r0", "r1", "r2")
    assert opening("Sure, here's the “list”: ...") == "sure here's the"
    assert "preambles" in found(*(example(f"r{i}", "Sure, yes." if i % 2 else SENTENCE) for i in range(10)))
    assert "preambles" not in found(*(example(f"r{i}", "Sure, yes.") for i in range(10))), "one manner is consistent"
    assert "preambles" not in found(*(example(f"r{i}", SENTENCE) for i in range(10)))


def test_markdown_is_told_from_plain_text() -> None:
    assert markdown("# Title\n\n- a\n- b\n\n**bold** and\n```\ncode\n```") == {"heading", "list", "bold", "code"}
    assert markdown("| a | b |\n|---|---|\n| 1 | 2 |") == {"table"}
    for plain in ("#### 18", "2 * 3 * 4 = 24", "- one lonely dash", "a ** b", "It cost $5. 3. is odd."):
        assert markdown(plain) == frozenset(), plain
    seen = style(answers("# A\nb", "plain", "**x** y", "plain"))
    assert seen is not None
    assert (seen.markdown.value, seen.features) == (0.5, {"heading": 1, "bold": 1})


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide medical advice.", True),
        ("I’m not able to do that.", True),
        ("As an AI, I don't have feelings.", True),
        ("I'm sorry to hear that your kettle broke.", False),
        ("You can't help but notice the kettle.", False),
        ("Banks cannot provide loans without capital.", False),
        (SENTENCE + " " + "x" * 200 + " I cannot help with that.", False),
    ],
)
def test_refusals_are_said_at_once(answer: str, refused: bool) -> None:
    assert refuses(answer) is refused


@pytest.mark.parametrize(
    ("answer", "is_cut"),
    [
        ("First we boil the water, then we add the", True),
        ("Here is what you need to do, step by step:", True),
        ("First we boil the water, then we add the tea.", False),
        ("He said: “First we boil the water, then we add tea.”", False),
        ("Paris", False),
        ("A Title of Seven Words Is Fine", False),
        ("Buy this:\n- a large kettle that is made of copper and has a lid", False),
        ("Run this:\n```\nfor each of the items in the list do nothing at all\n```", False),
        ("She has 3 apples and 4 pears and so on and on\n#### 7", False),
        ("So the number of kettles that stand on the stove is 42", False),
        ("A kettle is a vessel that you boil the water in 🙂", False),
    ],
)
def test_answers_that_end_in_the_middle(answer: str, is_cut: bool) -> None:
    assert looks_cut(answer) is is_cut


def test_turns_and_system_prompts() -> None:
    several = Example("m", tuple(Message(role, "x") for role in ("user", "assistant") * 3))
    seen = turns(
        [look(row) for row in (several, example("a", "x"), example("b", "x", system=True), Example("t", text="x"))]
    )
    assert seen is not None
    assert (seen.multi_turn.numerator, seen.system.numerator, seen.multi_turn.denominator) == (1, 1, 3)
    assert seen.counts == {"1": 2, "3": 1}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Caf\u00c3\u00a9 na\u00c3\u00afve", {"broken encoding"}),
        ("It\u00e2\u20ac\u2122s here", {"broken encoding"}),
        ("what \ufffd is this", {"replacement characters"}),
        ("bell \x07 rings", {"control characters"}),
        ("a\u200bb", {"hidden characters"}),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaa", {"one character repeated"}),
        ("the same thing again. " * 40, {"repeats itself"}),
        ("@#$%^&*()!@#$%^&*()_+{}|:<>?~@#$%^&*()!@#$%^&*()_+{}|:<>", {"mostly symbols"}),
        ("São Paulo é NÃO Âge, 100000000000000000000000000, " + "-" * 60 + " " + "=" * 40 + " abc def ghi", set()),
        ("👩‍👩‍👧 is a family, and می‌خواهم is Persian", set()),
        ("Line one\r\n\tline two", set()),
    ],
)
def test_garbage(text: str, names: set[str]) -> None:
    assert set(garbage(text)) == names


def test_characters_rare_among_all_rows() -> None:
    rows = [(f"r{i}", SENTENCE) for i in range(300)]
    assert rare([*rows, ("odd", "Кастрюля стоит на плите")]) == ["odd"]
    assert rare([*rows, ("one", SENTENCE + " Ж")]) == [], "one letter is no stray row"
    assert rare([*rows, *((f"ru{i}", "Кастрюля стоит на плите") for i in range(20))]) == [], (
        "twenty of them are not rare"
    )
    assert rare([("a", "abc"), ("b", "где")]) == [], "two rows do not say what is rare"
    seen = [look(example(row_id, text)) for row_id, text in [*rows, ("odd", "Кастрюля на плите")]]
    assert garbage_rows(seen) == {RARE: ("odd",)}


def test_texts_that_a_tokenizer_takes_to_pieces() -> None:
    rows = [("a", "word " * 20), ("b", "word " * 20), ("c", "QZX1Z " * 20), ("short", "QZ")]
    assert in_pieces(rows, lambda text: len(text) // 5 if "word" in text else len(text)) == ["c"]


def test_copies_and_prompts_asked_again() -> None:
    rows = [example("a", "x"), example("b", " x "), example("c", "y"), example("d", "x", prompt="Ho")]
    seen = copies([look(row) for row in rows])
    assert (seen.copies, seen.asked_again) == (("b",), ("c",))


def test_length_bias_by_hand() -> None:
    """ln 2, ln 2, −ln 2 and 0: mean ln 2 / 4, mean square 3/4 ln² 2, so the correlation is 1 / (4 √(3/4))."""
    bias = length_bias(
        [look(pair(*row)) for row in (("a", "xx", "y"), ("b", "xxxx", "yy"), ("c", "x", "yy"), ("d", "x", "y"))]
    )
    assert bias is not None
    assert bias.chosen_longer is not None
    assert (bias.n, bias.n_equal, bias.chosen_longer.numerator, bias.chosen_longer.denominator) == (4, 1, 2, 3)
    assert math.isclose(bias.correlation, 1 / (4 * math.sqrt(3 / 4)))
    assert math.isclose(bias.median_ratio, math.sqrt(2))
    always = length_bias([look(pair(str(i), "xxx" * (i + 1), "y" * (i + 1))) for i in range(9)])
    assert always is not None
    assert math.isclose(always.correlation, 1.0)
    assert length_bias(answers("no pairs here")) is None


def test_the_interval_of_the_correlation_covers() -> None:
    """Pairs drawn with a known correlation: 95 % intervals must hold it about 19 times in 20."""
    draw, truth, held = random.Random(5), 0.3 / math.sqrt(0.3**2 + 1), 0
    for seed in range(60):
        rows = [pair(str(i), "x" * round(1000 * math.exp(draw.gauss(0.3, 1))), "y" * 1000) for i in range(120)]
        bias = length_bias([look(row) for row in rows], seed)
        assert bias is not None
        held += truth in bias.correlation_interval
    assert held >= 52  # of 60; fewer has a probability below 1 % at 95 % coverage


def test_planted_faults_are_findings_with_their_rows() -> None:
    rows = [example(f"r{i}", f"{SENTENCE} {i}", prompt=f"Question {i}") for i in range(40)]
    rows += [
        example("mail", "Write to jane@gmail.com.", prompt="Whom?"),
        example("again", f"{SENTENCE} 7", prompt="Question 7"),
        example("damaged", "It\u00e2\u20ac\u2122s here.", prompt="Where?"),
        example("cut", "First we boil the water, then we add the", prompt="How?"),
    ]
    seen = found(*rows)
    for name, row_id in (("pii", "mail"), ("copies", "again"), ("garbage", "damaged"), ("cut", "cut")):
        assert seen[name].ids == (row_id,)
        assert seen[name].level == "fix"
    assert list(seen)[:4] == ["pii", "copies", "garbage", "cut"], "what to mend comes first"
    assert not set(found(*rows[:40])) & {"pii", "copies", "garbage", "cut"}


def test_length_bias_is_a_finding_in_both_directions() -> None:
    longer = [pair(str(i), SENTENCE + "!", "No.", prompt=str(i)) for i in range(50)]
    shorter = [pair(str(i), "No.", SENTENCE + "!", prompt=str(i)) for i in range(50)]
    assert found(*longer)["length-bias"].level == found(*shorter)["length-bias"].level == "fix"
    assert "length-bias" not in found(*longer[:25], *shorter[25:])


def test_dropped_rows_are_part_of_the_audit() -> None:
    each = audit([pair("a", "x", "y")], dropped=[("b", "empty answer"), ("c", "empty answer")])
    assert each.n_rows == 3
    (finding,) = (finding for finding in findings(each) if finding.name == "dropped")
    assert finding.ids == ("b", "c")


def test_contradicting_pairs_and_near_copies_are_findings() -> None:
    seen = found(pair("a", "x", "y"), pair("b", "y", "x"), pair("c", "x", "z"))
    assert seen["conflicts"].ids == ("a", "b")
    assert audit([pair("a", "x", "y")]).near_copies is None, "nobody looked"
    near = audit([pair("a", "x", "y")], near_copies=["a"])
    assert [finding.ids for finding in findings(near) if finding.name == "near-copies"] == [("a",)]


def whole(rows: list[Row], title: str = "rows") -> Audit:
    return audit(rows, title=title, sources=["rows.jsonl: 3 rows"], tokens=len)


def test_json_is_plain_and_complete() -> None:
    each = whole([pair("a", "Sure, yes. Mail jane@gmail.com", "no"), pair("b", "yes", "no, not at all")])
    plain = json.loads(json.dumps(each.as_dict(), allow_nan=False))
    assert plain["personal"] == {"hits": {"email": 1}, "rows": {"email": ["a"]}, "ids": ["a"]}
    assert plain["lengths"]["answer"]["tokens"]["longest"] == len("Sure, yes. Mail jane@gmail.com")
    assert plain["length_bias"]["chosen_longer"]["interval"] == [0.0945, 0.9055]
    assert plain["turns"]["multi_turn"] == {"n": 0, "of": 2, "share": 0.0, "interval": [0.0, 0.6576]}


class Reads(HTMLParser):
    """What a browser would fetch, and whether tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "hr", "br", "line", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_what_rows_say() -> None:
    hostile = "<script>alert(1)</script>"
    rows: list[Row] = [
        pair(f"{hostile}{i}", f"{hostile} jane@gmail.com {'x' * i}", "no", prompt=f"Q{i}") for i in range(30)
    ]
    html = page(
        [(whole(rows, hostile), "posttrain data audit rows.jsonl"), (whole([Task("t", (Message("user", "Hi"),))]), "x")]
    )
    reader = Reads()
    reader.feed(html)
    assert (reader.open, reader.fetched) == ([], [])
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html
    for said in ("To mend", "length-bias", "posttrain data audit rows.jsonl --show pii", "Chosen answer longer"):
        assert said in reader.text
    assert html.count("<svg") >= 4
    assert "prefers-color-scheme: dark" in html


def test_shares_for_people() -> None:
    assert [percent(x) for x in (0, 0.0004, 0.041, 0.5, 0.946, 0.9996, 1)] == [
        "0 %", "0.04 %", "4.1 %", "50 %", "94.6 %", "99.96 %", "100 %",
    ]  # fmt: skip
