"""A tokenizer's chat template, probed: what it writes around an answer, and the token that ends one.

No answer is looked for by searching for marker tokens: a conversation is rendered with and without it (`turns.py`), so
every Jinja template works that keeps what it was given. One that does not is refused, with what it was given and what
it wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from posttrain.errors import DataError
from posttrain.records import Message

USE_BUILTIN = (
    "Set chat_template: builtin:templates/plain.jinja (any tokenizer), or builtin:templates/chatml.jinja or "
    "chatml-tools.jinja (both need <|im_end|> as a token)."
)
USE_TOOLS = "Set chat_template: builtin:templates/chatml-tools.jinja, which writes tools, tool calls and thinking."
PROBE_QUESTION = Message("user", "Is this a probe?")
PROBE_ANSWER = Message("assistant", "Yes, this is one.")
PROBE_THINKING = Message("assistant", PROBE_ANSWER.content, thinking="Let me look at it.")

PROBE_TOOL = json.dumps(
    {
        "type": "function",
        "function": {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
    }
)

# As transformers looks for them.
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Thinking that the generation prompt opens and finished answers do not show (DeepSeek-R1), and how models close it.
OPENED = re.compile(r"<think>\s*\Z")
CLOSE = "\n</think>\n\n"

# Templates may write today's date (Llama 3). What a model is trained on must not depend on the day, nor differ from
# what it is asked with: the clock they see stands still. Llama 3's own templates fall back on this day.
CLOCK = "strftime_now"
TODAY = date(2024, 7, 26)

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an answer to its generation prompt."""

    lead: str  # before the text of an answer without thinking
    end: str  # after the text, up to and with the end token
    end_id: int
    tail: str  # after the end token; nobody samples it
    thinking: tuple[str, str] | None  # before the thinking, and between it and the text; None: it leaves thinking out
    close: str  # ends thinking that the generation prompt opens and a finished answer does not show; "": it opens none


def _with_stopped_clock(source: str) -> str:
    """The template with a macro before it that hides the clock it would ask."""
    if CLOCK not in source:
        return source
    forms = {form: TODAY.strftime(form) for _, form in re.findall(CLOCK + r"\(\s*(['\"])(.+?)\1", source)}
    known = json.dumps(forms)
    macro = f"{{%- macro {CLOCK}(form) -%}}{{{{- {known}.get(form, '{TODAY.isoformat()}') -}}}}{{%- endmacro %}}"
    # A block swallows the line end behind it.
    return macro + ("\n" if source.startswith("\n") else "") + source


class ChatTemplate:
    """Renders conversations with the tokenizer's own Jinja. `has_marks`: it says itself which text is an answer."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.source = template_text(tokenizer, template)
        self._rendered_source = _with_stopped_clock(self.source)
        self.has_marks = MARKS.search(self.source) is not None
        self._control = _control_pattern(tokenizer)
        self._calls_as_text = False
        self.frame = self._probe()

    @property
    def end(self) -> str:
        return self.frame.end

    @cached_property
    def writes_tools(self) -> bool:
        asked = (PROBE_QUESTION,)
        return self.render(asked, True, (PROBE_TOOL,)) != self.render(asked, True)

    def render(
        self, messages: Sequence[Message], generation_prompt: bool, tools: Sequence[str] = (), where: str = ""
    ) -> str:
        """The conversation as text; with `generation_prompt`, up to where the model begins to answer."""
        return self._rendered(messages, tools, where, generation_prompt, marked=False)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[str] = (), where: str = ""
    ) -> tuple[str, tuple[Span, ...]]:
        """The finished conversation, and the characters between {% generation %} and {% endgeneration %}."""
        return self._rendered(messages, tools, where, False, marked=self.has_marks)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[str], where: str, generation_prompt: bool, *, marked: bool
    ) -> tuple[str, tuple[Span, ...]]:
        try:
            try:
                return self._apply(messages, tools, generation_prompt, marked)
            except TypeError:
                # Templates disagree whether a call's arguments are an object or JSON text.
                if self._calls_as_text or not any(message.tool_calls for message in messages):
                    raise
                self._calls_as_text = True
                return self._apply(messages, tools, generation_prompt, marked)
        except TemplateSyntaxError as fault:
            raise DataError(
                f"the chat template is not Jinja: {fault.message} (line {fault.lineno}).", remedy=USE_BUILTIN
            ) from fault
        except (TemplateError, TypeError) as fault:
            raise _refused(messages, fault, where) from fault

    def _apply(
        self, messages: Sequence[Message], tools: Sequence[str], generation_prompt: bool, marked: bool
    ) -> tuple[str, tuple[Span, ...]]:
        written = [self._as_dict(message) for message in messages]
        schemas = [json.loads(tool) for tool in tools] or None
        if not marked:
            text = self._tokenizer.apply_chat_template(
                written,
                tools=schemas,
                chat_template=self._rendered_source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
            return text, ()
        # What apply_chat_template calls, which gives characters where that gives tokens: a token that holds the end of
        # a question and the beginning of its answer cannot be marked rightly.
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [written],
            tools=schemas,
            chat_template=self._rendered_source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generation_prompt,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], tuple(spans[0])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must be told about this template."""
        if CLOCK not in self.source:
            return ()
        return (f"the chat template writes today's date; it always writes {TODAY:%d %b %Y}, in training and after it",)

    def _as_dict(self, message: Message) -> dict[str, Any]:
        written = message.as_dict()
        if self._calls_as_text and message.tool_calls:
            for call, said in zip(written["tool_calls"], message.tool_calls, strict=True):
                call["function"]["arguments"] = said.arguments
        return written

    def refuse_control_tokens(self, messages: Sequence[Message], tools: Sequence[str], where: str) -> None:
        """A text that spells a control token would end its own turn, or open another."""
        if self._control is None:
            return
        for i, message in enumerate(messages):
            calls = (part for call in message.tool_calls for part in (call.name, call.arguments))
            for text in (message.content, message.thinking, *calls):
                if text and (found := self._control.search(text)):
                    raise _control_token(f"message {i} ({message.role})", found.group(), where)
        for i, tool in enumerate(tools):
            if found := self._control.search(tool):
                raise _control_token(f"tool {i}", found.group(), where)

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints render and tokenise turns alike."""
        special = (self._tokenizer.bos_token, self._tokenizer.eos_token, self.frame.end, self.frame.end_id)
        return hashlib.sha256(json.dumps([self.source, special]).encode()).hexdigest()

    def _probe(self) -> Frame:
        prompt = self.render((PROBE_QUESTION,), True)
        closed = self.render((PROBE_QUESTION, PROBE_ANSWER), False)
        opened = OPENED.search(prompt)
        shows = closed.startswith(prompt)
        context = prompt if shows or opened is None else prompt[: opened.start()]
        at = closed.find(PROBE_ANSWER.content, len(context))
        if not closed.startswith(context) or at < 0:
            raise DataError(
                "the chat template does not render an answer after its own generation prompt. "
                f"Prompt: {prompt!r:.200}. With the answer {PROBE_ANSWER.content!r}: {closed!r:.300}.",
                remedy=USE_BUILTIN,
            )
        end, end_id, tail = self._end(closed[at + len(PROBE_ANSWER.content) :])
        thinking = self._thinking(prompt)
        return Frame(closed[len(context) : at], end, end_id, tail, thinking, "" if shows else CLOSE)

    def _thinking(self, prompt: str) -> tuple[str, str] | None:
        closed = self.render((PROBE_QUESTION, PROBE_THINKING), False)
        at = closed.find(PROBE_THINKING.thinking, len(prompt))
        text = closed.find(PROBE_THINKING.content, at + 1)
        if not closed.startswith(prompt) or at < 0 or text < 0:
            return None
        return closed[len(prompt) : at], closed[at + len(PROBE_THINKING.thinking) : text]

    def _end(self, tail: str) -> tuple[str, int, str]:
        """(text after an answer up to and with the end token, the end token's id, what follows)."""
        whole_tokens = {int(i): str(token) for i, token in self._tokenizer.added_tokens_decoder.items()}
        for token_id in self._tokenizer(tail, add_special_tokens=False).input_ids:
            if token_id in whole_tokens:
                token = whole_tokens[token_id]
                before, _, after = tail.partition(token)
                if not before.strip():
                    return before + token, token_id, after
                break
        raise DataError(
            f"no token ends an answer: after the assistant's text the chat template writes {tail!r}, which does not "
            "begin with a special or added token of this tokenizer. The model could never learn to stop.",
            remedy=USE_BUILTIN,
        )


def template_text(tokenizer: Any, template: str | None) -> str:
    """The template given as Jinja text, or the tokenizer's own; of several, the one it calls default."""
    if template is not None:
        return template
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not isinstance(own, str):
        raise DataError("the tokenizer has no chat template.", where=tokenizer.name_or_path, remedy=USE_BUILTIN)
    return own


def _refused(messages: Sequence[Message], fault: Exception, where: str) -> DataError:
    roles = [message.role for message in messages]
    remedy = f"Change the order of the roles, or the template. {USE_BUILTIN}"
    if "system" in roles:
        remedy = f"If it takes no system message, put that text into the first user message. {USE_BUILTIN}"
    if "tool" in roles or any(message.tool_calls for message in messages):
        remedy = f"Change what it objects to, or the template. {USE_TOOLS}"
    return DataError(
        f"the chat template refuses this conversation ({', '.join(roles)}): {fault}.", where=where, remedy=remedy
    )


def _control_token(holder: str, token: str, where: str) -> DataError:
    return DataError(
        f"{holder} contains {token!r}, a control token of this tokenizer.",
        where=where,
        remedy="It would be read as the token, not as text: rewrite or remove it.",
    )


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
