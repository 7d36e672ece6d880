"""`posttrain generate`: a model's answers to prompts, or with --raw how it continues them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain import paths
from posttrain.cli.best_of import Ranked, best_of_option, rank
from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelArgument,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    command_line,
    home_folder,
    print_json,
    print_next,
)
from posttrain.cli.open_model import Asked, Located, OpenModel, locate, open_model, open_plain
from posttrain.errors import DataError, RecipeError

if TYPE_CHECKING:
    from posttrain.records import Completion, Message, Sampling

PromptOption = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt; may be repeated.")]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="A .jsonl file whose rows have a `prompt`.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without chat template.")]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, help="Answers per prompt.")]
BestOfOption = Annotated[
    int | None,
    typer.Option("--best-of", min=2, metavar="N", help="Sample N answers and show the one --reward likes best."),
]
RewardOption = Annotated[
    str | None, typer.Option("--reward", metavar="MODEL", help="The reward model of --best-of: a name, or a folder.")
]
AggregateOption = Annotated[
    str, typer.Option("--aggregate", help="How a process reward model's steps become one: min, product or last.")
]


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        return "\n".join(message.content for message in self.messages)


def generate(
    model: ModelArgument,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    raw: RawOption = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = 0,
    samples: SamplesOption = 1,
    best_of: BestOfOption = None,
    reward: RewardOption = None,
    aggregate: AggregateOption = "min",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts with a model, or with --raw continue them as text."""
    choosing = best_of_option(best_of, reward, aggregate, samples)
    samples = choosing.n if choosing else samples
    if samples > 1 and temperature == 0.0:
        raise RecipeError(
            f"--{'best-of' if choosing else 'samples'} {samples} at temperature 0 would be {samples} times the same "
            "answer.",
            remedy="Add --temperature 0.8, say.",
        )
    asked = Asked(temperature, top_p, top_k, max_new_tokens, seed)
    found = locate(model, home_folder(home))
    asking = _prompts(prompt or [], prompts)
    opened = open_plain(found) if raw else open_model(found)
    answers, sampling = _answer(opened, asking, asked, samples)
    ranked = rank(choosing, [p.messages for p in asking], answers, home_folder(home)) if choosing else None
    if as_json:
        print_json(_as_json(found, asking, answers, sampling, asked, ranked))
    elif ranked is not None:
        _show(asking, [[r.completions[r.best]] for r in ranked], [r.told(reward or "") for r in ranked])
    else:
        _show(asking, answers)
    _refuse_failed(asking, answers)
    if not as_json:
        answers_too = isinstance(opened.policy.tokenizer.chat_template, str)
        print_next(command_line("chat", model, home=home) if answers_too else "posttrain check recipe.yaml")


def _prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    from posttrain.records import Message

    asking = [Prompt(f"prompt {n}", (Message("user", text),)) for n, text in enumerate(texts, start=1)]
    if file is not None:
        from posttrain.data.formats import read_tasks
        from posttrain.settings import DatasetSettings

        source = DatasetSettings(path=file, format="task")
        loaded = read_tasks([source], lambda path: paths.resolve(path, Path.cwd()), require_answer=False)
        asking += [Prompt(task.id, task.prompt) for task in loaded.rows]
    if not asking:
        raise RecipeError("generate needs a prompt.", remedy="Give --prompt TEXT or --prompts FILE.jsonl.")
    return asking


def _answer(
    opened: OpenModel, asking: Sequence[Prompt], asked: Asked, samples: int
) -> tuple[list[list[Completion]], Sampling]:
    from posttrain.records import Request
    from posttrain.reporting import Reporter
    from posttrain.seeds import derive_seed

    ids = [opened.writer.prompt_ids(prompt.messages, prompt.id) for prompt in asking]
    sampling = opened.sampling(asked, max(map(len, ids)))
    requests = [
        Request(prompt.id, tokens, tuple(derive_seed(asked.seed, "generate", prompt.id, n) for n in range(samples)))
        for prompt, tokens in zip(asking, ids, strict=True)
    ]
    with Reporter().task("answers", samples * len(requests)) as task:
        return opened.engine.generate(requests, sampling, lambda done, _: task.update(done)), sampling


def _show(asking: Sequence[Prompt], answers: Sequence[Sequence[Completion]], told: Sequence[str] | None = None) -> None:
    for number, (prompt, completions) in enumerate(zip(asking, answers, strict=True)):
        typer.echo(typer.style(f"{'' if number == 0 else chr(10)}> {prompt.text}", bold=True))
        for completion in completions:
            typer.echo(completion.text)
            chosen = f"; {told[number]}" if told else ""
            typer.echo(typer.style(f"[{how_it_ended(completion)}{chosen}]", dim=True))


def how_it_ended(completion: Completion) -> str:
    count = len(completion.token_ids)
    tokens = f"{count} token{'' if count == 1 else 's'}"
    return f"failed: {completion.detail}" if completion.detail else f"{completion.status.value}, {tokens}"


def _as_json(
    found: Located,
    asking: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    sampling: Sampling,
    asked: Asked,
    ranked: Sequence[Ranked] | None,
) -> dict[str, Any]:
    rows = [
        {
            "id": prompt.id,
            "prompt": [message.as_dict() for message in prompt.messages],
            "sample": completion.index,
            "text": completion.text,
            "status": completion.status.value,
            "detail": completion.detail,
            "tokens": len(completion.token_ids),
            **(ranked[number].fields(completion.index) if ranked else {}),
        }
        for number, (prompt, completions) in enumerate(zip(asking, answers, strict=True))
        for completion in completions
    ]
    how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    how |= {"max_new_tokens": sampling.max_new_tokens, "seed": asked.seed}
    return {"model": found.label, "fingerprint": found.fingerprint, "sampling": how, "answers": rows}


def _refuse_failed(asking: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> None:
    failed = [
        (prompt.id, completion.detail)
        for prompt, completions in zip(asking, answers, strict=True)
        for completion in completions
        if completion.detail
    ]
    if failed:
        where, why = failed[0]
        n_all = sum(map(len, answers))
        raise DataError(
            f"{len(failed)} of {n_all} answers failed, the first because: {why}.",
            where=where,
            remedy="Shorten the prompt, or lower --max-new-tokens.",
        )
