"""LLaMA-Factory's data sets: names in the training file, described by dataset_info.json beside the rows."""

from __future__ import annotations

from typing import Any

from posttrain.importers.draft import Item, dataset_fits
from posttrain.importers.job import Job, new_dataset, put_columns, put_dataset, put_hub_key
from posttrain.importers.ledger import is_off, is_on, section
from posttrain.recipe.yaml_lines import KeyPath

INFO = "dataset_info.json"
Entry = dict[str, Item]
Columns = dict[str, tuple[str, KeyPath]]
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}  # what no `columns` means
STANDARD_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",),
}
HISTORY = "earlier turns in a column of their own are not read: write such rows as messages."


def names_in(value: Any) -> list[str]:
    """The data sets a training file names, separated by commas or as a list."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


def convert(job: Job) -> None:
    for key, held_out in (("dataset", False), ("eval_dataset", True)):
        if not job.ledger.says(key):
            continue
        names = names_in(job.get(key))
        unknown = [name for name in names if not isinstance(job.get(INFO, name), dict)]
        for name in names:
            _entry(job, key, name, held_out)
        if unknown:
            job.lost(key, f"{', '.join(unknown)}: not described in {INFO}. Set path, format and columns in the recipe.")
        else:
            job.ledger.carried((key,), "eval_datasets" if held_out else "datasets", names)
    _mixture(job)
    _held_out_share(job)


def _entry(job: Job, key: str, name: str, held_out: bool) -> None:
    info = job.get(INFO, name)
    at: KeyPath = (INFO, name)
    if not isinstance(info, dict):
        entry: Entry = {"path": Item(name, job.origin((key,)))}
        (job.draft.eval_datasets if held_out else job.draft.datasets).append(entry)
        _limit(job, entry)
        return
    source = next(
        (k for k in ("hf_hub_url", "file_name", "ms_hub_url", "script_url", "cloud_file_name") if info.get(k)), ""
    )
    if source in ("hf_hub_url", "file_name"):
        entry = new_dataset(job, (*at, source), str(info[source]), held_out=held_out)
    else:
        entry = {"path": Item(name, job.origin((key,)))}
        (job.draft.eval_datasets if held_out else job.draft.datasets).append(entry)
    for other in ("file_name", "ms_hub_url", "script_url", "cloud_file_name", "om_hub_url"):
        if source == "hf_hub_url":
            job.not_needed([(*at, other)], "hf_hub_url names the data set")
        job.lost([(*at, other)], "save those rows as .jsonl and name the file.")
    if info.get("subset"):
        if source == "hf_hub_url" and dataset_fits("name", str(info["subset"])):
            put_dataset(job, entry, (*at, "subset"), "name", str(info["subset"]))
        job.lost([(*at, "subset")], "save that part of the data set as .jsonl and name the file.")
    put_hub_key(job, entry, (*at, "split"), "split")
    job.lost([(*at, "folder")], "name the files in that folder.")
    if info.get("num_samples"):
        put_dataset(job, entry, (*at, "num_samples"), "limit", info["num_samples"])
    _limit(job, entry)
    _format(job, at, info, entry)


def _limit(job: Job, entry: Entry) -> None:
    """max_samples holds for each data set."""
    most = job.number("max_samples")
    if most:
        limit = int(min(most, entry["limit"].value)) if "limit" in entry else int(most)
        entry["limit"] = Item(limit, job.origin(("max_samples",)))
        job.ledger.carried(("max_samples",), "datasets.limit", limit)


def _format(job: Job, at: KeyPath, info: dict[str, Any], entry: Entry) -> None:
    sharegpt = info.get("formatting") in ("sharegpt", "openai")
    given = section(info.get("columns"))
    ranking, tag = is_on(info.get("ranking")), given.get("kto_tag")
    if ranking:
        job.ledger.carried((*at, "ranking"), "datasets.format", "preference")
    job.not_needed([(*at, "ranking")], "is off")
    if sharegpt:
        _sharegpt(job, at, info, entry, ranking, tag)
    else:
        _alpaca(job, at, info, entry, ranking, tag)
    for key in ("images", "videos", "audios"):
        job.lost([(*at, "columns", key)], "only text models are trained.")


def _alpaca(job: Job, at: KeyPath, info: dict[str, Any], entry: Entry, ranking: bool, tag: Any) -> None:
    written = section(info.get("columns"))
    given = written or ({} if ranking or tag else ALPACA)
    query = given.get("query")
    if ranking:
        form, names = "preference", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        given = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", **given}
    elif tag:
        form, names = "unpaired", {"prompt": "prompt", "completion": "response", "label": "kto_tag"}
    elif job.get("stage") == "pt":
        form, names = "text", {"text": "prompt"}
    elif query and dataset_fits("format", "alpaca"):
        form, names = "alpaca", {"instruction": "prompt", "input": "query", "output": "response"}
    else:
        form, names = "prompt_completion", {"prompt": "prompt", "completion": "response"}
        if query and not written:
            job.note(f"{entry['path'].value}: the column input is not read; join it with instruction first.")
    columns: Columns = {}
    for ours, theirs in names.items():
        if given.get(theirs):
            columns[ours] = (str(given[theirs]), (*at, "columns", theirs) if written.get(theirs) else ())
    _write(job, at, entry, form, columns)
    job.lost([(*at, "columns", "query")], "join that column with the prompt, or write rows as messages.")
    job.lost([(*at, "columns", "history")], HISTORY)
    job.lost([(*at, "columns", "response")], "a text has no answer column: join the columns.")
    for key in ("system", "tools"):
        _beside(job, (*at, "columns", key), key, entry)


def _sharegpt(job: Job, at: KeyPath, info: dict[str, Any], entry: Entry, ranking: bool, tag: Any) -> None:
    given, tags = section(info.get("columns")), section(info.get("tags"))
    messages = given.get("messages") or "conversations"
    where: KeyPath = (*at, "columns", "messages") if given.get("messages") else ()
    openai = info.get("formatting") == "openai"
    role = tags.get("role_tag") or ("role" if openai else "from")
    columns: Columns
    if ranking:
        form, columns = "preference", {"prompt": (messages, where)}
        for side in ("chosen", "rejected"):
            columns[side] = (given.get(side) or side, (*at, "columns", side) if given.get(side) else ())
    elif tag:
        form, columns = "unpaired", {"prompt": (messages, where), "label": (tag, (*at, "columns", "kto_tag"))}
        job.note("kto rows that are whole conversations must be split into prompt and completion.")
    elif role == "from":
        form, columns = "sharegpt", {"conversations": (messages, where)}
    else:
        form, columns = "messages", {"messages": (messages, where)}
    _write(job, at, entry, form, columns)
    for key, value in tags.items():
        standard = {"role_tag": ("role", "from"), "content_tag": ("content", "value"), **STANDARD_TAGS}
        if value in standard.get(key, ()):
            job.not_needed([(*at, "tags", key)], "messages are read by these names")
        job.lost(
            [(*at, "tags", key)], "rename the keys and roles of the messages to role, content, user and assistant."
        )
    for key in ("system", "tools"):
        _beside(job, (*at, "columns", key), key, entry)


def _write(job: Job, at: KeyPath, entry: Entry, form: str, columns: Columns) -> None:
    """Format and columns, where this version has the format."""
    where: KeyPath = (*at, "formatting")
    if not dataset_fits("format", form):
        remedy = f"this version has no format {form}: write rows as prompt and completion, or as messages."
        job.lost([where], remedy)
        job.lost([path for _, path in columns.values() if path], remedy)
        if not job.get(*where):
            job.note(f"{entry['path'].value}: {remedy}")
        return
    entry["format"] = Item(form, job.origin(where) if job.get(*where) else f"{INFO}: {at[1]}")
    job.ledger.carried(where, "datasets.format", form)
    put_columns(job, entry, columns)


def _beside(job: Job, where: KeyPath, key: str, entry: Entry) -> None:
    """System message and tools in columns of their own."""
    name = job.get(*where)
    if not name or not job.ledger.open(where):
        return
    form = entry["format"].value if "format" in entry else ""
    reads = form in ("messages", "sharegpt", "prompt_completion", "alpaca") and dataset_fits("format", "sharegpt")
    if reads and not (form == "alpaca" and key == "tools"):
        known = entry["columns"].value if "columns" in entry else {}
        put_columns(job, entry, {**{ours: (theirs, ()) for ours, theirs in known.items()}, key: (name, where)})
    else:
        job.ledger.lost(where, f"write the {key} into the messages of each row.")


def _mixture(job: Job) -> None:
    how = job.get("mix_strategy")
    try:
        shares = [float(part) for part in names_in(job.get("interleave_probs"))]
    except ValueError:
        shares = []
    fits = dataset_fits("weight", 1.0) and len(shares) == len(job.draft.datasets) > 1
    if how == "interleave_under" and fits:
        for entry, share in zip(job.draft.datasets, shares, strict=True):
            entry["weight"] = Item(share, job.origin(("interleave_probs",)))
        job.ledger.carried(("mix_strategy",), "datasets.weight", shares)
        job.ledger.carried(("interleave_probs",), "datasets.weight", shares)
    if how == "concat":
        job.not_needed("mix_strategy", "all rows of all data sets are used")
    job.lost("mix_strategy interleave_probs", "no row is used twice: give each data set its share with limit.")
    if is_on(job.get("streaming")):
        job.lost("streaming", "save the rows that are wanted as .jsonl, or name the data set in full.")
    job.not_needed("streaming", "is off")


def _held_out_share(job: Job) -> None:
    share = job.get("val_size")
    if is_off(share):
        job.not_needed("val_size", "is off")
        return
    file = job.draft.datasets[0]["path"].value if job.draft.datasets else "FILE"
    part = f"--eval {share}" if isinstance(share, float) and share < 1 else "--eval SHARE"
    job.lost(
        "val_size",
        f"split once, so that rows stay held out: posttrain data split {file} {part} --out-train train.jsonl "
        "--out-eval eval.jsonl; then name the two in datasets and eval_datasets.",
    )
