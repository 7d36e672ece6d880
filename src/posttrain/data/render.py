"""The one way from text to token ids, with the marks that say which tokens carry loss.

Rendered text is cut where an answer begins and where its end token stands, and each piece is tokenised by itself. The
sampler's prompt is cut at the same places, so what is trained on is, token for token, what will be sampled:

    <user>Hi<end>\\n<assistant>\\n | Hello.<end> | \\n<user>More<end>\\n<assistant>\\n | Sure.<end>
    trunk, no loss                | scored       | no loss                           | scored

Text a template writes after the last end token is left out; nobody samples it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from posttrain.data.templates import ChatTemplate, Turn
from posttrain.errors import DataError
from posttrain.records import Branch, Example, Message, Pair, Rated, Stepwise, Tree

TrainOn = Literal["all", "last"]
STEP_END = "\n"  # between the steps of an answer; part of the step before it


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised by itself."""

    text: str
    scored: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A tree before tokenising."""

    id: str
    trunk: tuple[Piece, ...]
    branches: tuple[tuple[Piece, ...], ...]

    @property
    def pieces(self) -> Iterable[Piece]:
        yield from self.trunk
        for branch in self.branches:
            yield from branch


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
        eos = self.tokenizer.eos_token_id
        return (self.template.end_id,) if eos in (None, self.template.end_id) else (self.template.end_id, eos)

    @property
    def fingerprint(self) -> str:
        return self.template.fingerprint

    def prompt_ids(self, messages: Sequence[Message], where: str = "") -> tuple[int, ...]:
        """What the sampler sees: the conversation, and the opening of an answer."""
        pieces = self._prompt(tuple(messages), where)
        return tuple(token for ids in self._encode([piece.text for piece in pieces]) for token in ids)

    def example(self, example: Example, train_on: TrainOn = "all") -> Tree:
        return self.examples([example], train_on)[0]

    def examples(self, examples: Iterable[Example], train_on: TrainOn = "all") -> list[Tree]:
        """One tree a row: everything before the first scored answer is trunk, the rest is its one branch."""
        return self._trees([self._plan_example(example, train_on) for example in examples])

    def pair(self, pair: Pair) -> Tree:
        return self.pairs([pair])[0]

    def pairs(self, pairs: Iterable[Pair]) -> list[Tree]:
        """One tree a pair: the prompt is trunk, the branches are chosen and rejected, in this order."""
        return self._trees([self._plan_pair(pair) for pair in pairs])

    def rated(self, rows: Iterable[Rated]) -> list[Tree]:
        """One tree a row: the prompt is trunk, the answer its one branch."""
        return self._trees([self._plan_rated(row) for row in rows])

    def stepwise(self, rows: Iterable[Stepwise]) -> list[Tree]:
        """One tree a row: the prompt is trunk, the answer its one branch, and the last token of each step is marked.

        Steps stand on lines of their own; the last one ends with the token that ends the answer.
        """
        plans = [self._plan_stepwise(row) for row in rows]
        return [_only_ends(tree, plan, self._encode) for tree, plan in zip(self._trees(plans), plans, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """All tokens as text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_text(self, ids: Sequence[int]) -> str:
        """A sampled answer as its message would hold it: without the stop token and what the template puts before."""
        answer = ids[:-1] if ids and ids[-1] in self.stop_token_ids else ids
        return self.decode(answer).removeprefix(self.template.lead)

    def _plan_example(self, example: Example, train_on: TrainOn) -> Plan:
        if example.text is not None:
            return self._plan_text(example.id, example.text)
        answers = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
        scored = [i for i in answers if self._is_scored(example.messages[i], train_on, last=i == answers[-1])]
        if not scored:
            raise DataError(
                "no token of this row would be trained on: it has no assistant message, or each has train: false.",
                where=example.id,
                remedy="Add an answer, or remove the row.",
            )
        trunk = self._prompt(example.messages[: scored[0]], example.id)
        # Turns after the last scored one carry no loss and nothing that does depends on them.
        branch = self._continue(example.messages[: scored[-1] + 1], scored, example.id)
        return Plan(example.id, trunk, (branch,))

    @staticmethod
    def _is_scored(message: Message, train_on: TrainOn, *, last: bool) -> bool:
        return message.train if message.train is not None else (last or train_on == "all")

    def _plan_text(self, row_id: str, text: str) -> Plan:
        """Plain text hangs on a document separator, so that its first token has something to be predicted from.

        Control tokens spelled in it are read as such: documents may be joined by them.
        """
        eos = self.tokenizer.eos_token
        if eos is None:
            raise DataError("the tokenizer has no end-of-text token to close plain text with.", where=row_id)
        trunk = (Piece(_separator(self.tokenizer)),)
        return Plan(row_id, trunk, ((Piece(text, scored=True), Piece(eos, scored=True)),))

    def _plan_pair(self, pair: Pair) -> Plan:
        trunk = self._prompt(pair.prompt, pair.id)
        branches = []
        for side in (pair.chosen, pair.rejected):
            messages = pair.prompt + side
            answers = range(len(pair.prompt), len(messages))
            scored = [i for i in answers if messages[i].role == "assistant"]
            if not scored or scored[0] != len(pair.prompt):
                raise DataError("chosen and rejected must begin with an assistant message.", where=pair.id)
            branches.append(self._continue(messages[: scored[-1] + 1], scored, pair.id))
        return Plan(pair.id, trunk, tuple(branches))

    def _plan_rated(self, row: Rated) -> Plan:
        if not row.completion or row.completion[0].role != "assistant":
            raise DataError("the completion must begin with an assistant message.", where=row.id)
        plan = self._plan_pair(Pair(row.id, row.prompt, row.completion, row.completion, row.tools))
        return Plan(plan.id, plan.trunk, plan.branches[:1])

    def _plan_stepwise(self, row: Stepwise) -> Plan:
        steps = [step.strip() for step in row.steps]
        messages = (*row.prompt, Message("assistant", STEP_END.join(steps)))
        (answer,) = self._continue(messages, [len(row.prompt)], row.id)
        pieces: list[Piece] = []
        done = 0
        for step in steps[:-1]:
            end = answer.text.index(step + STEP_END, done) + len(step) + len(STEP_END)
            pieces.append(Piece(answer.text[done:end], scored=True))
            done = end
        pieces.append(Piece(answer.text[done:], scored=True))
        return Plan(row.id, self._prompt(row.prompt, row.id), (tuple(pieces),))

    def _prompt(self, messages: tuple[Message, ...], where: str) -> tuple[Piece, ...]:
        """A prompt in pieces, cut around each earlier answer that the template still renders as it was sampled."""
        self.template.refuse_control_tokens(messages, where)
        text = self.template.render(messages, True, where)
        pieces: list[Piece] = []
        done = 0
        for i, message in enumerate(messages):
            if message.role == "assistant":
                turn = self.template.turn(messages, i, where)
                if text.startswith(turn.closed):
                    pieces += [Piece(text[done : len(turn.before)]), Piece(turn.answer)]
                    done = len(turn.closed)
        return tuple(piece for piece in (*pieces, Piece(text[done:])) if piece.text)

    def _continue(self, messages: tuple[Message, ...], scored: Sequence[int], where: str) -> tuple[Piece, ...]:
        """The pieces from the first scored answer to the end of the last message, an assistant's."""
        self.template.refuse_control_tokens(messages, where)
        pieces: list[Piece] = []
        previous: Turn | None = None
        for i in range(scored[0], len(messages)):
            if messages[i].role != "assistant":
                continue
            turn = self.template.turn(messages, i, where)
            if previous is not None:
                if not turn.before.startswith(previous.closed):
                    raise DataError(
                        "the chat template writes earlier answers differently once the conversation goes on: "
                        f"{previous.answer!r:.120} is not in {turn.before[len(previous.before) :]!r:.120}.",
                        where=where,
                        remedy="Such an answer cannot be trained in place. Set train_on: last, or split the row.",
                    )
                pieces.append(Piece(turn.before[len(previous.closed) :]))
            pieces.append(Piece(turn.answer, scored=i in scored))
            previous = turn
        return tuple(piece for piece in pieces if piece.text)

    def _trees(self, plans: Sequence[Plan]) -> list[Tree]:
        texts = list(dict.fromkeys(piece.text for plan in plans for piece in plan.pieces))
        ids = dict(zip(texts, self._encode(texts), strict=True))
        self._refuse_altered(plans, ids)
        return [
            Tree(
                id=plan.id,
                trunk_ids=tuple(token for piece in plan.trunk for token in ids[piece.text]),
                branches=tuple(_branch(pieces, ids) for pieces in plan.branches),
            )
            for plan in plans
        ]

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        # The template writes the special tokens it wants; the tokenizer must not add its own.
        if self._direct is not None:
            return [tuple(one.ids) for one in self._direct.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [tuple(ids) for ids in encoded.input_ids]

    def _refuse_altered(self, plans: Sequence[Plan], ids: dict[str, tuple[int, ...]]) -> None:
        """Each scored span must decode to its text: a tokenizer without some character would train on <unk>."""
        scored = [(plan.id, piece.text) for plan in plans for piece in plan.pieces if piece.scored]
        wanted = [list(ids[text]) for _, text in scored]
        if self._direct is not None:
            decoded = self._direct.decode_batch(wanted, skip_special_tokens=False)
        else:
            decoded = self.tokenizer.batch_decode(wanted, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for (row_id, text), back in zip(scored, decoded, strict=True):
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


def _only_ends(tree: Tree, plan: Plan, encode: Callable[[list[str]], list[tuple[int, ...]]]) -> Tree:
    """The tree with only the last token of each piece of its one branch marked."""
    lengths = [len(ids) for ids in encode([piece.text for piece in plan.branches[0]])]
    ends = set(accumulate(lengths))
    marks = tuple(i + 1 in ends for i in range(sum(lengths)))
    return Tree(tree.id, tree.trunk_ids, (Branch(tree.branches[0].token_ids, marks),))


def _branch(pieces: Sequence[Piece], ids: dict[str, tuple[int, ...]]) -> Branch:
    token_ids: list[int] = []
    scored: list[bool] = []
    for piece in pieces:
        token_ids += ids[piece.text]
        scored += [piece.scored] * len(ids[piece.text])
    return Branch(tuple(token_ids), tuple(scored))
