"""From a foreign file to a recipe and an account of every key. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.importers import axolotl, llama_factory, llama_factory_data, trl
from posttrain.importers.draft import Draft, Item, text_of
from posttrain.importers.job import Job, Tables, recipe_name
from posttrain.importers.ledger import Added, Carried, Ledger, Left, is_on
from posttrain.recipe.faults import Fault, RecipeFaults, show
from posttrain.recipe.yaml_lines import Document, read_yaml
from posttrain.settings import METHODS

INFO = llama_factory_data.INFO


@dataclass(frozen=True)
class Tool:
    """`needs`: groups of keys of which a file of this tool has at least one each. `tells`: keys no other tool has."""

    title: str
    needs: tuple[tuple[str, ...], ...]
    tells: frozenset[str]
    tables: Tables
    convert: Callable[[Job], None]


TOOLS = {
    "axolotl": Tool(
        "Axolotl",
        (("base_model",), ("datasets", "pretraining_dataset")),
        frozenset({"base_model", "sequence_len", "micro_batch_size", "num_epochs", "sample_packing", "val_set_size"}),
        axolotl.TABLES,
        axolotl.convert,
    ),
    "llama-factory": Tool(
        "LLaMA-Factory",
        (("model_name_or_path",), ("stage", "finetuning_type", "template", "cutoff_len"), ("dataset",)),
        frozenset({"stage", "finetuning_type", "cutoff_len", "template", "dataset", "dataset_dir", "lora_rank"}),
        llama_factory.TABLES,
        llama_factory.convert,
    ),
    "trl": Tool(
        "TRL",
        (("model_name_or_path",), ("dataset_name", "datasets")),
        frozenset(
            "dataset_name dataset_config use_peft reward_funcs dataset_text_field max_length max_prompt_length "
            "loss_type beta num_generations max_completion_length assistant_only_loss completion_only_loss".split()
        ),
        trl.TABLES,
        trl.convert,
    ),
}


@dataclass(frozen=True)
class Imported:
    """A recipe's text, and what became of each key of the file it came from."""

    tool: str
    method: str
    model: str
    text: str
    n_keys: int
    carried: tuple[Carried, ...]
    not_needed: tuple[Left, ...]
    lost: tuple[Left, ...]
    added: tuple[Added, ...]
    notes: tuple[str, ...]


def import_file(
    tool: str, shown: str, out: Path, *, method: str | None = None, processes: int | None = None
) -> Imported:
    """Read `shown`, a file of `tool`, for a recipe that will stand in `out`. Raises `RecipeError` (exit code 2)."""
    file = Path(shown).expanduser()
    document = _read(file, shown)
    kind = TOOLS[tool]
    _refuse_others(tool, document, shown)
    ours = _method(tool, document, shown, method)
    data = dict(document.data)
    folders: tuple[Path, ...] = (Path.cwd(), file.absolute().parent)
    if tool == "llama-factory":
        info, beside = _described(data, folders)
        data |= info
        folders = (*beside, *folders)
    job = Job(kind.title, Ledger(data, document.lines), Draft(ours), folders, out.absolute().parent, processes)
    _name(job, file)
    kind.convert(job)
    _finish(job)
    job.apply(kind.tables)
    return _imported(job, file, kind)


def _read(file: Path, shown: str) -> Document:
    try:
        document = read_yaml(file.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise RecipeError("this is a folder.", where=shown, remedy="Name the configuration file in it.") from None
    except FileNotFoundError:
        raise RecipeError("no such file.", where=shown) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}.", where=shown) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start} is not UTF-8 text.", where=shown, remedy="Save it as UTF-8.") from None
    if document.faults:
        raise RecipeFaults(Fault(f"{shown}:{fault.line}", fault.line, fault.message) for fault in document.faults)
    if not isinstance(document.data, dict) or not document.data:
        raise RecipeError(f"holds {show(document.data)}, not the keys of a configuration.", where=f"{shown}:1")
    return document


def _refuse_others(tool: str, document: Document, shown: str) -> None:
    """A file of another tool would be read, and most of it lost."""
    keys = set(document.data)
    kind = TOOLS[tool]
    missing = next((group for group in kind.needs if not keys & set(group)), None)
    tells = {
        name: sorted(keys & other.tells, key=lambda key: document.line_of((key,))) for name, other in TOOLS.items()
    }
    if not missing and (tells[tool] or not any(tells.values())):
        others = [name for name in TOOLS if name != tool and len(tells[name]) > len(tells[tool])]
        if not others:
            return
    if {"name", "model", "stages"} <= keys:
        line, looks = document.line_of(("stages",)), "It is a posttrain recipe: posttrain check " + shown
    else:
        like = max((name for name in TOOLS if name != tool), key=lambda name: len(tells[name]))
        line = document.line_of((tells[like][0],)) if tells[like] else 1
        looks = f"It looks like {TOOLS[like].title}: posttrain import {like} {shown}" if tells[like] else ""
    lacks = f"it has no {' or '.join(missing)}" if missing else f"it has {', '.join(tells[like])}"
    raise RecipeError(f"this is no {kind.title} configuration: {lacks}.", where=f"{shown}:{line}", remedy=looks)


def _method(tool: str, document: Document, shown: str, asked: str | None) -> str:
    """Our method, or a refusal that names what the file asks for."""
    data = document.data
    if asked and tool != "trl":
        raise RecipeError(f"--method is for TRL, whose files do not name it; {shown} says it itself.")
    if tool == "trl":
        named = asked or trl.method_of(data, Path(shown).stem)
        if not named:
            known = ", ".join(trl.METHOD_OF)
            raise RecipeError(
                "nothing in this file says which command of TRL it is for.",
                where=f"{shown}:1",
                remedy=f"Add --method, one of {known}.",
            )
        key, ours = "--method", trl.METHOD_OF.get(named)
    elif tool == "axolotl":
        key = next((k for k in axolotl.SCORING if is_on(data.get(k))), "rl")
        named = str(data.get("rl") or "") if key == "rl" else key
        ours = axolotl.METHOD_OF.get(named)
    else:
        stage, loss = str(data.get("stage", "sft")), data.get("pref_loss")
        key, named, ours = "stage", stage, llama_factory.METHOD_OF.get(stage)
        if stage == "dpo" and loss in llama_factory.LOSS_METHODS:
            key, named, ours = "pref_loss", str(loss), str(loss)
    if ours not in METHODS:
        raise RecipeError(
            f"{key} = {named}: it is not imported."
            if named in METHODS
            else f"{key} = {named}: there is no such stage here.",
            where=f"{shown}:{document.line_of((key,))}",
            remedy=f"Stages are {', '.join(METHODS)}.",
        )
    return ours


def _described(data: dict[str, Any], folders: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """The entries of dataset_info.json that the file names, and the folder it lies in."""
    said = data.get("dataset_dir") or "data"
    names = [*llama_factory_data.names_in(data.get("dataset")), *llama_factory_data.names_in(data.get("eval_dataset"))]
    for folder in (*(folder / str(said) for folder in folders), folders[-1]):
        file = folder / INFO
        if not file.is_file():
            continue
        try:
            info = json.loads(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise RecipeError(f"broken JSON: {error.msg}.", where=f"{file}:{error.lineno}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot be read: {error}.", where=str(file)) from None
        if not isinstance(info, dict):
            raise RecipeError(f"holds {show(info)}, not data sets by name.", where=f"{file}:1")
        return {INFO: {name: info[name] for name in names if name in info}}, (folder,)
    return {}, ()


def _name(job: Job, file: Path) -> None:
    """run_name, where the tool has one; else the file's own name."""
    said = job.get("run_name")
    if isinstance(said, str) and said:
        name = recipe_name(said)
        job.draft.top["name"] = Item(name, job.origin(("run_name",)))
        job.ledger.carried(("run_name",), "name", name)
    else:
        job.draft.top["name"] = Item(recipe_name(file.stem), "the file's name")


def _finish(job: Job) -> None:
    """What a recipe needs and no other tool asks for."""
    job.add("allow_without_sft", True, f"{job.tool} trains on whatever model it is given")


def _imported(job: Job, file: Path, kind: Tool) -> Imported:
    carried, unneeded, lost = job.ledger.all_carried(), job.ledger.all_left("not needed"), job.ledger.all_left("lost")
    assert len(carried) + len(unneeded) + len(lost) == len(job.ledger), "a key has no fate, or two"
    head = f"Imported from {file.name} ({kind.title}). Beside each value stands where it came from."
    foot = [f"{left.key}: {left.why}" for left in lost]
    return Imported(
        tool=kind.title,
        method=job.draft.method,
        model=str(job.draft.top["model"].value) if "model" in job.draft.top else "",
        text=text_of(job.draft, head, "\n".join(["Could not be carried:", *foot]) if foot else ""),
        n_keys=len(job.ledger),
        carried=carried,
        not_needed=unneeded,
        lost=lost,
        added=tuple(job.added),
        notes=tuple(job.notes),
    )
