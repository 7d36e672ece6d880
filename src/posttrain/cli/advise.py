"""`posttrain advise`: which method fits a problem, why, what it needs, and a recipe to start from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from posttrain.cli.common import JsonOption, command_line, print_json, print_next
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.plan.advice import Recommendation, Situation

WORDS = {
    "pairs": "pairs of a better and a worse answer",
    "thumbs": "single answers rated good or bad",
    "demonstrations": "prompts with good answers",
    "checker": "a program that can check an answer",
    "steps": "worked answers with their steps marked right or wrong",
    "teacher": "a stronger model of the same tokenizer, to copy",
    "nothing": "none of these",
}
AIMS = {
    "tone": "another tone or persona",
    "format": "answers of a certain form",
    "quality": "better answers, consistently",
    "reasoning": "solving what can be checked: maths, code, puzzles",
    "safety": "refusing what it should, and only that",
    "knowledge": "knowing facts",
}

HaveOption = Annotated[
    list[str] | None, typer.Option("--have", metavar="KIND", help=f"What you have, repeatable: {', '.join(WORDS)}.")
]
GoalOption = Annotated[str | None, typer.Option("--goal", metavar="GOAL", help=f"What for: {', '.join(AIMS)}.")]
NoisyOption = Annotated[bool, typer.Option("--noisy", help="Labels are often wrong or disagree.")]
MemoryOption = Annotated[Literal["enough", "tight"], typer.Option("--memory", help="Memory for training.")]
ModelOption = Annotated[Literal["instruct", "base"], typer.Option("--model", help="What the model was before.")]
OutOption = Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write the recipe there.")]


def advise(
    have: HaveOption = None,
    goal: GoalOption = None,
    noisy: NoisyOption = False,
    memory: MemoryOption = "enough",
    model: ModelOption = "instruct",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recommend a method from what you have and what you want. Asks what is not given, on a terminal."""
    from posttrain.plan.advice import Situation, recipe_text, recommend

    kinds, aim = _asked(have, goal)
    situation = Situation(frozenset(kinds), aim, noisy, memory == "tight", model == "base")  # type: ignore[arg-type]
    found = recommend(situation)
    text = recipe_text(found, situation) if found.stages else ""
    if out is not None and text:
        _write(Path(out), text)
    if as_json:
        print_json(_as_dict(found, situation, text))
        return
    _print(found, text, out)
    print_next(command_line("check", out or "recipe.yaml") if text else command_line("advise"))


def _asked(have: list[str] | None, goal: str | None) -> tuple[Sequence[str], str]:
    if (not have or goal is None) and not sys.stdin.isatty():
        raise RecipeError(
            "advise needs --have and --goal where nobody can be asked.",
            remedy=f"--have is one or several of {', '.join(WORDS)}; --goal one of {', '.join(AIMS)}.",
        )
    kinds = [kind for given in have for kind in given.split(",")] if have else _choose_several()
    aim = goal if goal is not None else _choose("What should become better?", AIMS)
    _refuse_unknown("--have", kinds, WORDS)
    _refuse_unknown("--goal", [aim], AIMS)
    if "nothing" in kinds and len(kinds) > 1:
        raise RecipeError("--have nothing goes with no other --have.", remedy="Leave one of them out.")
    return kinds, aim


def _refuse_unknown(option: str, given: Sequence[str], known: dict[str, str]) -> None:
    for word in given:
        if word not in known:
            raise RecipeError(f"{option} {word} is not known.", remedy=f"There are: {', '.join(known)}.")


def _choose_several() -> list[str]:
    said = _choose("What do you have to learn from? (several: separated by commas)", WORDS, several=True)
    return [word.strip() for word in said.split(",") if word.strip()]


def _choose(question: str, options: dict[str, str], *, several: bool = False) -> str:
    typer.echo(question)
    for word, meaning in options.items():
        typer.echo(f"  {word:15} {meaning}")
    while True:
        said = typer.prompt(">", prompt_suffix=" ").strip()
        if all(word.strip() in options for word in (said.split(",") if several else [said])):
            return said
        typer.echo(f"One of: {', '.join(options)}")


def _write(file: Path, text: str) -> None:
    if file.exists():
        raise RecipeError("is there already.", where=str(file), remedy="Choose another --out.")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot be written: {error.strerror}.", where=str(file)) from None


def _print(found: Recommendation, text: str, out: str | None) -> None:
    typer.echo(" → ".join(choice.method for choice in found.choices) or "retrieval, before any training")
    for reason in found.reasons:
        typer.echo(f"  {reason}")
    for choice in found.choices:
        typer.echo(f"\n{choice.method}")
        typer.echo(f"  data  {choice.needs}")
        typer.echo(f"  cost  {choice.cost}")
    if found.collect:
        typer.echo(f"\nFirst: {found.collect}")
    if text:
        place = f"written to {out}" if out else "to be saved as recipe.yaml"
        typer.echo(f"\nA recipe to start from, {place}:\n")
        typer.echo(text.rstrip())


def _as_dict(found: Recommendation, situation: Situation, text: str) -> dict[str, Any]:
    return {
        "situation": {
            "have": sorted(situation.have),
            "goal": situation.goal,
            "noisy": situation.noisy,
            "memory": "tight" if situation.memory_tight else "enough",
            "model": "base" if situation.base_model else "instruct",
        },
        "stages": [
            {"choice": name, "method": choice.method, "needs": choice.needs, "cost": choice.cost}
            for name, choice in zip(found.stages, found.choices, strict=True)
        ],
        "reasons": list(found.reasons),
        "collect": found.collect,
        "recipe": text,
    }
