"""Axolotl's data sets: where the rows are, and what its `type` says about their columns."""

from __future__ import annotations

from typing import Any

from posttrain.importers import scoring, templates
from posttrain.importers.draft import Item, dataset_fits
from posttrain.importers.job import Job, is_file, new_dataset, put_columns, put_dataset, put_hub_key
from posttrain.importers.ledger import is_off, section
from posttrain.recipe.yaml_lines import KeyPath

Entry = dict[str, Item]
FILE_TYPES = ("json", "jsonl", "csv", "parquet", "arrow", "text")
# type after the dot: our name: the column that Axolotl's own code reads.
PAIRS = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "icr": {"prompt": "input"},
    "prompt_pairs": {},
    "ultra": {},
    "argilla_chat": {},
}
THUMBS = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction"},
    "prompt_pairs": {},
    "ultra": {},
    "argilla_chat": {},
}
QUESTIONS = {"prompt": "question", "completion": "answer"}
ALPACA_TEXT = (
    "Axolotl writes the Alpaca instructions around each row of type alpaca; here the chat template is written around "
    "it, which is what the model is asked with later."
)
UNTEMPLATED = (
    "Axolotl puts the bare prompt before the steps; here the chat template is written around both, as around answers "
    "that are scored later."
)
UNKNOWN_TYPE = "there is no such type: set format and columns, or write the rows as messages."
ENTRY_LOST = {
    "input_format": "rows are read as text; segments with labels are not.",
    "shards": "take a part of the rows with limit.",
    "shards_idx": "take a part of the rows with limit.",
    "trust_remote_code": "data sets that need their own Python code are not read.",
    "data_dir": "name the files.",
    "message_field_training_detail": "parts of a message cannot be left out; set train: false on whole messages.",
    "train_on_eos": "the token that ends an answer is always learnt.",
    "drop_system_message": "remove the system messages from the data.",
    "field_thinking": "write the reasoning into the message.",
    "template_thinking_key": "write the reasoning into the message.",
    "split_thinking": "write the reasoning into the message.",
    "logprobs_field": "there is no distillation from stored probabilities.",
    "temperature": "there is no distillation from stored probabilities.",
    "skip": "cut the file.",
    "max_completion_length": "max_length counts prompt and answer together.",
    "step_separator": "only process reward models have steps.",
    "train_on_last_step_only": "only process reward models have steps.",
    "weight": "give each data set its share with limit.",
}
ENTRY_UNNEEDED = {
    "ds_type": "the file's name says its type",
    "preprocess_shards": "rows stream",
    "conversation": "the chat template writes the conversation",
}
ENTRY_KNOWN = frozenset(
    "path type name split revision data_files chat_template field field_messages field_tools field_chosen "
    "field_rejected text_column message_property_mappings message_field_role message_field_content "
    "message_field_training roles roles_to_train chat_template_jinja field_human field_model".split()
)


def convert(job: Job) -> None:
    for key, held_out in (("datasets", False), ("pretraining_dataset", False), ("test_datasets", True)):
        entries = job.get(key, default=[])
        entries = [entries] if isinstance(entries, str | dict) else entries
        whole = not isinstance(job.get(key), list)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            at: KeyPath = (key,) if whole else (key, index)
            _entry(job, at, entry, held_out=held_out, plain=key == "pretraining_dataset")
    share = job.get("val_set_size")
    if is_off(share):
        job.not_needed("val_set_size", "is off")
    else:
        file = job.draft.datasets[0]["path"].value if job.draft.datasets else "FILE"
        part = f"--eval {share}" if isinstance(share, float) and share < 1 else "--eval SHARE"
        job.lost(
            "val_set_size",
            f"split once, so that rows stay held out: posttrain data split {file} {part} --out-train train.jsonl "
            "--out-eval eval.jsonl; then name the two in datasets and eval_datasets.",
        )


def _entry(job: Job, at: KeyPath, given: Any, *, held_out: bool, plain: bool) -> None:
    if isinstance(given, str):
        entry = new_dataset(job, at, given, held_out=held_out)
        if plain:
            entry["format"] = Item("text", "pretraining_dataset")
        return
    if not isinstance(given, dict):
        job.ledger.lost(at, "this is no data set.")
        return
    entries = _files(job, at, given, held_out)
    for entry in entries[:1]:
        for key in ("name", "split", "revision"):
            put_hub_key(job, entry, (*at, key), key)
        _type(job, at, given, entry, plain)
    for other in entries[1:]:  # more files of one entry are read alike
        other |= {key: item for key, item in entries[0].items() if key != "path"}
    for where in [path for path in job.ledger.open_keys() if path[: len(at)] == at and len(path) > len(at)]:
        key = str(where[len(at)])
        if key not in ENTRY_LOST and key not in ENTRY_UNNEEDED and key not in ENTRY_KNOWN:
            continue
        if is_off(job.get(*where)):
            job.ledger.not_needed(where, "is off")
        elif key == "chat_template":
            templates.named(job, where, str(job.get(*where)))
        elif key in ENTRY_UNNEEDED:
            job.ledger.not_needed(where, ENTRY_UNNEEDED[key])
        else:
            job.ledger.lost(
                where, ENTRY_LOST.get(key, f"a data set of type {given.get('type')} does not read it here.")
            )


def _files(job: Job, at: KeyPath, given: dict[str, Any], held_out: bool) -> list[Entry]:
    """One entry for each file: `path` may be a file type with the files in data_files."""
    path, files = given.get("path"), given.get("data_files")
    named = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    if named and (path in FILE_TYPES or path is None):
        job.not_needed([(*at, "path")], "data_files names the files")
        entries = []
        for file in named:
            entries.append(new_dataset(job, (*at, "data_files"), str(file), held_out=held_out))
        return entries
    if not isinstance(path, str):
        job.ledger.lost(at, "it names no path.")
        return []
    entry = new_dataset(job, (*at, "path"), path, held_out=held_out)
    if named and not is_file(entry):
        job.ledger.lost((*at, "data_files"), "save those files of the data set and name each as a path.")
    return [entry]


def _type(job: Job, at: KeyPath, given: dict[str, Any], entry: Entry, plain: bool) -> None:
    kind = given.get("type")
    where: KeyPath = (*at, "type")
    if plain:
        _text(job, at, given, entry, "text_column", where)
    elif isinstance(kind, dict):
        _own_columns(job, where, kind, entry)
    elif not isinstance(kind, str):
        return
    elif kind == "stepwise_supervised" and job.draft.method == "process_reward_model":
        put_dataset(job, entry, where, "format", "stepwise")
        scoring.steps(job, (*at, "step_separator"), (*at, "train_on_last_step_only"))
        job.note(UNTEMPLATED)
    elif kind.startswith("bradley_terry.") and job.draft.method == "reward_model":
        _named(job, where, entry, "preference", {"prompt": "input"})
    elif job.draft.method in ("dpo", "simpo", "orpo", "reward_model"):
        _pairs(job, at, given, entry, kind)
    elif job.draft.method == "kto":
        columns = THUMBS.get(kind.rpartition(".")[2].partition(":")[0])
        _named(job, where, entry, "unpaired", columns)
    elif job.draft.method == "grpo":
        job.ledger.lost(where, "rows are rewritten by that Python code: save what it makes, with prompt and answer.")
    else:
        _answers(job, at, given, entry, kind)


def _answers(job: Job, at: KeyPath, given: dict[str, Any], entry: Entry, kind: str) -> None:
    where: KeyPath = (*at, "type")
    base, _, variant = kind.partition(":")[0].partition(".")
    if kind.startswith("alpaca_chat.load_qa"):
        _named(job, where, entry, "prompt_completion", QUESTIONS)
    elif base in ("alpaca", "alpaca_chat", "alpaca_w_system") and variant in ("", "load", "load_concise"):
        job.note(ALPACA_TEXT)
        if put_dataset(
            job, entry, where, "format", "alpaca", "write rows as prompt and completion: `input` is not read."
        ):
            return
        put_columns(job, entry, {"prompt": ("instruction", ()), "completion": ("output", ())})
        entry["format"] = Item("prompt_completion", job.origin(where))
    elif base in ("completion", "pretrain"):
        _text(job, at, given, entry, "field", where)
    elif base in ("sharegpt", "chat_template"):
        _conversation(job, at, given, entry, base)
    else:
        job.ledger.lost(where, UNKNOWN_TYPE)


def _named(job: Job, where: KeyPath, entry: Entry, form: str, columns: dict[str, str] | None) -> None:
    if columns is None:
        job.ledger.lost(where, UNKNOWN_TYPE)
    elif put_dataset(job, entry, where, "format", form):
        put_columns(job, entry, {ours: (theirs, ()) for ours, theirs in columns.items()})


def _text(job: Job, at: KeyPath, given: dict[str, Any], entry: Entry, column: str, where: KeyPath) -> None:
    entry["format"] = Item("text", job.origin(where) if "type" in given else "pretraining_dataset")
    job.ledger.carried(where, "datasets.format", "text")
    if given.get(column) is not None:
        put_columns(job, entry, {"text": (str(given[column]), (*at, column))})


def _conversation(job: Job, at: KeyPath, given: dict[str, Any], entry: Entry, base: str) -> None:
    """Messages with role and content, or with from and value."""
    mapping = section(given.get("message_property_mappings"))
    role = str(mapping.get("role") or given.get("message_field_role") or ("from" if base == "sharegpt" else "role"))
    content = str(mapping.get("content") or given.get("message_field_content") or "")
    form, column = ("sharegpt", "conversations") if role == "from" else ("messages", "messages")
    properties: list[KeyPath] = [(*at, "message_property_mappings", key) for key in mapping]
    properties += [(*at, key) for key in ("message_field_role", "message_field_content") if given.get(key)]
    if role not in ("role", "from") or content not in ("", "value", "content"):
        remedy = "rename the keys of each message to role and content."
        for where in properties:
            job.ledger.lost(where, remedy)
    remedy = "write the messages with role and content, then set format: messages."
    if put_dataset(job, entry, (*at, "type"), "format", form, remedy):
        for where in properties:
            job.ledger.carried(where, "datasets.format", form)
    for where in properties:
        job.ledger.lost(where, remedy)
    theirs = str(given.get("field_messages") or ("conversations" if base == "sharegpt" else "messages"))
    put_columns(job, entry, {column: (theirs, (*at, "field_messages") if given.get("field_messages") else ())})
    if given.get("field_tools"):
        put_columns(job, entry, _with(entry, "tools", str(given["field_tools"]), (*at, "field_tools")))
    if given.get("message_field_training") is not None:
        if given["message_field_training"] == "train":
            job.not_needed([(*at, "message_field_training")], "train: false on a message is read")
        job.ledger.lost((*at, "message_field_training"), "rename that key of the messages to train.")
    trained = given.get("roles_to_train")
    if isinstance(trained, list) and all(role in ("assistant", "gpt") for role in trained):
        job.not_needed([(*at, "roles_to_train")], "only answers carry loss")
    elif trained is not None:
        job.ledger.lost((*at, "roles_to_train"), "only the assistant's messages carry loss.")
    for name in section(given.get("roles")):
        job.ledger.lost(
            (*at, "roles", name), "roles are user, assistant, system and tool, or human and gpt: rename others."
        )


def _with(entry: Entry, ours: str, theirs: str, at: KeyPath) -> dict[str, tuple[str, KeyPath]]:
    """The columns of an entry and one more."""
    written = entry["columns"].value if "columns" in entry else {}
    known: dict[str, tuple[str, KeyPath]] = {key: (column, ()) for key, column in written.items()}
    return {**known, ours: (theirs, at)}


def _pairs(job: Job, at: KeyPath, given: dict[str, Any], entry: Entry, kind: str) -> None:
    where: KeyPath = (*at, "type")
    base, _, variant = kind.partition(":")[0].rpartition(".")
    if (base == "chat_template" and variant == "default") or kind == "chat_template":
        columns: dict[str, tuple[str, KeyPath]] = {}
        for ours, key, usual in (
            ("prompt", "field_messages", "messages"),
            ("chosen", "field_chosen", "chosen"),
            ("rejected", "field_rejected", "rejected"),
        ):
            columns[ours] = (str(given.get(key) or usual), (*at, key) if given.get(key) else ())
        put_dataset(job, entry, where, "format", "preference")
        put_columns(job, entry, columns)
        for key in [k for k in given if str(k).startswith("message_") or k == "roles"]:
            job.ledger.lost((*at, key), "messages must have role and content, or from and value: rename other keys.")
    else:
        _named(job, where, entry, "preference", PAIRS.get(variant or kind))


OWN = {
    "sft": ("prompt_completion", {"prompt": "field_instruction", "completion": "field_output"}),
    "kto": ("unpaired", {"prompt": "field_prompt", "completion": "field_completion", "label": "field_label"}),
}
OWN_PAIRS = ("preference", {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected"})
OWN_DEFAULTS = {"field_instruction": "instruction", "field_output": "output"}


def _own_columns(job: Job, where: KeyPath, kind: dict[str, Any], entry: Entry) -> None:
    """A type written out in the file: which columns, and text around them, which the chat template replaces."""
    form, names = OWN.get(job.draft.method, OWN_PAIRS)
    if not dataset_fits("format", form):
        job.ledger.lost(where, f"data sets of this version have no format {form}.")
        return
    entry["format"] = Item(form, job.origin(where))
    columns: dict[str, tuple[str, KeyPath]] = {}
    for ours, key in names.items():
        theirs = kind.get(key) or OWN_DEFAULTS.get(key)
        if theirs:
            columns[ours] = (str(theirs), (*where, key) if kind.get(key) else ())
    put_columns(job, entry, columns)
    for key, value in kind.items():
        alone = isinstance(value, str) and value.strip() in [f"{{{name}}}" for name in ("instruction", *names)]
        if is_off(value) or alone:
            job.not_needed([(*where, key)], "adds nothing to the column")
        elif key in ("field_input", "field_system"):
            job.ledger.lost((*where, key), "join it with the prompt, or write rows as messages.")
        else:
            job.ledger.lost((*where, key), "the chat template is written around rows; put other text into the data.")
