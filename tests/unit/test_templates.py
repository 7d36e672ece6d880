"""Well-known templates: what carries loss, written out by hand, and then for any conversation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from data_help import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from template_help import ANSWERS, CALLS, FAMILIES, RESULT, WEATHER, WITH_TOOLS, renderer_of, scored_texts, texts

from posttrain.data.templates import ChatTemplate
from posttrain.errors import DataError
from posttrain.paths import ASSETS
from posttrain.records import Example, Message, Pair, ToolCall, Tree

SYSTEM = Message("system", "Be brief.")
U1, A1 = Message("user", "How many?"), Message("assistant", "She sold 72.")
U2, A2 = Message("user", "And in May?"), Message("assistant", "24 clips.")
T1, T2 = replace(A1, thinking="48 + 24."), replace(A2, thinking="Half of 48.")
TALK = (U1, A1, U2, A2)

IM = "<|im_start|>"
CHATML_TALK = (
    f"{IM}user\nHow many?<|im_end|>\n{IM}assistant\n[[She sold 72.<|im_end|>]]\n"
    f"{IM}user\nAnd in May?<|im_end|>\n{IM}assistant\n[[24 clips.<|im_end|>]]"
)
CHATML_SYSTEM = f"{IM}system\nBe brief.<|im_end|>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3_TALK = [
    f"{IM}user\nHow many?<|im_end|>\n{IM}assistant\n[[{NO_THOUGHT}She sold 72.<|im_end|>]]",
    f"{IM}user\nHow many?<|im_end|>\n{IM}assistant\nShe sold 72.<|im_end|>\n"
    f"{IM}user\nAnd in May?<|im_end|>\n{IM}assistant\n[[{NO_THOUGHT}24 clips.<|im_end|>]]",
]
LLAMA = "<|start_header_id|>"
LLAMA_TALK = (
    f"{LLAMA}user<|end_header_id|>\n\nHow many?<|eot_id|>"
    f"{LLAMA}assistant<|end_header_id|>\n\n[[She sold 72.<|eot_id|>]]"
    f"{LLAMA}user<|end_header_id|>\n\nAnd in May?<|eot_id|>{LLAMA}assistant<|end_header_id|>\n\n[[24 clips.<|eot_id|>]]"
)
R1, R1_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def r1_talk(system: str) -> list[str]:
    first = f"{R1}{system}<｜User｜>How many?<｜Assistant｜>"
    return [
        f"{first}<think>\n[[\n</think>\n\nShe sold 72.{R1_END}]]",
        f"{first}She sold 72.{R1_END}<｜User｜>And in May?<｜Assistant｜><think>\n[[\n</think>\n\n24 clips.{R1_END}]]",
    ]


# Two turns, without and with a system message; None: the template takes none. One text a branch, its trunk included.
SPANS: dict[str, tuple[list[str], list[str] | None]] = {
    "chatml": ([CHATML_TALK], [CHATML_SYSTEM + CHATML_TALK]),
    "chatml-tools": ([CHATML_TALK], [CHATML_SYSTEM + CHATML_TALK]),
    "plain": (
        ["User: How many?\nAssistant:[[ She sold 72.<|endoftext|>]]\nUser: And in May?\n"
         "Assistant:[[ 24 clips.<|endoftext|>]]"],
        ["System: Be brief.\nUser: How many?\nAssistant:[[ She sold 72.<|endoftext|>]]\nUser: And in May?\n"
         "Assistant:[[ 24 clips.<|endoftext|>]]"],
    ),
    "llama3": (
        [f"<|begin_of_text|>{LLAMA}system<|end_header_id|>\n\n<|eot_id|>{LLAMA_TALK}"],
        [f"<|begin_of_text|>{LLAMA}system<|end_header_id|>\n\nBe brief.<|eot_id|>{LLAMA_TALK}"],
    ),
    "qwen25": ([f"{IM}system\nYou are a careful assistant.<|im_end|>\n{CHATML_TALK}"], [CHATML_SYSTEM + CHATML_TALK]),
    # Earlier answers lose the empty thought that the last one has: each answer has a branch.
    "qwen3": (QWEN3_TALK, [CHATML_SYSTEM + line for line in QWEN3_TALK]),
    "mistral_v1": (
        ["<s>[INST] How many? [/INST][[ She sold 72.</s>]][INST] And in May? [/INST][[ 24 clips.</s>]]"], None
    ),
    # The system message moves on to the last question.
    "mistral_v3": (
        ["<s>[INST] How many?[/INST][[ She sold 72.</s>]][INST] And in May?[/INST][[ 24 clips.</s>]]"],
        ["<s>[INST] Be brief.\n\nHow many?[/INST][[ She sold 72.</s>]]",
         "<s>[INST] How many?[/INST] She sold 72.</s>[INST] Be brief.\n\nAnd in May?[/INST][[ 24 clips.</s>]]"],
    ),
    "gemma": (
        ["<bos><start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n[[She sold 72.<end_of_turn>]]\n"
         "<start_of_turn>user\nAnd in May?<end_of_turn>\n<start_of_turn>model\n[[24 clips.<end_of_turn>]]"],
        None,
    ),
    "phi3": (
        ["<|user|>\nHow many?<|end|>\n<|assistant|>\n[[She sold 72.<|end|>]]\n"
         "<|user|>\nAnd in May?<|end|>\n<|assistant|>\n[[24 clips.<|end|>]]"],
        ["<|system|>\nBe brief.<|end|>\n<|user|>\nHow many?<|end|>\n<|assistant|>\n[[She sold 72.<|end|>]]\n"
         "<|user|>\nAnd in May?<|end|>\n<|assistant|>\n[[24 clips.<|end|>]]"],
    ),
    "phi4": (
        [f"{IM}user<|im_sep|>How many?<|im_end|>{IM}assistant<|im_sep|>[[She sold 72.<|im_end|>]]"
         f"{IM}user<|im_sep|>And in May?<|im_end|>{IM}assistant<|im_sep|>[[24 clips.<|im_end|>]]"],
        [f"{IM}system<|im_sep|>Be brief.<|im_end|>{IM}user<|im_sep|>How many?<|im_end|>{IM}assistant<|im_sep|>"
         f"[[She sold 72.<|im_end|>]]{IM}user<|im_sep|>And in May?<|im_end|>{IM}assistant<|im_sep|>"
         "[[24 clips.<|im_end|>]]"],
    ),
    "deepseek_r1": (r1_talk(""), r1_talk("Be brief.")),
    # Its marks leave out the empty thought.
    "marked": (
        [CHATML_TALK.replace("[[", NO_THOUGHT + "[[")],
        [CHATML_SYSTEM + CHATML_TALK.replace("[[", NO_THOUGHT + "[[")],
    ),
}  # fmt: skip

SCHEMA = (
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": '
    '{"type": "string"}}, "required": ["city"]}}}'
)
QWEN_TOOLS = f"# Tools\n\n<tools>\n{SCHEMA}\n</tools>\n\nCall one inside <tool_call></tool_call>.<|im_end|>\n"
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
QWEN_ASKS = f"{IM}user\nIs it warm in Oslo?<|im_end|>\n{IM}assistant\n"
QWEN_RESULT = f"\n{IM}user\n<tool_response>\n12\n</tool_response><|im_end|>\n{IM}assistant\n"
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>'
R1_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f'{{"city": "Oslo"}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{R1_END}'
)
# A question, a call, its result, an answer. The call carries loss, the result does not.
TOOL_SPANS = {
    "chatml-tools": [
        f"{IM}system\nFunctions you may call, as JSON schemas:\n{SCHEMA}\nTo call one, write "
        f'<tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call>.<|im_end|>\n{QWEN_ASKS}'
        '[[<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>]]\n'
        f"{IM}tool\n12<|im_end|>\n{IM}assistant\n[[No, 12 degrees.<|im_end|>]]"
    ],
    "qwen25": [
        f"{IM}system\nYou are a careful assistant.\n\n{QWEN_TOOLS}{QWEN_ASKS}[[{QWEN_CALL}<|im_end|>]]{QWEN_RESULT}"
        "[[No, 12 degrees.<|im_end|>]]"
    ],
    # Within one turn of the user thoughts stay, but an empty one is written for the last answer only.
    "qwen3": [
        f"{IM}system\n{QWEN_TOOLS}{QWEN_ASKS}[[{NO_THOUGHT}{QWEN_CALL}<|im_end|>]]",
        f"{IM}system\n{QWEN_TOOLS}{QWEN_ASKS}{QWEN_CALL}<|im_end|>{QWEN_RESULT}"
        f"[[{NO_THOUGHT}No, 12 degrees.<|im_end|>]]",
    ],
    "mistral_v3": [
        f"<s>[AVAILABLE_TOOLS] [{SCHEMA}][/AVAILABLE_TOOLS][INST] Is it warm in Oslo?[/INST][[{MISTRAL_CALL}]]"
        '[TOOL_RESULTS] {"content": 12, "call_id": "call00001"}[/TOOL_RESULTS][[ No, 12 degrees.</s>]]'
    ],
}


def tree_of(name: str, *messages: Message, tools: tuple[str, ...] = ()) -> Tree:
    return renderer_of(name).example(Example("d:1", messages, tools=tools))


def test_every_family_has_its_spans_written_out() -> None:
    assert SPANS.keys() == FAMILIES.keys()
    assert {name for name, family in FAMILIES.items() if family.tools} == {*TOOL_SPANS, "llama3", "deepseek_r1"}


@pytest.mark.parametrize("name", SPANS)
def test_two_turns(name: str) -> None:
    assert texts(renderer_of(name), tree_of(name, *TALK)) == SPANS[name][0]


@pytest.mark.parametrize("name", SPANS)
def test_two_turns_after_a_system_message(name: str) -> None:
    expected = SPANS[name][1]
    if expected is None:
        with pytest.raises(DataError, match=r"d:1: the chat template refuses .*system.*into the first user message"):
            tree_of(name, SYSTEM, *TALK)
    else:
        assert texts(renderer_of(name), tree_of(name, SYSTEM, *TALK)) == expected


@pytest.mark.parametrize("name", TOOL_SPANS)
def test_tools(name: str) -> None:
    assert texts(renderer_of(name), tree_of(name, *WITH_TOOLS, tools=(WEATHER,))) == TOOL_SPANS[name]


def test_tools_of_llama() -> None:
    renderer = renderer_of("llama3")
    tree = tree_of("llama3", *WITH_TOOLS, tools=(WEATHER,))
    trunk = renderer.decode(tree.trunk_ids)
    assert '"name": "weather",\n' in trunk
    assert trunk.endswith(f"Is it warm in Oslo?<|eot_id|>{LLAMA}assistant<|end_header_id|>\n\n")
    assert texts(renderer, tree)[0].removeprefix(trunk) == (
        '[[{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>]]'
        f'{LLAMA}ipython<|end_header_id|>\n\n"12"<|eot_id|>{LLAMA}assistant<|end_header_id|>\n\n'
        "[[No, 12 degrees.<|eot_id|>]]"
    )


def test_calls_of_deepseek_r1_are_text_and_its_schemas_are_missing() -> None:
    asked = f"{R1}<｜User｜>Is it warm in Oslo?<｜Assistant｜>"
    assert texts(renderer_of("deepseek_r1"), tree_of("deepseek_r1", *WITH_TOOLS)) == [
        f"{asked}<think>\n[[\n</think>\n\n{R1_CALL}]]",
        f"{asked}{R1_CALL}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>12<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        f"[[No, 12 degrees.{R1_END}]]",
    ]
    with pytest.raises(DataError, match=r"d:1: the row has tools, and the chat template leaves them out.*chatml-tools"):
        tree_of("deepseek_r1", *WITH_TOOLS, tools=(WEATHER,))


def test_a_system_message_and_tools_of_mistral_go_where_the_sampler_sees_them() -> None:
    """The finished conversation has lost the system message; the prompt of the first answer has it."""
    first, second = texts(renderer_of("mistral_v3"), tree_of("mistral_v3", SYSTEM, *WITH_TOOLS, tools=(WEATHER,)))
    assert first.endswith(f"[INST] Be brief.\n\nIs it warm in Oslo?[/INST][[{MISTRAL_CALL}]]")
    assert second.endswith("[/TOOL_RESULTS][[ No, 12 degrees.</s>]]") and "Be brief" not in second
    with pytest.raises(DataError, match=r"leaves out message 0 \(system\): 'Be brief.'"):
        renderer_of("mistral_v3").prompt_ids((SYSTEM, *WITH_TOOLS[:3]), "t:1", (WEATHER,))


def test_thinking_is_scored_and_gone_from_the_next_answer_s_context() -> None:
    asked = f"{IM}user\nHow many?<|im_end|>\n{IM}assistant\n"
    assert texts(renderer_of("qwen3"), tree_of("qwen3", U1, T1, U2, T2)) == [
        f"{asked}[[<think>\n48 + 24.\n</think>\n\nShe sold 72.<|im_end|>]]",
        f"{asked}She sold 72.<|im_end|>\n{IM}user\nAnd in May?<|im_end|>\n{IM}assistant\n"
        "[[<think>\nHalf of 48.\n</think>\n\n24 clips.<|im_end|>]]",
    ]
    asked = f"{R1}<｜User｜>How many?<｜Assistant｜>"
    assert texts(renderer_of("deepseek_r1"), tree_of("deepseek_r1", U1, T1, U2, T2)) == [
        f"{asked}<think>\n[[48 + 24.\n</think>\n\nShe sold 72.{R1_END}]]",
        f"{asked}She sold 72.{R1_END}<｜User｜>And in May?<｜Assistant｜><think>\n"
        f"[[Half of 48.\n</think>\n\n24 clips.{R1_END}]]",
    ]


def test_thinking_stays_within_a_turn_with_tools() -> None:
    """Qwen 3 keeps the thoughts since the user's last message, so call and answer are one text again."""
    thinks = (WITH_TOOLS[0], replace(CALLS, thinking="Ask."), RESULT, replace(ANSWERS, thinking="12 is cold."))
    (line,) = texts(renderer_of("qwen3"), tree_of("qwen3", *thinks, tools=(WEATHER,)))
    assert line == (
        f"{IM}system\n{QWEN_TOOLS}{QWEN_ASKS}[[<think>\nAsk.\n</think>\n\n{QWEN_CALL}<|im_end|>]]{QWEN_RESULT}"
        "[[<think>\n12 is cold.\n</think>\n\nNo, 12 degrees.<|im_end|>]]"
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.thinking])
def test_a_template_that_leaves_thinking_out_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=r"d:1: the chat template leaves out the thinking of an answer: '48 \+ 24.'"):
        tree_of(name, U1, T1)


@pytest.mark.parametrize("name", ["chatml", "plain", "mistral_v1", "gemma", "phi3", "phi4", "marked"])
def test_a_template_without_tools_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=r"d:1: the row has tools, and the chat template leaves them out"):
        tree_of(name, *WITH_TOOLS, tools=(WEATHER,))
    with pytest.raises(DataError, match=r"d:1: the chat template does not write the tool calls as the row has them"):
        tree_of(name, *WITH_TOOLS)


def test_a_call_with_text_that_the_template_drops_is_refused() -> None:
    with pytest.raises(DataError, match="alters or drops the assistant's text"):
        tree_of("mistral_v3", WITH_TOOLS[0], replace(CALLS, content="I will ask."), tools=(WEATHER,))
    two = replace(CALLS, tool_calls=CALLS.tool_calls * 2)
    with pytest.raises(DataError, match="one tool call at a time"):
        tree_of("llama3", WITH_TOOLS[0], two, tools=(WEATHER,))
    nameless = replace(CALLS, tool_calls=(ToolCall("weather", '{"city": "Oslo"}'),))
    with pytest.raises(DataError, match="ids must have nine characters"):
        tree_of("mistral_v3", WITH_TOOLS[0], nameless, tools=(WEATHER,))


def test_a_pair_whose_sides_are_rewritten_is_refused() -> None:
    assert len(renderer_of("qwen3").pair(Pair("p:1", (U1, A1, U2), (A2,), (A1,))).branches) == 2
    with pytest.raises(DataError, match=r"p:1: .*cannot be compared as one text.*End each side after its first answer"):
        renderer_of("qwen3").pair(Pair("p:1", (U1,), (A1, U2, A2), (A2,)))


# Any conversation. User texts hold a § and answers none, so that no token of a user's can hide in what is scored.

SAID = st.text(alphabet="ab \n\"'\\{}[]/é漢½.,:", min_size=1, max_size=12).filter(str.strip)
ASKED_TEXT = st.builds(lambda before, after: f"{before}§{after}", SAID, SAID)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[Message, ...]:
    family = FAMILIES[name]
    messages = [Message("system", draw(ASKED_TEXT))] if family.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        thinking = draw(st.one_of(st.just(""), SAID)) if family.thinking else ""
        messages += [Message("user", draw(ASKED_TEXT)), Message("assistant", draw(SAID), thinking=thinking)]
    return tuple(messages)


def expected_answer(name: str, message: Message) -> str:
    """What the model must write, by the family's rules."""
    frame = renderer_of(name).template.frame
    content, thought = message.content, message.thinking
    if FAMILIES[name].trims:
        content = content.strip()
    if name == "qwen3":
        content, thought = content.lstrip("\n"), thought.strip("\n")
        return f"<think>\n{thought}\n</think>\n\n{content}<|im_end|>"
    if name == "deepseek_r1":
        return f"{thought.strip()}\n</think>\n\n{content}{R1_END}"
    if name == "chatml-tools" and thought:
        return f"<think>\n{thought}\n</think>\n\n{content}<|im_end|>"
    lead = "" if name == "marked" else frame.lead
    return f"{lead}{content}{frame.end}"


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_conversation(name: str, data: st.DataObject) -> None:
    renderer = renderer_of(name)
    messages = data.draw(conversations(name))
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    tree = renderer.example(Example("d:1", messages))
    # Each answer is scored once, letter for letter, with the token that ends it; nothing of the user's is.
    assert scored_texts(renderer, tree) == [expected_answer(name, messages[i]) for i in answers]
    assert "§" not in "".join(scored_texts(renderer, tree))
    # Each answer is trained after the very tokens the sampler would see.
    seen = [
        (tree.trunk_ids + branch.token_ids)[: len(tree.trunk_ids) + i]
        for branch in tree.branches
        for i in range(len(branch.token_ids))
        if branch.scored[i] and not (i and branch.scored[i - 1])
    ]
    if name == "marked":  # there the model writes an empty thought by itself first
        thought = tuple(renderer.tokenizer(NO_THOUGHT, add_special_tokens=False).input_ids)
        assert seen == [renderer.prompt_ids(messages[:i]) + thought for i in answers]
    else:
        assert seen == [renderer.prompt_ids(messages[:i]) for i in answers]
    # The last answer alone is the same text, wherever its trunk ends.
    last = renderer.example(Example("d:1", messages), "last_turn")
    assert scored_texts(renderer, last) == [expected_answer(name, messages[-1])]
    assert texts(renderer, last)[0].endswith(f"[[{expected_answer(name, messages[-1])}]]")


ARGUMENTS = st.dictionaries(
    st.text(alphabet="abc_", min_size=1, max_size=4),
    st.one_of(SAID, st.integers(-99, 99), st.booleans(), st.lists(SAID, max_size=2)),
    max_size=3,
)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
@settings(max_examples=25, deadline=None)
@given(arguments=ARGUMENTS, result=SAID)
def test_any_call(name: str, arguments: dict[str, object], result: str) -> None:
    """What is scored of a call holds its arguments as JSON, and nothing of the tool's result."""
    renderer = renderer_of(name)
    call = ToolCall("weather", json.dumps(arguments, ensure_ascii=False), id="call00001")
    talk = (WITH_TOOLS[0], replace(CALLS, tool_calls=(call,)), replace(RESULT, content=f"§{result}"), ANSWERS)
    tools = () if name == "deepseek_r1" else (WEATHER,)  # which writes calls, but no schemas
    scored = scored_texts(renderer, renderer.example(Example("d:1", talk, tools=tools)))
    assert len(scored) == 2 and "§" not in "".join(scored)
    assert scored[0].endswith(renderer.template.end)
    after_name = scored[0].partition("weather")[2]
    assert json.JSONDecoder().raw_decode(after_name[after_name.index("{") :])[0] == arguments
    assert scored[1].endswith(f"No, 12 degrees.{renderer.template.end}")


def test_a_template_with_a_clock_writes_the_same_date_every_day() -> None:
    """Llama 3's templates ask for today's date; rows prepared on two days must be the same rows."""
    chatml = (ASSETS / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    dated = "{{- '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' -}}" + chatml
    template = ChatTemplate(byte_tokenizer(), dated)
    assert "Today is 26 Jul 2024<|im_end|>" in template.render((Message("user", "Hi"),), True)
    assert "it always writes 26 Jul 2024" in template.notes[0]
    assert ChatTemplate(byte_tokenizer(), chatml).notes == ()
