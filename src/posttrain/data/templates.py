"""A tokenizer's chat template, probed: what it writes around an answer, and the token that ends one.

Spans come from incremental rendering: render the conversation up to an answer, render it again with the answer, and the
difference is the answer. No generation markers, no searching for marker tokens, so every Jinja template works that
keeps what it was given; one that does not is refused here, with what it was given and what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from posttrain.errors import DataError
from posttrain.records import Message

USE_BUILTIN = (
    "Set chat_template: builtin:templates/plain.jinja (any tokenizer) or builtin:templates/chatml.jinja "
    "(needs <|im_end|> as a token)."
)
PROBE_QUESTION = Message("user", "Is this a probe?")
PROBE_ANSWER = Message("assistant", "Yes, this is one.")
RENDERS_REMEMBERED = 8192


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn in rendered text: the text before it, and what the model must write, end token included."""

    before: str
    answer: str

    @property
    def closed(self) -> str:
        return self.before + self.answer


class ChatTemplate:
    """Renders conversations with the tokenizer's own Jinja. `lead` and `end` are what it writes around an answer."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.source = template_text(tokenizer, template)
        self._remembered = lru_cache(RENDERS_REMEMBERED)(self._apply)
        self._control = _control_pattern(tokenizer)
        self.lead, self.end, self.end_id = self._probe()

    def render(self, messages: tuple[Message, ...], generation_prompt: bool, where: str = "") -> str:
        """The conversation as text; with `generation_prompt`, up to where the model begins to answer."""
        try:
            return self._remembered(messages, generation_prompt)
        except TemplateSyntaxError as fault:
            raise DataError(
                f"the chat template is not Jinja: {fault.message} (line {fault.lineno}).", remedy=USE_BUILTIN
            ) from fault
        except (TemplateError, TypeError) as fault:
            roles = [message.role for message in messages]
            remedy = f"Change the order of the roles, or the template. {USE_BUILTIN}"
            if "system" in roles:
                remedy = f"If it takes no system message, put that text into the first user message. {USE_BUILTIN}"
            raise DataError(
                f"the chat template refuses the roles {', '.join(roles)}: {fault}.", where=where, remedy=remedy
            ) from fault

    def _apply(self, messages: tuple[Message, ...], generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    def turn(self, messages: tuple[Message, ...], index: int, where: str) -> Turn:
        """The assistant turn at `index`, which must stand in the rendered text exactly as the message has it."""
        message = messages[index]
        before = self.render(messages[:index], True, where)
        closed = self.render(messages[: index + 1], False, where)
        if not closed.startswith(before):
            raise DataError(
                "the chat template's generation prompt is not how it renders a finished answer: "
                f"it prompts with …{before[-60:]!r} but renders …{closed[len(before) - 60 :][:120]!r}.",
                where=where,
                remedy=f"Training would not match sampling. {USE_BUILTIN}",
            )
        rest = closed[len(before) :]
        # A template may trim the outer white space of a message; within the text it must change nothing.
        for content in (message.content, message.content.strip()):
            for lead in (self.lead, ""):
                written = lead + content + self.end
                if rest.startswith(written):
                    return Turn(before, written)
        raise DataError(
            f"the chat template alters or drops the assistant's text. Message: {message.content!r:.200}. "
            f"Rendered: {rest!r:.200}.",
            where=where,
            remedy=f"The model would learn another text than the data holds. {USE_BUILTIN}",
        )

    def refuse_control_tokens(self, messages: tuple[Message, ...], where: str) -> None:
        """A message that spells a control token would end its own turn, or open another."""
        for i, message in enumerate(messages):
            found = self._control.search(message.content) if self._control else None
            if found:
                raise DataError(
                    f"message {i} ({message.role}) contains {found.group()!r}, a control token of this tokenizer.",
                    where=where,
                    remedy="It would be read as the token, not as text: rewrite or remove it.",
                )

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints render and tokenise turns alike."""
        special = (self._tokenizer.bos_token, self._tokenizer.eos_token, self.end, self.end_id)
        return hashlib.sha256(json.dumps([self.source, special]).encode()).hexdigest()

    def _probe(self) -> tuple[str, str, int]:
        """(text before an answer, text after it up to and with the end token, the end token's id)."""
        before = self.render((PROBE_QUESTION,), True)
        closed = self.render((PROBE_QUESTION, PROBE_ANSWER), False)
        at = closed.find(PROBE_ANSWER.content, len(before))
        if not closed.startswith(before) or at < 0:
            raise DataError(
                "the chat template does not render an answer after its own generation prompt. "
                f"Prompt: {before!r:.200}. With the answer {PROBE_ANSWER.content!r}: {closed!r:.300}.",
                remedy=USE_BUILTIN,
            )
        tail = closed[at + len(PROBE_ANSWER.content) :]
        whole_tokens = {int(i): str(token) for i, token in self._tokenizer.added_tokens_decoder.items()}
        for token_id in self._tokenizer(tail, add_special_tokens=False).input_ids:
            if token_id in whole_tokens:
                end = tail[: tail.index(whole_tokens[token_id])] + whole_tokens[token_id]
                if not end.removesuffix(whole_tokens[token_id]).strip():
                    return closed[len(before) : at], end, token_id
                break
        raise DataError(
            f"no token ends an answer: after the assistant's text the chat template writes {tail!r}, which does not "
            "begin with a special or added token of this tokenizer. The model could never learn to stop.",
            remedy=USE_BUILTIN,
        )


def template_text(tokenizer: Any, template: str | None) -> str:
    """The template given as Jinja text, or the tokenizer's own."""
    if template is not None:
        return template
    if not isinstance(tokenizer.chat_template, str):
        raise DataError("the tokenizer has no chat template.", where=tokenizer.name_or_path, remedy=USE_BUILTIN)
    return tokenizer.chat_template


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None
