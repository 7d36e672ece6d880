"""`posttrain merge`: an adapter and its base as one model, with the proof that it is that."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain import paths
from posttrain.cli.common import (
    HomeOption,
    JsonOption,
    command_line,
    home_folder,
    print_columns,
    print_json,
    print_next,
)
from posttrain.errors import RecipeError

if TYPE_CHECKING:
    from posttrain.pipeline.merging import Merged
    from posttrain.records import Task

PROMPTS = "builtin:data/heldout.jsonl"
N_PROMPTS = 32

AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A registered NAME or NAME@3, the artefact folder of an adapter stage, or a folder that peft wrote.",
        show_default=False,
    ),
]
OutOption = Annotated[
    str | None, typer.Option("--out", metavar="DIR", help="Where the merged model is written; default ./NAME-merged.")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The model the adapter was trained on, if it moved.")
]
PromptsOption = Annotated[
    str, typer.Option("--prompts", metavar="FILE", help=f"Held-out prompts of the proof; the first {N_PROMPTS}.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU), float32 or bfloat16.")]


def merge(
    adapter: AdapterArgument,
    out: OutOption = None,
    base: BaseOption = None,
    prompts: PromptsOption = PROMPTS,
    dtype: DtypeOption = "auto",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base, and prove it. Exit code 5, and nothing written, where the proof fails."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"--dtype {dtype} must be auto, float32 or bfloat16.")
    from posttrain.pipeline.merging import find_source
    from posttrain.pipeline.merging import merge as merged_into

    folder = _folder(adapter, home)
    target = Path(out) if out else Path.cwd() / f"{folder.resolve().name}-merged"
    merged = merged_into(find_source(folder, base), target, _prompts(prompts), dtype)
    if as_json:
        return print_json({"model": merged.ref.path, "base": merged.base, **asdict(merged.proof)})
    _show(merged)
    return print_next(command_line("chat", str(out or target.name), home=home))


def _folder(adapter: str, home: str | None) -> Path:
    from posttrain.cli.open_model import locate

    folder = paths.expanded(adapter)
    if (folder / "adapter_config.json").is_file():
        return folder
    return Path(locate(adapter, home_folder(home)).source)


def _prompts(file: str) -> list[Task]:
    from posttrain.data.formats import read_tasks
    from posttrain.settings import DatasetSettings

    source = DatasetSettings(path=file, format="task")
    loaded = read_tasks([source], lambda path: paths.resolve(path, Path.cwd()), require_answer=False)
    return list(loaded.rows[:N_PROMPTS])


def _show(merged: Merged) -> None:
    proof = merged.proof
    typer.echo(f"merged into {merged.ref.path}")
    print_columns(
        [
            ("base", merged.base),
            ("proof", f"{proof.n_tokens} tokens of {merged.n_prompts} held-out prompts and their answers"),
            ("= adapter on base", f"log-probs differ by {proof.error_max:.2g} at most; {proof.bound:g} is allowed"),
            ("≠ base", f"log-probs differ by {proof.moved_max:.2g} at most, {proof.moved_mean:.2g} on average"),
            ("template", "identical; every prompt becomes the same tokens"),
            ("fingerprint", merged.ref.fingerprint),
        ]
    )
