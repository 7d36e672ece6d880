"""YAML files of TRL's command line: trl sft --config FILE, and dpo, kto, grpo. The file does not name its method."""

from __future__ import annotations

from typing import Any

from posttrain.importers import adapters, rewards, scoring, templates, training
from posttrain.importers.draft import Item, dataset_fits
from posttrain.importers.job import (
    Job,
    Tables,
    by_reason,
    is_file,
    new_dataset,
    put_columns,
    put_dataset,
    put_hub_key,
    put_model,
)
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe.yaml_lines import KeyPath

METHOD_OF = {
    "sft": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "cpo": "cpo",
    "grpo": "grpo",
    "reward": "reward_model",
    "prm": "process_reward_model",
}
# Keys that only one command of TRL has. The first that is there decides.
TELLING = {
    "prm": "step_separator train_on_last_step_only",
    "grpo": "reward_funcs num_generations max_completion_length num_iterations reward_weights",
    "kto": "desirable_weight undesirable_weight",
    "dpo": "f_divergence_type f_alpha_divergence_coef rpo_alpha ld_alpha discopop_tau use_weighting reference_free "
    "label_smoothing loss_weights precompute_ref_log_probs",
    "reward": "center_rewards_coefficient",
    "sft": "dataset_text_field packing packing_strategy eval_packing completion_only_loss assistant_only_loss "
    "max_seq_length eos_token chat_template_path",
}
SAME_PREFERENCE = (
    "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef discopop_tau ld_alpha "
    "use_weighting precompute_ref_log_probs sync_ref_model ref_model_mixup_alpha ref_model_sync_steps "
    "desirable_weight undesirable_weight simpo_gamma cpo_alpha alpha".split()
)
RATES = {"sft": 2e-5, "grpo": 1e-6, "reward_model": 1e-4, "process_reward_model": 1e-5}
TABLES = training.TRAINER | Tables(
    same={"dataset_num_proc": "dataset_num_proc", "center_rewards_coefficient": "center_rewards_coefficient"},
    unneeded=by_reason(
        {
            training.NO_PADDING: "packing packing_strategy eval_packing padding_free pad_to_multiple_of "
            "label_pad_token_id padding_value pad_token",
            training.ATTENTION: "attn_implementation use_flash_attention_2",
            training.LOADING: "dataset_batch_size precompute_ref_batch_size",
            "dtype says what a pass computes in; trained weights are kept in float32": "dtype torch_dtype",
            "it changes how TRL runs, not what is learnt": "ignore_bias_buffers gradient_checkpointing_use_reentrant "
            "activation_offloading use_logits_to_keep padding_side generate_during_eval use_liger_loss env "
            "sanity_check "
            "disable_dropout bnb_4bit_quant_storage "
            "model_adapter_name ref_adapter_name lora_task_type num_machines machine_rank main_process_port "
            "shuffle_dataset project trackio_space_id",
            "the token that ends an answer is the template's": "eos_token",
        }
    ),
    missing=by_reason(
        {
            "models that need their own Python code are not loaded.": "trust_remote_code",
            "save that revision of the model and name its folder as the model.": "model_revision",
            "the model is taken as its config.json says: change that file.": "model_init_kwargs",
            "rows are always prepared from text.": "dataset_kwargs",
            training.ONE_PROCESS: "use_deepspeed use_fsdp multi_gpu distributed_type mixed_precision",
            "add the likelihood of the chosen answer: loss_type: [sigmoid, sft], with loss_weights.": "rpo_alpha",
            "a reference is always used: see simpo for a method without one.": "reference_free",
            "the reference is the model the stage starts from.": "force_use_ref_model ref_model_init_kwargs",
            "adapters go on layers: name them in lora.target_modules.": "lora_target_parameters",
            "prompts are never cut: max_length bounds prompt and answer together.": "max_prompt_length",
            "rows end in one bucket: on_overflow cuts at the end.": "truncation_mode",
            "answers are bounded by max_length.": "max_completion_length",
            "there is no share to hold out here: posttrain data split makes two files.": "test_split_size",
            "save the rows that are wanted as .jsonl, or name the data set in full.": "dataset_streaming streaming",
        }
    ),
    handled=frozenset(
        "model_name_or_path dataset_name dataset_config dataset_train_split dataset_test_split datasets "
        "dataset_text_field max_length max_seq_length completion_only_loss assistant_only_loss chat_template_path "
        "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora "
        "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant num_processes loss_type step_separator "
        "train_on_last_step_only".split()
    )
    | frozenset(SAME_PREFERENCE)
    | rewards.KEYS
    - frozenset("disable_dropout shuffle_dataset use_liger_loss max_completion_length max_prompt_length".split()),
)


def method_of(data: dict[str, Any], file_stem: str) -> str:
    """The command of TRL this file is for, by keys that only one has, then by the file's name; "" if nothing says."""
    for method, keys in TELLING.items():
        if any(data.get(key) is not None for key in keys.split()):
            return method
    words = file_stem.lower().replace("-", "_").split("_")
    return next((method for method in METHOD_OF if method in words), "")


def convert(job: Job) -> None:
    """Fill the draft from the ledger."""
    method = job.draft.method
    put_model(job, "model_name_or_path")
    _datasets(job)
    if method != "grpo":
        _length(job)
    _adapter(job)
    training.processes(job, "num_processes")
    rate = RATES.get(method, 1e-6)
    if not job.ledger.says("learning_rate"):
        job.add("learning_rate", rate, "TRL's default")
    group = rewards.group_size(job, ()) if method == "grpo" else 1
    _precision(job)
    training.trainer(job, epochs=3.0, packed=is_on(job.get("packing")), group=group, dtype="auto")
    training.checkpointing(job)
    job.add("gradient_checkpointing", True, "TRL's default")
    if method == "grpo":
        rewards.grpo(job, ())
    elif method == "sft":
        _what_is_learnt(job)
    elif scoring.makes_scores(job):
        _scores(job)
    else:
        _preference(job)
    if job.ledger.says("chat_template_path"):
        templates.from_file(job, ("chat_template_path",), str(job.get("chat_template_path")))


def _precision(job: Job) -> None:
    """`dtype` is what weights are loaded in. Without bf16 and fp16 it is also what TRL computes in."""
    for key in ("dtype", "torch_dtype"):
        value = job.get(key)
        if value is not None and not job.ledger.says("bf16") and not is_on(job.get("fp16")):
            if not job.draft.has("dtype"):
                job.move((key,), "dtype", remedy="half precision is not trained in. The recipe uses dtype: auto.")
        elif value == "float16":
            job.lost(key, "half precision is not trained in.")


def _datasets(job: Job) -> None:
    held_out = not is_off(job.get("eval_strategy", default=job.get("evaluation_strategy"))) or is_on(job.get("do_eval"))
    listed = job.get("datasets")
    for index, given in enumerate(listed if isinstance(listed, list) else []):
        _mixed(job, ("datasets", index), given)
    if not isinstance(listed, list) and job.ledger.says("dataset_name"):
        entry = new_dataset(job, ("dataset_name",), str(job.get("dataset_name")))
        put_hub_key(job, entry, ("dataset_config",), "name")
        put_hub_key(job, entry, ("dataset_train_split",), "split")
        _text_field(job, entry)
        if held_out:
            _test_split(job, entry)
    job.not_needed("dataset_name dataset_config", "datasets names the data sets")
    job.not_needed("dataset_train_split", "datasets names the data sets")
    job.not_needed("dataset_text_field", "it is read for rows of plain text only")
    job.not_needed("dataset_test_split", "nothing is evaluated: eval_strategy is off")


def _mixed(job: Job, at: KeyPath, given: Any) -> None:
    path = given.get("path") if isinstance(given, dict) else None
    if not isinstance(path, str):
        job.ledger.lost(at, "this entry names no path.")
        return
    files = given.get("data_files")
    if path in ("json", "csv", "parquet", "arrow", "text") and isinstance(files, str):
        job.not_needed([(*at, "path")], "data_files names the file")
        entry = new_dataset(job, (*at, "data_files"), files)
    else:
        entry = new_dataset(job, (*at, "path"), path)
    for key in ("name", "split"):
        put_hub_key(job, entry, (*at, key), key)
    job.lost([(*at, "data_files"), (*at, "data_dir")], "save those files of the data set and name each as a path.")
    columns = given.get("columns")
    if isinstance(columns, list):
        job.not_needed([(*at, "columns")], "columns that no format reads are left alone")
    _text_field(job, entry)


def _text_field(job: Job, entry: dict[str, Item]) -> None:
    field = job.get("dataset_text_field")
    if field is None or field == "text" or job.draft.method != "sft":
        return
    if put_dataset(job, entry, ("dataset_text_field",), "format", "text"):
        put_columns(job, entry, {"text": (str(field), ())})


def _test_split(job: Job, entry: dict[str, Item]) -> None:
    """TRL measures on the test split whenever eval_strategy is on."""
    split = str(job.get("dataset_test_split", default="test"))
    if is_file(entry) or not dataset_fits("split", split):
        job.lost("dataset_test_split", "save the held-out rows as .jsonl and name them in eval_datasets.")
        job.note(f"TRL evaluates on the split {split}; here eval_datasets names held-out rows.")
        return
    held_out = {key: item for key, item in entry.items() if key != "limit"}
    job.draft.eval_datasets.append({**held_out, "split": Item(split, "dataset_test_split")})
    job.ledger.carried(("dataset_test_split",), "eval_datasets.split", split)


def _length(job: Job) -> None:
    for key in ("max_length", "max_seq_length"):
        if job.ledger.says(key) and not job.draft.has("max_length"):
            job.move((key,), "max_length")
        job.not_needed(key, "max_length says it" if job.ledger.says(key) else "is empty: rows are not cut")
    job.add("max_length", 1024, "TRL's default")
    scoring.overflow(job, "truncate", "TRL cuts longer rows")


def _adapter(job: Job) -> None:
    on = is_on(job.get("use_peft"))
    said: list[KeyPath] = [("use_peft",)] if job.ledger.says("use_peft") else []
    four: list[KeyPath] = [("load_in_4bit",)]
    if not on:
        job.lost([*four, ("load_in_8bit",)], "TRL needs use_peft to train on a quantised base.")
    adapters.choose(job, said, on=on, four=four, eight=[("load_in_8bit",)], dora="use_dora")
    names = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    names |= {"lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora"}
    if job.ledger.says("lora_target_modules"):
        adapters.targets(job, ("lora_target_modules",), ("all-linear",))
    elif on:
        job.note(adapters.PEFT_CHOICE.format(tool="TRL"))
    adapters.keys(job, names, {"r": 16, "alpha": 32, "dropout": 0.05})
    adapters.quantisation(job, ("bnb_4bit_quant_type",), ("use_bnb_nested_quant",), [])


def _what_is_learnt(job: Job) -> None:
    """TRL learns prompts too unless it is told not to; here only answers carry loss."""
    newer = not job.draft.fitting("loss_on", "all")[1]
    only = [key for key in ("assistant_only_loss", "completion_only_loss") if is_on(job.get(key))]
    for key in ("assistant_only_loss", "completion_only_loss"):
        value = job.get(key)
        if key in only:
            job.not_needed(key, "only answers carry loss")
        elif value is not None and key == "completion_only_loss" and not only:
            job.move((key,), "loss_on", "all", remedy="prompts never carry loss here, except in rows of plain text.")
        job.not_needed(key, "is off")
    plain = all("format" in entry and entry["format"].value == "text" for entry in job.draft.datasets)
    if not only and not plain:
        how = "To learn whole conversations as TRL does, set loss_on: all." if newer else ""
        job.note(
            f"without assistant_only_loss TRL learns the prompts of conversations too; here answers only. {how}".strip()
        )
    loss = job.get("loss_type")
    if loss in ("nll", "chunked_nll"):
        job.not_needed("loss_type", "it is the loss of sft")
    job.lost("loss_type", f"sft has one loss, the likelihood of the answers, and no {loss}.")


def _scores(job: Job) -> None:
    """Of reward and prm."""
    method = job.draft.method
    job.not_needed([(key,) for key in SAME_PREFERENCE if job.ledger.says(key)], f"{method} does not read it")
    if method == "reward_model":
        job.note(scoring.MARGINS)
    else:
        scoring.steps(job, ("step_separator",), ("train_on_last_step_only",))


def _preference(job: Job) -> None:
    for key in SAME_PREFERENCE:
        value = job.get(key)
        if value is None:
            continue
        refused = job.draft.fitting(key, value)[1]
        if refused and (is_off(value) or (key == "f_divergence_type" and value == "reverse_kl")):
            job.not_needed(key, "is off, or says what happens here anyway")
        elif refused and key == "precompute_ref_log_probs":
            job.not_needed(key, "the reference is asked once, before the first step")
        elif refused and job.draft.method == "kto" and key == "loss_type" and value == "kto":
            job.not_needed(key, "it is the loss of kto")
        else:
            job.move((key,), key)
    if not job.ledger.says("beta"):
        job.add("beta", 0.1, "TRL's default")
