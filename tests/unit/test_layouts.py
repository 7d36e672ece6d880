"""Formats as public data sets write them: hand-written rows with the layout of the set that is named, and the records
they must become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_help import shared, write_rows

from posttrain.data.formats import Dropped, Source, kind_of, stream
from posttrain.errors import DataError
from posttrain.records import Example, Message, Pair, Rated, Row, Stepwise, Task, ToolCall
from posttrain.settings import DatasetSettings

USER = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
ASKED, SAID = Message("user", "Hi"), Message("assistant", "Hello.")
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[Any], Source]]:
    def reading(kind: type[Row], *rows: dict[str, Any], **keys: Any) -> tuple[list[Any], Source]:
        write_rows(tmp_path / "d.jsonl", list(rows))
        found = stream([DatasetSettings(path="d.jsonl", **keys)], lambda path: tmp_path / path, kind)
        return list(found), found.sources[0]

    return reading


Read = Callable[..., tuple[list[Any], Source]]


def refusal(read: Read, kind: type[Row], *rows: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(DataError) as fault:
        read(kind, *rows, **keys)
    return str(fault.value)


# Conversations


def test_tool_calls_as_openai_writes_them(read: Read) -> None:
    """Arguments as JSON text, content null, the answer of the tool with the id of its call."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":  "Rome"}'}}
    row = {
        "messages": [
            {"role": "system", "content": "Be short."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
            {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "weather"},
            {"role": "assistant", "content": [{"type": "text", "text": "Sun"}, {"type": "text", "text": "ny."}]},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }
    (example,), source = read(Example, row)
    assert example.messages[2:] == (
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Rome"}', "c1"),)),
        Message("tool", "sunny", name="weather", tool_call_id="c1"),
        Message("assistant", "Sunny."),
    )
    assert [json.loads(tool)["function"]["name"] for tool in example.tools] == ["weather"]
    assert source.rule == "has messages, with tools"


def test_tool_calls_as_trl_s_sets_write_them(read: Read) -> None:
    """Arguments as objects, no ids, tools as bare schemas or as one JSON text."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    answer = {"role": "tool", "name": "weather", "content": "sunny"}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, answer, HELLO]
    for tools in ([WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]):
        (example,), _ = read(Example, {"messages": messages, "tools": tools})
        assert example.messages[1].tool_calls == (ToolCall("weather", '{"city": "Rome"}'),)
        assert [json.loads(tool) for tool in example.tools] == [{"type": "function", "function": WEATHER}]


def test_the_older_function_call(read: Read) -> None:
    messages = [USER, {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": ""}}]
    (example,), source = read(Example, {"messages": messages, "functions": [WEATHER]})
    assert example.messages[1].tool_calls == (ToolCall("now", "{}"),) and len(example.tools) == 1
    assert source.rule == "has messages, with functions (as tools)"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thinking(read: Read, key: str) -> None:
    (example,), _ = read(Example, {"messages": [USER, {**HELLO, key: "A greeting."}]})
    assert example.messages[1] == Message("assistant", "Hello.", thinking="A greeting.")


def test_what_is_trained_message_by_message(read: Read) -> None:
    turns = [USER, {**HELLO, "train": False}, USER, {**HELLO, "weight": 0}, USER, {**HELLO, "weight": 1}, USER, HELLO]
    (example,), _ = read(Example, {"messages": turns})
    assert [m.train for m in example.messages if m.role == "assistant"] == [False, False, True, None]


MARKED, QUIET = {**HELLO, "train": True}, {**HELLO, "weight": 0}


@pytest.mark.parametrize(
    ("kind", "row", "says"),
    [
        (Example, {"prompt": [USER, MARKED, USER], "completion": "x"}, "'prompt' has a message with train: true"),
        (Task, {"prompt": [USER, MARKED, USER]}, "'prompt' has a message with train: true"),
        (Pair, {"prompt": "Hi", "chosen": [QUIET], "rejected": "x"}, "'chosen' has a message with train: false"),
        (Pair, {"prompt": "Hi", "chosen": "x", "rejected": [QUIET]}, "'rejected' has a message with train: false"),
        (
            Pair,
            {"chosen": [USER, MARKED, USER, HELLO], "rejected": [USER, MARKED, USER, {**HELLO, "content": "x"}]},
            "'prompt' has a message with train: true",
        ),
        (Rated, {"prompt": "Hi", "completion": [QUIET], "label": True}, "'completion' has a message with train: false"),
        (Rated, {"messages": [USER, QUIET], "label": True}, "'messages' has a message with train: false"),
        (Rated, {"messages": [USER, MARKED, USER, HELLO], "label": True}, "'messages' has a message with train: true"),
    ],
)
def test_train_marks_that_would_not_be_obeyed_are_refused(
    read: Read, kind: type[Row], row: dict[str, Any], says: str
) -> None:
    assert says in refusal(read, kind, row)


def test_train_marks_that_agree_are_accepted(read: Read) -> None:
    prompt = [USER, QUIET, USER]
    assert len(read(Pair, {"prompt": prompt, "chosen": [MARKED], "rejected": "x"})[0]) == 1
    assert len(read(Rated, {"messages": [*prompt, MARKED], "label": True})[0]) == 1
    (example,), _ = read(Example, {"prompt": prompt, "completion": [QUIET, USER, HELLO]})
    assert [m.train for m in example.messages if m.role == "assistant"] == [False, False, None]


def test_sharegpt_with_a_call(read: Read) -> None:
    """As glaive_toolcall writes it: the call and the tools are JSON texts."""
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": '{"sky": "clear"}'},
            {"from": "gpt", "value": "Clear."},
        ],
        "system": "Be short.",
        "tools": json.dumps([WEATHER]),
    }
    (example,), source = read(Example, row)
    assert example.messages == (
        Message("system", "Be short."),
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Rome"}'),)),
        Message("tool", '{"sky": "clear"}'),
        Message("assistant", "Clear."),
    )
    assert (source.format, source.rule) == ("sharegpt", "has conversations, with system and tools")


def test_sharegpt_as_openhermes_and_slimorca_write_it(read: Read) -> None:
    turns = [{"from": "system", "value": "S", "weight": None}, {"from": "human", "value": "Hi", "weight": 0.0},
             {"from": "gpt", "value": "Hello.", "weight": 1.0}]  # fmt: skip
    (example,), source = read(Example, {"conversations": turns, "system_prompt": None, "source": "x"})
    assert example.messages == (Message("system", "S"), ASKED, Message("assistant", "Hello.", True))
    assert source.rule == "has conversations"


def test_messages_under_the_name_of_conversations(read: Read) -> None:
    (example,), source = read(Example, {"conversations": [USER, HELLO], "id": 7})
    assert example.messages == (ASKED, SAID)
    assert (source.format, source.rule) == ("messages", "has conversations (as messages)")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "developer", "content": "x"}, "has role 'developer'. Roles are system, user, assistant, tool."),
        ({**HELLO, "audio": {"id": "x"}}, "has audio, which cannot be trained on"),
        ({**HELLO, "refusal": "I cannot."}, "has refusal, which cannot be trained on"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "has content that is not text"),
        ({**HELLO, "thinking": "a", "reasoning": "b"}, "has different texts in thinking and reasoning"),
        ({**HELLO, "thinking": ["a"]}, "Thinking is text, on assistant messages only"),
        ({**USER, "thinking": "a"}, "(user) has thinking"),
        ({**HELLO, "weight": 0.5}, "has weight: 0.5"),
        ({**HELLO, "weight": 1, "train": False}, "has weight: 1"),
        ({**HELLO, "train": "yes"}, "(assistant) has train: 'yes'"),
        ({**USER, "tool_calls": [{"name": "f"}]}, "(user) has tool_calls. Only an assistant calls tools."),
        ({**HELLO, "tool_calls": {"name": "f"}}, "has tool_calls that are no list"),
        ({**HELLO, "tool_calls": [{"function": {}}]}, "has tool_calls[0] without a name"),
        ({**HELLO, "tool_calls": [{"name": "f", "arguments": "{x"}]}, "arguments are no JSON: '{x'"),
        ({**HELLO, "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments are no object: [1]"),
        ({**HELLO, "tool_calls": [{"type": "code", "name": "f"}]}, "of type 'code'. Only functions are called."),
        ({**HELLO, "tool_calls": [{"id": 3, "name": "f"}]}, "with id 3"),
        ({**HELLO, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "has tool_calls and function_call"),
        ({"role": "tool", "content": None}, "has content that is not text: None"),
        ({"role": "tool", "content": "x", "name": 3}, "has name: 3"),
        (
            {"role": "tool", "content": "x", "tool_call_id": "zz"},
            "answers the call 'zz', which no message before it makes",
        ),
        ({"from": "gpt", "value": "x"}, "has role None"),
    ],
)
def test_what_a_message_cannot_say_is_refused_by_name(read: Read, message: dict[str, Any], says: str) -> None:
    fine = {"messages": [USER, HELLO]}
    said = refusal(read, Example, fine, {"messages": [USER, message, USER, HELLO]})
    assert "d.jsonl:2: messages[1] " in said and says in said


UNSOUND = [
    ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
    ('{"a": NaN}', "NaN is no JSON value"),
    ('{"a": "\\ud83d"}', "half a character"),
    ('{"a": ' + "[" * 70 + "]" * 70 + "}", "more than 64 deep"),
]


@pytest.mark.parametrize(("inner", "says"), UNSOUND)
def test_json_inside_a_string_is_read_as_strictly_as_the_row(read: Read, inner: str, says: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": inner}}]}
    assert says in (fault := refusal(read, Example, {"messages": [USER, call]})) and "d.jsonl:1: messages[1]" in fault
    older = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": f'{{"name": "f", "arguments": {inner}}}'},
    ]
    assert says in refusal(read, Example, {"conversations": older})
    for tools in (f'[{{"name": "f", "parameters": {inner}}}]', [f'{{"name": "f", "parameters": {inner}}}']):
        assert says in refusal(read, Example, {"messages": [USER, HELLO], "tools": tools})


def test_sharegpt_faults(read: Read) -> None:
    fine = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for turn, says in (
        ({"from": "narrator", "value": "x"}, "conversations[0] is from 'narrator'. Speakers are human,"),
        ({"from": "function_call", "value": "look()"}, "conversations[0] (function_call) is no JSON: 'look()'"),
        ({"from": "human", "value": None}, "conversations[0] has content that is not text: None"),
    ):
        said = refusal(read, Example, {"conversations": fine}, {"conversations": [turn, *fine]})
        assert "d.jsonl:2: " in said and says in said
    mixed = [{"from": "human", "value": "a"}, HELLO]
    assert "conversations[1] is from None" in refusal(read, Example, {"conversations": mixed})


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("{", "'tools' must be JSON; it is '{'"),
        ({"name": "f"}, "'tools' must be a list of tools"),
        ([3], "tools[0] must be an object; it is 3"),
        ([{"type": "function", "function": {"description": "x"}}], "tools[0] has no name"),
    ],
)
def test_tools_that_are_none(read: Read, tools: Any, says: str) -> None:
    assert says in refusal(read, Example, {"messages": [USER, HELLO], "tools": tools})


# Prompts, instructions, text


def test_alpaca_and_dolly(read: Read) -> None:
    rows = [{"instruction": "Sum up.", "input": "Long text.", "output": "Short."},
            {"instruction": "Greet.", "input": "", "output": "Hi.", "system": "Be kind."}]  # fmt: skip
    (first, second), source = read(Example, *rows)
    assert first.messages == (Message("user", "Sum up.\n\nLong text."), Message("assistant", "Short."))
    assert second.messages[0] == Message("system", "Be kind.")
    assert (source.format, source.rule) == ("alpaca", "has instruction and output, with input")
    dolly = {"instruction": "Sum up.", "context": "Long text.", "response": "Short.", "category": "x"}
    (third,), source = read(Example, dolly)
    assert third.messages == first.messages
    assert source.rule == "has instruction and response (as output), with context (as input)"
    with_history = {**rows[0], "history": [["a", "b"]]}
    assert "'history' (earlier turns of an instruction) is not read" in refusal(read, Example, with_history)


def test_stanford_s_alpaca_has_a_text_beside_it_and_must_be_named(read: Read) -> None:
    row = {"instruction": "Greet.", "input": "", "output": "Hi.", "text": "Below is an instruction ..."}
    said = refusal(read, Example, row)
    assert "the columns fit alpaca and text" in said and "Set format: alpaca." in said
    (example,), source = read(Example, row, format="alpaca")
    assert example.messages[0].content == "Greet." and source.rule == "named in the recipe"


def test_prompt_with_response_and_system(read: Read) -> None:
    (example,), source = read(Example, {"prompt": "Hi", "response": "Hello.", "system_prompt": "S"})
    assert example.messages == (Message("system", "S"), ASKED, SAID)
    assert source.rule == "has prompt and response (as completion), with system_prompt (as system)"
    twice = {"prompt": [{"role": "system", "content": "T"}, USER], "completion": "a", "system": "S"}
    assert "has a column 'system' and a system message" in refusal(read, Example, twice)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello.", "label": False},
        {"messages": [USER, HELLO], "label": True},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": True},
    ],
)
def test_judged_answers_are_not_imitated_unless_it_is_said(read: Read, row: dict[str, Any]) -> None:
    said = refusal(read, Example, row)
    assert "bad answers would be learned like good ones" in said
    name = said.split("Set format: ")[1].split()[0]
    assert len(read(Example, row, format=name)[0]) == 1


def test_a_verdict_that_the_first_row_leaves_open_is_still_seen(read: Read) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (None, True)]
    assert "d.jsonl:2" in (says := refusal(read, Example, *rows)) and "'label' looks like a verdict" in says
    assert len(read(Example, *rows, format="prompt_completion")[0]) == 2


@pytest.mark.parametrize("first", [{}, {"context": None, "system_prompt": None, "functions": None}])
def test_optional_columns_under_another_name_that_the_first_row_leaves_out(read: Read, first: dict[str, Any]) -> None:
    dolly = {"instruction": "How long?", "response": "1 km."}
    examples, _ = read(Example, dolly | first, dolly | {"context": "River 1 is 1 km long."})
    assert [e.messages[0].content for e in examples] == ["How long?", "How long?\n\nRiver 1 is 1 km long."]
    short = {"prompt": "Hi", "completion": "Hello."}
    examples, _ = read(Example, short | first, short | {"system_prompt": "Be short."}, short | {"system": "Be long."})
    assert [[m.content for m in e.messages if m.role == "system"] for e in examples] == [
        [],
        ["Be short."],
        ["Be long."],
    ]
    talk = {"messages": [USER, HELLO]}
    examples, _ = read(Example, talk | first, talk | {"functions": [WEATHER]})
    assert [len(e.tools) for e in examples] == [0, 1]


def test_two_conversations_in_one_row_are_ambiguous(read: Read) -> None:
    row = {"messages": [USER, HELLO], "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert "the columns fit messages and sharegpt" in refusal(read, Example, row)
    (example,), _ = read(Example, row, format="sharegpt")
    assert example.messages[0].content == "a"


# Pairs


def test_ultrafeedback_binarized(read: Read) -> None:
    """The prompt as text, and both sides as whole conversations that begin with it; `messages` repeats the chosen."""
    go = {"role": "assistant", "content": "Go."}
    row = {"prompt": "Hi", "prompt_id": "x", "chosen": [USER, HELLO], "rejected": [USER, go], "messages": [USER, HELLO],
           "score_chosen": 8.5, "score_rejected": 4.0}  # fmt: skip
    (pair,), source = read(Pair, row)
    assert pair == Pair("d.jsonl:1", (ASKED,), (SAID,), (Message("assistant", "Go."),))
    assert source.rule == "has chosen and rejected, with prompt"


def test_orca_pairs(read: Read) -> None:
    row = {"system": "S", "question": "Hi", "chosen": "Hello.", "rejected": "Go."}
    (pair, bare), source = read(Pair, row, {**row, "system": ""})
    assert pair.prompt == (Message("system", "S"), ASKED) and bare.prompt == (ASKED,)
    assert source.rule == "has chosen and rejected, with question (as prompt) and system"


def test_sides_as_single_messages_and_as_sharegpt(read: Read) -> None:
    row = {"prompt": "Hi", "chosen": HELLO, "rejected": {"from": "gpt", "value": "Go."}}
    (pair,), _ = read(Pair, row)
    assert (pair.chosen, pair.rejected) == ((SAID,), (Message("assistant", "Go."),))


def test_turns_both_sides_share_belong_to_the_prompt(read: Read) -> None:
    """As in orpo-dpo-mix: the prompt is the first question, both sides repeat several turns."""
    turns = [USER, HELLO, {"role": "user", "content": "More"}]
    better, worse = ({"role": "assistant", "content": text} for text in ("A", "B"))
    (pair,), _ = read(Pair, {"prompt": "Hi", "chosen": [*turns, better], "rejected": [*turns, worse]})
    assert [m.content for m in pair.prompt] == ["Hi", "Hello.", "More"]
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("A", "B")


def test_pairs_that_call_tools(read: Read) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {}}]}
    rows = [{"prompt": [USER], "chosen": [call], "rejected": [HELLO], "tools": [WEATHER]},
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [HELLO]}]  # fmt: skip
    (pair, lost), _ = read(Pair, *rows)
    assert pair.chosen[0].tool_calls and pair.tools
    assert lost == Dropped("d.jsonl:2", "empty answer")


TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
TURNS = (ASKED, SAID, Message("user", "How are you?"))


def test_a_transcript_as_prompt_is_a_conversation(read: Read) -> None:
    (pair,), _ = read(Pair, {"prompt": TRANSCRIPT, "chosen": " Fine.", "rejected": " Bad."})
    assert pair.prompt == TURNS
    assert (pair.chosen, pair.rejected) == ((Message("assistant", "Fine."),), (Message("assistant", "Bad."),))
    (rated,), _ = read(Rated, {"prompt": TRANSCRIPT, "completion": " Fine.", "label": True})
    assert rated.prompt == TURNS and rated.completion == (Message("assistant", "Fine."),)
    (task,), _ = read(Task, {"prompt": TRANSCRIPT})
    assert task.prompt == TURNS
    (example,), _ = read(Example, {"prompt": TRANSCRIPT, "completion": " Fine.", "system": "S"})
    assert [m.content for m in example.messages] == ["S", "Hi", "Hello.", "How are you?", "Fine."]


def test_a_transcript_beside_its_prompt_is_not_scored_as_an_answer(read: Read) -> None:
    whole = "\n\nHuman: Hi\n\nAssistant: "
    for prompt in ("Hi", "\n\nHuman: Hi\n\nAssistant:"):
        (pair,), _ = read(Pair, {"prompt": prompt, "chosen": f"{whole}Hello.", "rejected": f"{whole}no."})
        assert pair == Pair(pair.id, (ASKED,), (SAID,), (Message("assistant", "no."),))
    row = {"prompt": "Hi", "completion": f"{whole}Hello.", "label": True}
    assert "'completion' must begin with an assistant message" in refusal(read, Rated, row)


@pytest.mark.parametrize(
    ("kind", "row", "says"),
    [
        (Task, {"prompt": "Be short.\n\nHuman: Hi\n\nAssistant:"}, "does not begin so"),
        (Task, {"prompt": "Human: Fall Flat is what?"}, "ends with an open Assistant:"),
        (Task, {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello."}, "ends with an open Assistant:"),
        (Rated, {"prompt": "Hi", "completion": "Hello.\n\nHuman: Bye", "label": True}, "'completion' has Human:"),
        (Pair, {"prompt": "Hi", "chosen": "Hello.\n\nHuman: Bye", "rejected": "x"}, "'chosen' has Human:"),
        (Pair, {"prompt": "Hi", "chosen": "x", "rejected": "\n\nHuman: Ho\n\nAssistant: y"}, "does not continue"),
    ],
)
def test_speaker_marks_in_other_places_are_refused(read: Read, kind: type[Row], row: dict[str, Any], says: str) -> None:
    assert says in refusal(read, kind, row)


def test_a_prompt_that_the_sides_do_not_continue(read: Read) -> None:
    other = [{"role": "user", "content": "Other"}, HELLO]
    row = {"prompt": "Hi", "chosen": other, "rejected": [USER, HELLO]}
    assert "does not continue the prompt with an assistant message" in refusal(read, Pair, row)


# Thumbs


def test_kto_mix(read: Read) -> None:
    row = {"prompt": [USER], "completion": [HELLO], "label": True}
    (good, bad), source = read(Rated, row, {**row, "label": False})
    assert good == Rated("d.jsonl:1", (ASKED,), (SAID,), True) and bad.good is False
    assert (source.format, source.rule) == ("unpaired", "has prompt and completion and label")


@pytest.mark.parametrize(
    ("label", "good"),
    [(1, True), (0, False), (1.0, True), (0.0, False), ("good", True), ("Bad", False), ("thumbs_up", True),
     ("Thumbs down", False), ("👍", True), ("true", True), ("False", False), ("1", True), (-1, False)],
)  # fmt: skip
def test_thumbs(read: Read, label: Any, good: bool) -> None:
    (rated,), _ = read(Rated, {"prompt": "Hi", "completion": "Hello.", "label": label})
    assert rated.good is good


@pytest.mark.parametrize("label", [2, 3, 0.5, "maybe", "", [], None])
def test_neither_thumb(read: Read, label: Any) -> None:
    fine = {"prompt": "Hi", "completion": "Hello.", "label": True}
    said = refusal(read, Rated, fine, {**fine, "label": label})
    assert f"d.jsonl:2: 'label' is {label!r}, which is neither good nor bad." in said


def test_rated_conversations(read: Read) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    silent = [turns[0], {"from": "gpt", "value": ""}]
    rows = [{"conversations": turns, "kto_tag": False}, {"conversations": silent, "kto_tag": True}]
    (rated, lost), source = read(Rated, *rows)
    assert rated == Rated("d.jsonl:1", (ASKED,), (SAID,), False)
    assert lost == Dropped("d.jsonl:2", "empty answer")
    assert source.rule == "has conversations (as messages) and kto_tag (as label)"
    alone = {"messages": [HELLO], "label": True}
    assert "follows no message of role user or tool" in refusal(read, Rated, alone)
    (named,), _ = read(Rated, {"messages": [USER, HELLO], "label": 1}, format="unpaired")
    assert named.good


def test_a_completion_that_begins_with_the_user(read: Read) -> None:
    row = {"prompt": "Hi", "completion": [USER, HELLO], "label": True}
    assert "'completion' must begin with an assistant message; it begins with role user" in refusal(read, Rated, row)


# Steps


@pytest.mark.parametrize("column", ["steps", "completions"])
@pytest.mark.parametrize("labels", [[True, False], [1, 0], ["+", "-"], [1.0, 0.0]])
def test_math_shepherd_and_prm800k_as_trl_keeps_them(read: Read, column: str, labels: list[Any]) -> None:
    (row,), source = read(Stepwise, {"prompt": "1 + 2?", column: ["1 + 2 = 3", "So 4."], "labels": labels})
    assert row == Stepwise("d.jsonl:1", (Message("user", "1 + 2?"),), ("1 + 2 = 3", "So 4."), (True, False))
    assert source.rule == f"has prompt and {'steps' if column == 'steps' else 'completions (as steps)'} and labels"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [True]}, "2 steps and 1 labels"),
        ({"labels": [-1, 1]}, "labels[0] is -1, which is neither right nor wrong"),
        ({"labels": "++"}, "'labels' must be a list and not empty; it is '++'"),
        ({"steps": [], "labels": []}, "'steps' must be a list and not empty; it is []"),
        ({"steps": ["a", " "]}, "steps[1] must be text and not empty; it is ' '"),
        ({"steps": ["a\n", "b\nc"]}, "steps[1] has several lines; an answer is read step by step at the ends of its"),
        ({"prompt": None}, "'prompt' must be text and not empty; it is None"),
    ],
)
def test_steps_that_do_not_fit_their_labels(read: Read, change: dict[str, Any], says: str) -> None:
    fine = {"prompt": "a", "steps": ["x", "y"], "labels": [True, False]}
    said = refusal(read, Stepwise, fine, {**fine, **change})
    assert "d.jsonl:2: " in said and says in said


# Tasks


def test_tasks_with_question_or_problem_tools_and_system(read: Read) -> None:
    (task,), source = read(Task, {"question": "1 + 1?", "answer": "2", "level": 1})
    assert (task.prompt, task.answer, task.extra) == ((Message("user", "1 + 1?"),), "2", {"level": 1})
    assert source.rule == "has question (as prompt), with answer"
    (task,), _ = read(Task, {"problem": "1 + 1?", "solution": "2", "tools": [WEATHER], "system": "S"})
    assert (task.answer, task.extra) == (None, {"solution": "2"}) and len(task.tools) == 1
    assert [m.role for m in task.prompt] == ["system", "user"]


def test_an_own_column_goes_before_another_name_for_it(read: Read) -> None:
    (first, second), _ = read(Task, {"question": "a"}, {"question": "b", "prompt": "c"})
    assert (first.prompt[0].content, second.prompt[0].content) == ("a", "c")


# Between the kinds


@pytest.mark.parametrize(
    ("kind", "row", "name"),
    [
        (Example, {"chosen": "a", "rejected": "b", "prompt": "c"}, "preference"),
        (Example, {"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise"),
        (Pair, {"messages": [USER, HELLO]}, "messages"),
        (Pair, {"prompt": "a", "completion": "b", "label": True}, "prompt_completion"),
        (Rated, {"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        (Stepwise, {"prompt": "a", "completion": "b"}, "prompt_completion"),
        (Task, {"messages": [USER, HELLO]}, "messages"),
    ],
)
def test_rows_of_another_kind_are_recognised(read: Read, kind: type[Row], row: dict[str, Any], name: str) -> None:
    said = refusal(read, kind, row)
    assert f"These rows look like {name}, which belongs to another kind of stage." in said


def test_a_format_of_another_kind_is_refused(read: Read) -> None:
    said = refusal(read, Rated, {"prompt": "a", "completion": "b", "label": True}, format="preference")
    assert "format: preference does not fit this stage. Known here: unpaired (prompt, completion, label)" in said


# Real sets


def test_every_real_set_is_read_to_the_last_row() -> None:
    """Lines counted with wc and zcat."""
    answered = {"prompt": "question", "completion": "answer"}
    expected = [
        ("gsm8k-train.jsonl", Task, {}, 7473, 0, "has question (as prompt), with answer"),
        ("gsm8k-test.jsonl", Task, {}, 1319, 0, "has question (as prompt), with answer"),
        ("gsm8k-test.jsonl", Example, answered, 1319, 0, "has question (as prompt) and answer (as completion)"),
        ("hh-harmless-test.jsonl.gz", Pair, {}, 2312, 4, "has chosen and rejected"),
        ("alpaca-eval-preferences.jsonl", Pair, {}, 2415, 6, "has chosen and rejected, with prompt and confidence"),
        ("humaneval.jsonl.gz", Task, {}, 164, 0, "has prompt"),
        ("self-instruct-seed-tasks.jsonl", Task, {"prompt": "instruction"}, 175, 0, "has instruction (as prompt)"),
    ]
    for path, kind, columns, n, n_dropped, rule in expected:
        dataset = DatasetSettings(path=path, columns=columns)
        rows = stream([dataset], lambda p: shared(f"data/{p}"), kind)
        ids = [row.id for row in rows]
        source = rows.sources[0]
        assert len(set(ids)) == len(ids) == source.n_read == n and source.n_dropped == n_dropped, path
        assert source.rule == rule and source.n_unused == 0


def test_real_transcripts_are_many_turned() -> None:
    pairs = stream([DatasetSettings(path="hh-harmless-test.jsonl.gz")], lambda p: shared(f"data/{p}"), Pair)
    kept = [row for row in pairs if isinstance(row, Pair)]
    turns = [sum(m.role == "user" for m in pair.prompt) for pair in kept]
    assert len(kept) == 2308 and max(turns) > 5 and sum(n > 1 for n in turns) > len(turns) / 2
    assert all(a.role != b.role for pair in kept for a, b in zip(pair.prompt, pair.prompt[1:], strict=False))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [USER, HELLO]}, Pair),
        ({"prompt": "a", "completion": "b", "label": 1}, Rated),
        ({"prompt": "a", "completions": ["b"], "labels": [1]}, Stepwise),
        ({"prompt": "a", "completion": "b"}, Example),
        ({"text": "a"}, Example),
        ({"question": "a", "answer": "b"}, Task),
    ],
)
def test_the_kind_of_a_file_that_no_stage_reads(tmp_path: Path, row: dict[str, Any], kind: type) -> None:
    write_rows(tmp_path / "d.jsonl", [row])
    assert kind_of(DatasetSettings(path="d.jsonl"), lambda path: tmp_path / path) is kind
