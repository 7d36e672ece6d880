"""`posttrain chat`: a conversation with a model. Answers go to stdout, everything about them to stderr, so that a
conversation can be driven by a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from posttrain.cli.common import (
    HomeOption,
    MaxNewTokensOption,
    ModelArgument,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    command_line,
    home_folder,
    print_next,
)
from posttrain.cli.open_model import Asked, OpenModel, locate, open_model
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.records import Completion, Message

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves."


def chat(
    model: ModelArgument,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = 0,
    home: HomeOption = None,
) -> None:
    """Talk with a model. Lines piped in are answered one by one."""
    opened = open_model(locate(model, home_folder(home)))
    conversation = Conversation(opened, Asked(temperature, top_p, top_k, max_new_tokens, seed))
    typer.echo(f"{opened.label}. {HELP}", err=True)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            typer.echo("forgotten", err=True)
        elif line.startswith("/") and " " not in line:
            typer.echo(f"{line} is no command. {HELP}", err=True)
        elif line:
            _say(conversation, line)
    print_next(command_line("generate", model, "--prompt", "…", home=home), err=True)


def _lines() -> Iterator[str]:
    """What the person types, without surrounding space, until Ctrl-D, Ctrl-C or the end of the pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):  # some builds of Python come without
        import readline  # noqa: F401  (input() then knows arrow keys and earlier lines)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return


def _say(conversation: Conversation, text: str) -> None:
    """One turn. At a terminal a question that cannot be asked, or Ctrl-C, costs that question and no more."""
    try:
        completion = conversation.ask(text)
    except (DataError, KeyboardInterrupt) as problem:
        if not sys.stdin.isatty():
            raise
        typer.echo("stopped" if isinstance(problem, KeyboardInterrupt) else str(problem), err=True)
        return
    typer.echo(completion.text)
    if completion.status != "finished":
        typer.echo(f"[{completion.status.value} after {len(completion.token_ids)} tokens]", err=True)


class Conversation:
    """The messages so far. The same seed and the same questions give the same answers."""

    def __init__(self, opened: OpenModel, asked: Asked) -> None:
        self._opened, self._asked = opened, asked
        self._messages: tuple[Message, ...] = ()

    def reset(self) -> None:
        self._messages = ()

    def ask(self, text: str) -> Completion:
        from posttrain.records import Message, Request, Status
        from posttrain.seeds import derive_seed

        messages = (*self._messages, Message("user", text))
        ids = self._opened.writer.prompt_ids(messages)
        seed = derive_seed(self._asked.seed, "chat", len(messages))
        sampling = self._opened.sampling(self._asked, len(ids))
        completion = self._opened.engine.generate([Request("turn", ids, (seed,))], sampling)[0][0]
        if completion.status is Status.FAILED:
            raise DataError(f"no answer: {completion.detail}.", remedy="/reset begins anew.")
        self._messages = (*messages, Message("assistant", self._remembered(completion)))
        return completion

    def _remembered(self, completion: Completion) -> str:
        """The answer as the next prompt repeats it: control tokens a weak model wrote would end its turn early."""
        known = self._opened.policy.tokenizer.added_tokens_decoder
        kept = [token for token in completion.token_ids if not (token in known and known[token].special)]
        return self._opened.writer.answer_text(kept)
