"""Where an answer stands in rendered text: rendered up to it, and with it; the difference is what the model writes.

The text before an answer is always the sampler's prompt, also where the template renders the finished conversation
otherwise. What it writes for the answer must hold thinking, text and tool calls of the message, and nothing else of
its own but the frame that was probed. Where the template marks answers with {% generation %}, its marks say which of
that text carries loss; they must hold the whole message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.templates import OPENED, PROBE_ANSWER, USE_BUILTIN, USE_TOOLS, ChatTemplate, Span
from posttrain.errors import DataError
from posttrain.records import Message, ToolCall


@dataclass(frozen=True, slots=True)
class Turn:
    """`before` is the sampler's prompt; the model writes `unmarked` and then `answer`, end token included. Only
    `answer` carries loss: the template's marks leave out `unmarked`, which is empty where there are no marks."""

    before: str
    unmarked: str
    answer: str

    @property
    def closed(self) -> str:
        return self.before + self.unmarked + self.answer


@dataclass(frozen=True, slots=True)
class Body:
    """Offsets in what a template writes for an answer: where the message itself begins, and where it ends."""

    begin: int
    end: int


class Talk:
    """One row's conversation in its template's words. Each state of it is rendered once."""

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[str] = (), where: str = ""
    ) -> None:
        self.messages, self.tools, self.where = tuple(messages), tuple(tools), where
        self._template = template
        self._prompts: dict[int, str] = {}
        self._turns: dict[int, Turn] = {}
        template.refuse_control_tokens(self.messages, self.tools, where)
        if self.tools and not template.writes_tools:
            raise DataError("the row has tools, and the chat template leaves them out.", where=where, remedy=USE_TOOLS)

    def continued(self, messages: Sequence[Message]) -> Talk:
        """Another conversation that begins with this one, and what is known of it."""
        longer = Talk(self._template, (*self.messages, *messages), self.tools, self.where)
        longer._prompts = dict(self._prompts)
        longer._turns = dict(self._turns)
        return longer

    def prompt(self, n: int) -> str:
        """The first `n` messages, up to where the model begins to answer."""
        if n not in self._prompts:
            self._prompts[n] = self._template.render(self.messages[:n], True, self.tools, self.where)
        return self._prompts[n]

    def turn(self, index: int) -> Turn:
        """The assistant turn at `index`, which must stand in the rendered text exactly as the message has it."""
        if index not in self._turns:
            self._turns[index] = self._turn(index)
        return self._turns[index]

    def turn_or_none(self, index: int) -> Turn | None:
        """The same for a turn that is only context: the template may write of it what it likes."""
        try:
            return self.turn(index)
        except DataError:
            return None

    def refuse_lost(self, prompts: Sequence[str]) -> None:
        """Every message that is no answer must be in one of the prompts that the model will see."""
        for i, message in enumerate(self.messages):
            said = message.content.strip()
            if message.role != "assistant" and said and not any(_holds(prompt, said) for prompt in prompts):
                raise DataError(
                    f"the chat template leaves out message {i} ({message.role}): {said!r:.120} is not in what the "
                    "model would see.",
                    where=self.where,
                    remedy=f"Put its text into another message, or change the template. {USE_BUILTIN}",
                )

    def _turn(self, index: int) -> Turn:
        message, frame = self.messages[index], self._template.frame
        before = self.prompt(index)
        closed, spans = self._template.render_marked(self.messages[: index + 1], self.tools, self.where)
        begin, close = len(before), ""
        if not closed.startswith(before):
            begin = self._context_end(index, closed)
            close = frame.close if OPENED.search(before) else ""
        rest = closed[begin:]
        body = self._body(rest, message, thinks=not close)
        stop = body.end + len(frame.end)
        unmarked = 0
        if self._template.has_marks:
            unmarked = self._unmarked([(a - begin, b - begin) for a, b in spans if b > begin], body, rest)
        answer = rest[unmarked:stop]
        return Turn(before, rest[:unmarked], message.thinking.strip() + close + answer if close else answer)

    def _context_end(self, index: int, closed: str) -> int:
        """Where the answer begins in a finished conversation whose template writes what was before it otherwise than
        in a prompt, e.g. without the system message. An answer of which all is known shows it."""
        frame = self._template.frame
        known = self._template.render((*self.messages[:index], PROBE_ANSWER), False, self.tools, self.where)
        context = known.removesuffix(frame.lead + PROBE_ANSWER.content + frame.end + frame.tail)
        if context == known or not closed.startswith(context):
            before = self.prompt(index)
            raise DataError(
                "the chat template's generation prompt is not how it renders a finished answer: "
                f"it prompts with …{before[-60:]!r} but renders …{closed[max(0, len(before) - 60) :][:120]!r}.",
                where=self.where,
                remedy=f"Training would not match sampling. {USE_BUILTIN}",
            )
        return len(context)

    def _body(self, rest: str, message: Message, *, thinks: bool) -> Body:
        frame = self._template.frame
        heads: Iterable[tuple[str, str]] = ((frame.lead, ""), ("", ""))
        if message.thinking and thinks:
            if frame.thinking is None:
                raise DataError(
                    f"the chat template leaves out the thinking of an answer: {message.thinking!r:.120}.",
                    where=self.where,
                    remedy=f"Remove `thinking` from the row, or use a template that writes it. {USE_TOOLS}",
                )
            opening, between = frame.thinking
            heads = [(opening, thought + between) for thought in _trimmed(message.thinking)]
        for lead, thought in heads:
            for content in _trimmed(message.content):
                if not rest.startswith(lead + thought + content):
                    continue
                end = len(lead) + len(thought) + len(content)
                if message.tool_calls:
                    calls_end = rest.find(frame.end, end)
                    if calls_end < 0 or not _writes_calls(rest[end:calls_end], message.tool_calls):
                        raise self._without_calls(message, rest)
                    return Body(len(lead), calls_end)
                if rest.startswith(frame.end, end):
                    return Body(len(lead), end)
        raise DataError(
            f"the chat template alters or drops the assistant's text. Message: {message.content!r:.200}. "
            f"Rendered: {rest!r:.200}.",
            where=self.where,
            remedy=f"The model would learn another text than the data holds. {USE_BUILTIN}",
        )

    def _without_calls(self, message: Message, rest: str) -> DataError:
        called = ", ".join(f"{call.name}({call.arguments})" for call in message.tool_calls)
        return DataError(
            f"the chat template does not write the tool calls as the row has them. Calls: {called:.200}. "
            f"Rendered: {rest!r:.200}.",
            where=self.where,
            remedy=USE_TOOLS,
        )

    def _unmarked(self, spans: Sequence[Span], body: Body, rest: str) -> int:
        """How much of the answer the template leaves unmarked, from its beginning."""
        joined: list[Span] = []
        for begin, end in spans:
            if joined and begin <= joined[-1][1]:
                begin = joined.pop()[0]
            joined.append((begin, end))
        for begin, end in joined:
            if 0 <= begin <= body.begin and end >= body.end:
                return begin
        marked = "".join(f"[[{rest[max(0, a) : b]}]]" for a, b in joined) or "nothing"
        reason = "mark part of its generation prompt" if joined and joined[0][0] < 0 else "do not hold the whole answer"
        raise DataError(
            f"the chat template's {{% generation %}} marks {reason}: of {rest!r:.160} they mark {marked:.160}.",
            where=self.where,
            remedy="Let them begin where the generation prompt ends and hold thinking, text and tool calls; or remove "
            "them, and answers are found without.",
        )


def _trimmed(text: str) -> Iterator[str]:
    """A template may trim the outer white space of a text; within it must change nothing."""
    yield text
    if text[:1].isspace() or text[-1:].isspace():
        yield from (text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"))


def _holds(prompt: str, said: str) -> bool:
    """Some templates write tool results as JSON strings."""
    return said in prompt or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in prompt for ascii in (False, True))


def _writes_calls(text: str, calls: Sequence[ToolCall]) -> bool:
    """Whether each call's name and arguments stand in `text`, in order."""
    at = 0
    for call in calls:
        at = text.find(call.name, at)
        if at < 0:
            return False
        at = _after_arguments(text, at + len(call.name), json.loads(call.arguments))
        if at < 0:
            return False
    return True


def _after_arguments(text: str, at: int, arguments: Any) -> int:
    """The place after the arguments, written as JSON, or as keys and values one by one; -1: they are not there."""
    wanted = json.dumps(arguments, sort_keys=True)
    decoder = json.JSONDecoder()
    begin = text.find("{", at)
    while begin >= 0:
        try:
            value, end = decoder.raw_decode(text, begin)
        except ValueError:
            end = -1
        if end >= 0 and json.dumps(value, sort_keys=True) == wanted:
            return end
        begin = text.find("{", begin + 1)
    if not isinstance(arguments, dict):
        return -1
    for key, value in arguments.items():
        for part in (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
            found = text.find(part, at)
            if found < 0:
                return -1
            at = found + len(part)
    return at
