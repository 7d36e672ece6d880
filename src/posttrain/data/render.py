"""The one way from text to token ids, with the marks that say which tokens carry loss.

Rendered text is cut where an answer begins and where its end token stands, and each piece is tokenised by itself. The
sampler's prompt is cut at the same places, so what is trained on is, token for token, what will be sampled:

    <user>Hi<end>\\n<assistant>\\n | Hello.<end> | \\n<user>More<end>\\n<assistant>\\n | Sure.<end>
    trunk, no loss                | scored       | no loss                           | scored

Text a template writes after the last end token is left out; nobody samples it.

A template may write an earlier answer otherwise once the conversation goes on, e.g. without its thinking. Then the
next answer is trained in the context in which it will be sampled, on a branch of its own: each answer carries loss
once, and what the contexts have in common is the trunk.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from posttrain.data.templates import ChatTemplate
from posttrain.data.turns import Talk, Turn
from posttrain.errors import DataError
from posttrain.records import Branch, Example, Message, Pair, Rated, Stepwise, Tree

LossOn = Literal["assistant", "last_turn", "completion", "all"]
LOSS_ON: tuple[LossOn, ...] = get_args(LossOn)

STEP_END = "\n"  # between the steps of an answer; part of the step before it

Ids = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised by itself."""

    text: str
    scored: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A context, and the answers that continue it."""

    context: tuple[Piece, ...]
    answers: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A tree before tokenising. With `scores_context` it has one line, all of which carries loss but the first token,
    which nothing predicts. With `ends_only` only the last token of each scored piece is marked."""

    id: str
    lines: tuple[Line, ...]
    scores_context: bool = False
    ends_only: bool = False

    @property
    def pieces(self) -> Iterable[Piece]:
        for line in self.lines:
            yield from line.context
            yield from line.answers


@dataclass(frozen=True, slots=True)
class Marks:
    """What carries loss: the answers at these indices, and perhaps what is before the first or between them."""

    answers: frozenset[int]
    before: bool = False
    between: bool = False


class Renderer:
    """Tokenises conversations and plain text. `template` is Jinja text; None: the tokenizer's own.

    The tokenizer is given the template that is used, so saving the tokenizer saves the template it was trained with.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template)
        tokenizer.chat_template = self.template.source
        self._direct = _direct(tokenizer)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer, then the tokenizer's end of text where that is another one."""
        end, eos = self.template.frame.end_id, self.tokenizer.eos_token_id
        return (end,) if eos in (None, end) else (end, eos)

    @property
    def fingerprint(self) -> str:
        return self.template.fingerprint

    def prompt_ids(self, messages: Sequence[Message], where: str = "", tools: Sequence[str] = ()) -> tuple[int, ...]:
        """What the sampler sees: the conversation, and the opening of an answer."""
        talk = Talk(self.template, messages, tools, where)
        pieces = _context(talk, len(talk.messages))
        talk.refuse_lost([talk.prompt(len(talk.messages))])
        return tuple(token for ids in self._encode([piece.text for piece in pieces]) for token in ids)

    def example(self, example: Example, loss_on: LossOn = "assistant") -> Tree:
        return self.examples([example], loss_on)[0]

    def examples(self, examples: Iterable[Example], loss_on: LossOn = "assistant") -> list[Tree]:
        """One tree a row: what is before the first scored answer is trunk, the rest its one branch, or several where
        the template rewrites earlier answers."""
        return self._trees([self._plan_example(example, loss_on) for example in examples])

    def pair(self, pair: Pair) -> Tree:
        return self.pairs([pair])[0]

    def pairs(self, pairs: Iterable[Pair]) -> list[Tree]:
        """One tree a pair: the prompt is trunk, the branches are chosen and rejected, in this order."""
        return self._trees([self._plan_sides(p.id, p.prompt, (p.chosen, p.rejected), p.tools) for p in pairs])

    def rated(self, rows: Iterable[Rated]) -> list[Tree]:
        """One tree a row: the prompt is trunk, the answer its one branch."""
        return self._trees([self._plan_sides(r.id, r.prompt, (r.completion,), r.tools) for r in rows])

    def stepwise(self, rows: Iterable[Stepwise]) -> list[Tree]:
        """One tree a row: the answer is its one branch, a line a step, and the last token of each step is marked."""
        return self._trees([self._plan_stepwise(row) for row in rows])

    def decode(self, ids: Sequence[int]) -> str:
        """All tokens as text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_text(self, ids: Sequence[int]) -> str:
        """A sampled answer as its message would hold it: without the stop token and what the template puts before."""
        answer = ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids
        frame = self.template.frame
        return self.decode(answer).removeprefix(frame.close + frame.lead)

    def _plan_example(self, example: Example, loss_on: LossOn) -> Plan:
        if example.text is not None:
            return self._plan_text(example.id, example.text, loss_on)
        marks = _marks(example, loss_on)
        if not marks.answers:
            raise _nothing_scored(example.id)
        talk = Talk(self.template, example.messages, example.tools, example.id)
        lines = _lines(talk, marks)
        talk.refuse_lost([talk.prompt(i) for i in sorted(marks.answers, reverse=True)])
        if len(lines) > 1 and (marks.before or marks.between):
            raise DataError(
                f"loss_on: {loss_on} needs one text, and the chat template writes earlier answers differently once "
                "the conversation goes on.",
                where=example.id,
                remedy="Set loss_on: assistant, which trains each answer in its own context.",
            )
        return Plan(example.id, lines, scores_context=marks.before)

    def _plan_text(self, row_id: str, text: str, loss_on: LossOn) -> Plan:
        """Plain text hangs on a document separator, so that its first token has something to be predicted from.

        Control tokens spelled in it are read as such: documents may be joined by them.
        """
        if loss_on == "completion":
            raise _no_completion(row_id, "plain text")
        eos = self.tokenizer.eos_token
        if eos is None:
            raise DataError("the tokenizer has no end-of-text token to close plain text with.", where=row_id)
        context = (Piece(_separator(self.tokenizer)),)
        return Plan(row_id, (Line(context, (Piece(text, scored=True), Piece(eos, scored=True))),))

    def _plan_sides(
        self, row_id: str, prompt: tuple[Message, ...], sides: Sequence[tuple[Message, ...]], tools: tuple[str, ...]
    ) -> Plan:
        """A prompt, and continuations of it that each begin with an answer."""
        begun = Talk(self.template, prompt, tools, row_id)
        context = _context(begun, len(prompt))
        lines = []
        for side in sides:
            if not side or side[0].role != "assistant":
                raise DataError("what continues the prompt must begin with an assistant message.", where=row_id)
            talk = begun.continued(side)
            answers = [i for i in range(len(prompt), len(talk.messages)) if talk.messages[i].role == "assistant"]
            found = _lines(talk, Marks(frozenset(answers)))
            if len(found) > 1:
                raise DataError(
                    "the chat template writes earlier answers differently once the conversation goes on, so the turns "
                    "of one side cannot be compared as one text.",
                    where=row_id,
                    remedy="End each side after its first answer, or split the row.",
                )
            talk.refuse_lost([talk.prompt(answers[-1])])
            lines.append(Line(context, found[0].answers))
        return Plan(row_id, tuple(lines))

    def _plan_stepwise(self, row: Stepwise) -> Plan:
        steps = [step.strip() for step in row.steps]
        whole = (Message("assistant", STEP_END.join(steps)),)
        (line,) = self._plan_sides(row.id, row.prompt, (whole,), ()).lines
        *opening, answer = line.answers
        pieces: list[Piece] = []
        done = 0
        for step in steps[:-1]:
            end = answer.text.index(step + STEP_END, done) + len(step) + len(STEP_END)
            pieces.append(Piece(answer.text[done:end], scored=True))
            done = end
        pieces.append(Piece(answer.text[done:], scored=True))
        return Plan(row.id, (Line(line.context, (*opening, *pieces)),), ends_only=True)

    def _trees(self, plans: Sequence[Plan]) -> list[Tree]:
        texts = list(dict.fromkeys(piece.text for plan in plans for piece in plan.pieces))
        ids = dict(zip(texts, self._encode(texts), strict=True))
        self._refuse_altered(plans, ids)
        return [_tree(plan, ids) for plan in plans]

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        # The template writes the special tokens it wants; the tokenizer must not add its own.
        if self._direct is not None:
            return [tuple(one.ids) for one in self._direct.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [tuple(ids) for ids in encoded.input_ids]

    def _decode_all(self, rows: Sequence[tuple[int, ...]]) -> list[str]:
        if self._direct is not None:
            texts: list[str] = self._direct.decode_batch(rows, skip_special_tokens=False)
            return texts
        return [self.decode(ids) for ids in rows]

    def _refuse_altered(self, plans: Sequence[Plan], ids: Ids) -> None:
        """Each scored span must decode to its text: a tokenizer without some character would train on <unk>."""
        scored = {piece.text: plan.id for plan in plans for piece in plan.pieces if piece.scored}
        decoded = self._decode_all([ids[text] for text in scored])
        for (text, row_id), back in zip(scored.items(), decoded, strict=True):
            if back != text and back != unicodedata.normalize("NFC", text):
                raise DataError(
                    f"the tokenizer cannot hold the text: {text!r:.200} becomes {back!r:.200}.",
                    where=row_id,
                    remedy="The model would learn another text than the data holds: change the row or the tokenizer.",
                )


class PlainText:
    """For continuing text without a chat template, the way plain text is trained on: after a document separator."""

    def __init__(self, tokenizer: Any, stop_token_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        known = (tokenizer.eos_token_id, *stop_token_ids)
        self.stop_token_ids = tuple(dict.fromkeys(token for token in known if token is not None))

    def prompt_ids(self, messages: Sequence[Message], where: str = "") -> tuple[int, ...]:
        """The one message as text to be continued."""
        if len(messages) != 1:
            raise DataError("a conversation is no plain text.", where=where, remedy="Give the prompt as one text.")
        text = _separator(self._tokenizer) + messages[0].content
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise DataError("an empty prompt, and this tokenizer has no document separator to begin with.", where=where)
        return tuple(ids)

    def answer_text(self, ids: Sequence[int]) -> str:
        """The continuation without the stop token; other special tokens are shown."""
        text = ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids
        return self._tokenizer.decode(list(text), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _marks(example: Example, loss_on: LossOn) -> Marks:
    """What the stage's rule chooses; a message's own `train` overrides it."""
    messages, n_prompt = example.messages, example.n_prompt
    if loss_on == "completion" and n_prompt is None:
        raise _no_completion(example.id, "one conversation")
    first = 0
    if loss_on == "completion":
        first = n_prompt or 0
    elif loss_on == "last_turn":  # a turn is all that answers one message of the user, tool calls included
        first = 1 + max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    # The answers in a prompt are marked as context, which `all` is there to score.
    overridden = n_prompt or 0 if loss_on == "all" else 0
    answers = frozenset(
        i
        for i, message in enumerate(messages)
        if message.role == "assistant" and (i >= first if message.train is None or i < overridden else message.train)
    )
    return Marks(answers, before=loss_on == "all", between=loss_on in ("all", "completion"))


def _context(talk: Talk, n: int, marks: Marks | None = None) -> tuple[Piece, ...]:
    """The prompt of the first `n` messages, cut around each earlier answer that the template still renders as it was
    sampled. `marks`: what of it carries loss, which is nothing unless a whole conversation is trained on."""
    text = talk.prompt(n)
    before = marks is not None and marks.before
    pieces: list[Piece] = []
    done = 0
    for i, message in enumerate(talk.messages[:n]):
        turn = talk.turn_or_none(i) if message.role == "assistant" else None
        if turn is not None and text.startswith(turn.closed):
            scored = before and marks is not None and i in marks.answers
            pieces += [Piece(text[done : len(turn.before)], before), *_pieces(turn, scored)]
            done = len(turn.closed)
    return tuple(piece for piece in (*pieces, Piece(text[done:], before)) if piece.text)


def _lines(talk: Talk, marks: Marks) -> tuple[Line, ...]:
    """The answers, each on the line of the one before it where the template leaves that as it was."""
    lines: list[tuple[tuple[Piece, ...], list[Piece]]] = []
    since: list[Piece] = []  # the last scored answer; what follows it counts only once another one comes
    previous: Turn | None = None
    for i in range(min(marks.answers), max(marks.answers) + 1):
        if talk.messages[i].role != "assistant":
            continue
        turn = talk.turn(i) if i in marks.answers else talk.turn_or_none(i)
        if turn is not None and previous is not None and turn.before.startswith(previous.closed):
            since.append(Piece(turn.before[len(previous.closed) :], marks.between))
        elif i in marks.answers:
            lines.append((_context(talk, i, marks), []))
            since = []
        else:
            turn = None
        previous = turn
        if turn is not None:
            since += _pieces(turn, i in marks.answers)
        if i in marks.answers:
            lines[-1][1].extend(since)
            since = []
    return tuple(Line(context, tuple(piece for piece in answers if piece.text)) for context, answers in lines)


def _pieces(turn: Turn, scored: bool) -> tuple[Piece, ...]:
    return (*([Piece(turn.unmarked)] if turn.unmarked else []), Piece(turn.answer, scored))


def _tree(plan: Plan, ids: Ids) -> Tree:
    contexts = [_flat(line.context, ids) for line in plan.lines]
    shared = 1 if plan.scores_context else _shared([context.token_ids for context in contexts])
    branches = []
    for line, context in zip(plan.lines, contexts, strict=True):
        answers = _flat(line.answers, ids, ends_only=plan.ends_only)
        branch = Branch(
            context.token_ids[shared:] + answers.token_ids,
            context.scored[shared:] + answers.scored,
        )
        if not any(branch.scored):
            raise _nothing_scored(plan.id)
        branches.append(branch)
    return Tree(plan.id, contexts[0].token_ids[:shared], tuple(branches))


def _shared(contexts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all contexts begin with."""
    first = contexts[0]
    shared = len(first)
    for other in contexts[1:]:
        if other[:shared] != first[:shared]:
            shared = next(i for i, (a, b) in enumerate(zip((*first, -1), (*other, -2), strict=False)) if a != b)
    return shared


def _flat(pieces: Sequence[Piece], ids: Ids, *, ends_only: bool = False) -> Branch:
    token_ids: list[int] = []
    scored: list[bool] = []
    for piece in pieces:
        token_ids += ids[piece.text]
        n = len(ids[piece.text])
        scored += [False] * (n - 1) + [piece.scored] if ends_only else [piece.scored] * n
    return Branch(tuple(token_ids), tuple(scored))


def _nothing_scored(row_id: str) -> DataError:
    return DataError(
        "no token of this row would be trained on: it has no assistant message that loss_on chooses, or each has "
        "train: false.",
        where=row_id,
        remedy="Add an answer, or remove the row.",
    )


def _no_completion(row_id: str, what: str) -> DataError:
    return DataError(
        f"loss_on: completion scores what follows a prompt, and this row is {what}.",
        where=row_id,
        remedy="Give `prompt` and `completion` columns, or set loss_on: assistant.",
    )


def _direct(tokenizer: Any) -> Any:
    """The Rust tokenizer itself, without the work of its wrapper; None where that would not be the same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation or backend.padding or backend.encode_special_tokens:
        return None
    text = "A probe – „naïve“ 12,345. "
    ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    wrapped = tokenizer([text], add_special_tokens=False).input_ids[0]
    decoded = tokenizer.decode(wrapped, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    same = ids == wrapped and backend.decode(ids, skip_special_tokens=False) == decoded
    return backend if same else None


def _separator(tokenizer: Any) -> str:
    return tokenizer.bos_token or tokenizer.eos_token or ""
