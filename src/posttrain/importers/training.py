"""What the tools share: batch, schedule, precision, optimiser, evaluation, as transformers' trainers name them."""

from __future__ import annotations

from posttrain.importers.job import Job, Tables, by_reason
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe.yaml_lines import KeyPath

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
ADAMW = frozenset(
    "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adamw_anyprecision "
    "paged_adamw paged_adamw_32bit".split()
)
ADAMW_8BIT = {
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
ONE_PROCESS = (
    "one process trains. Where it does not fit, use adapter: lora, gradient_checkpointing or micro_batch_tokens."
)
MLFLOW = "runs are tracked in MLflow: MLFLOW_TRACKING_URI names a server."
NO_PADDING = "rows are laid end to end without padding"
ATTENTION = "attention is chosen for the machine"
PREPARED = "rows are prepared when the stage starts"
LOADING = "batches are made without loader processes"
UPLOAD = "nothing is uploaded: push the artefact folder yourself."
OUTPUT = "runs and artefacts lie under the home folder (--home)"

# transformers' TrainingArguments, which two of the tools take whole.
TRAINER = Tables(
    same={
        "learning_rate": "learning_rate",
        "weight_decay": "weight_decay",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_epsilon": "adam_epsilon",
        "max_grad_norm": "max_grad_norm",
    },
    unneeded=by_reason(
        {
            OUTPUT: "output_dir overwrite_output_dir logging_dir",
            LOADING: "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
            "dataloader_persistent_workers remove_unused_columns",
            NO_PADDING: "group_by_length length_column_name eval_accumulation_steps per_device_eval_batch_size "
            "eval_batch_size auto_find_batch_size",
            "the newest checkpoint is kept, and is always safetensors": "save_total_limit save_safetensors",
            "every step's figures go to metrics.jsonl": "logging_strategy logging_first_step logging_nan_inf_filter "
            "include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica disable_tqdm",
            "one process trains, so there is nothing to tune": "ddp ddp_timeout ddp_backend ddp_bucket_cap_mb "
            "ddp_find_unused_parameters ddp_broadcast_buffers local_rank average_tokens_across_devices "
            "ignore_data_skip log_on_each_node save_on_each_node",
            "recomputation is set up by gradient_checkpointing alone": "gradient_checkpointing_kwargs",
            "posttrain run RECIPE trains and evaluates": "do_train do_eval do_predict",
            "only float32 matrix products would change, and they stay exact": "tf32",
            "a stage that was started goes on where it stopped": "resume_from_checkpoint auto_resume_from_checkpoints",
            "every random choice takes its seed from the recipe's": "data_seed full_determinism",
        }
    ),
    missing=by_reason(
        {
            ONE_PROCESS: "deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap parallelism_config "
            "accelerator_config accelerate_config ray_scope",
            UPLOAD: "push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision hub_token "
            "hub_always_push push_to_hub_model_id",
            "no noise is added to embeddings.": "neftune_noise_alpha",
            "targets are not smoothed.": "label_smoothing_factor",
            "models are not compiled.": "torch_compile torch_compile_backend torch_compile_mode",
            "nothing stops early; see load_best_model_at_end.": "early_stopping_patience",
            "checkpoints hold what resuming needs.": "save_only_model",
            "the last incomplete batch is trained on.": "dataloader_drop_last",
            "only AdamW is used; its settings are adam_beta1, adam_beta2, adam_epsilon.": "optim_args adafactor "
            "optim_target_modules",
            "evaluation runs after training; set eval_steps.": "eval_delay eval_on_start",
            "the loss is exact as it is; no kernels are swapped in.": "liger_kernel_config",
        }
    ),
    handled=frozenset(
        "seed run_name num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
        "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio bf16 fp16 bf16_full_eval fp16_full_eval "
        "optim gradient_checkpointing eval_strategy evaluation_strategy eval_steps load_best_model_at_end "
        "metric_for_best_model greater_is_better save_strategy save_steps logging_steps report_to "
        "use_liger_kernel".split()
    ),
)


def batch(job: Job, per: str, accumulate: str, default: int, *, total: str = "", group: int = 1, packed: bool) -> None:
    """Rows per optimiser step: rows per pass × passes × processes. With `group` answers a prompt, prompts per step."""
    rows = job.number(per, default=float(default)) or default
    passes = job.number(accumulate, default=1.0) or 1.0
    whole = job.number(total) if total else None
    per_process = whole or rows * passes
    step = round(per_process * (job.processes or 1))
    keys: list[KeyPath] = [(key,) for key in (per, accumulate, total) if key and job.ledger.says(key)]
    said = f"{per} {rows:g} × {accumulate} {passes:g}" if not whole else f"{total} {whole:g}"
    said += f" × {job.processes} processes" if job.processes else ""
    said += f" ÷ {group} answers a prompt" if group > 1 else ""
    value = max(1, -(-step // group))
    if keys:
        job.draft.put("per_device_train_batch_size", value, said)
    else:
        job.add("per_device_train_batch_size", value, f"{job.tool}'s default")
    for key in keys:
        job.ledger.carried(key, "per_device_train_batch_size", value)
    if job.processes is None:
        job.note(
            f"per_device_train_batch_size = {value} counts one process. If {job.tool} ran on N GPUs, import again with "
            "--processes N."
        )
    if step % group:
        job.note(f"{step} answers a step are no whole number of groups of {group}; the recipe takes {value} prompts.")
    if packed:
        job.note(
            f"with packing a row of {job.tool} is a block of many examples; here a row is one example. A step there "
            f"learnt from about {step} × {job.draft.value('max_length', 2048)} tokens: divide by the mean length of "
            "your examples, and raise per_device_train_batch_size to that."
        )


def processes(job: Job, key: str) -> None:
    """Take the number of processes from the file where the command line does not say it."""
    count = job.number(key)
    if job.processes is not None or count is None or count < 1:
        job.not_needed(key, "--processes says it" if job.processes else "it says no number")
    else:
        job.processes = int(count)
        job.ledger.carried((key,), "per_device_train_batch_size", f"× {job.processes}")


def duration(job: Job, epochs: str, default_epochs: float) -> None:
    """max_steps overrides the number of passes, there as here."""
    steps = job.number("max_steps")
    if steps is not None and steps > 0:
        job.move(("max_steps",), "max_steps")
        job.not_needed([(epochs,)] if job.ledger.says(epochs) else [], "max_steps overrides it")
        return
    job.not_needed([("max_steps",)] if job.ledger.says("max_steps") else [], "is off")
    if job.ledger.says(epochs):
        job.move((epochs,), "num_train_epochs")
    else:
        job.add("num_train_epochs", default_epochs, f"{job.tool}'s default")


def schedule(job: Job, key: str, default: str, *, default_warmup: float = 0.0) -> None:
    """The curve of the learning rate, its end and its warm-up."""
    name = str(job.get(key, default=default))
    if job.ledger.says(key):
        remedy = f"there is no schedule {name}: cosine, linear and constant are. The recipe takes its default, cosine."
        job.move((key,), "lr_scheduler_type", SCHEDULES.get(name, name), remedy=remedy)
    else:
        job.add("lr_scheduler_type", SCHEDULES[default], f"{job.tool}'s default")
    _end_of_schedule(job, name)
    _warmup(job, name, default_warmup)


def _end_of_schedule(job: Job, name: str) -> None:
    options = job.get("lr_scheduler_kwargs")
    for option in options if isinstance(options, dict) else ():
        at = ("lr_scheduler_kwargs", option)
        rate, lowest = job.number("learning_rate"), job.number(*at)
        if option == "min_lr_rate" and "min_lr" in name:
            job.move(at, "min_lr_ratio", lowest)
        elif option == "min_lr" and "min_lr" in name and rate and lowest is not None:
            job.move(at, "min_lr_ratio", round(lowest / rate, 9))
        else:
            job.lost([at], "schedules have one option here: min_lr_ratio.")


def _warmup(job: Job, name: str, default: float) -> None:
    steps, ratio = job.number("warmup_steps"), job.number("warmup_ratio")
    said: list[KeyPath] = [(key,) for key in ("warmup_steps", "warmup_ratio") if job.ledger.says(key)]
    if name == "constant":  # transformers' constant schedule has none; ours has what it is given
        job.not_needed(said, "transformers' constant schedule does not warm up")
        job.add("warmup_steps", 0, "transformers' constant schedule does not warm up")
    elif steps is not None and steps >= 1:
        job.move(("warmup_steps",), "warmup_steps")
        job.not_needed(said[1:], "warmup_steps overrides it")
    elif steps is not None and steps > 0:
        job.move(("warmup_steps",), "warmup_ratio")  # transformers 5: a share below 1
        job.not_needed(said[1:], "warmup_steps overrides it")
    elif ratio is not None:
        job.move(("warmup_ratio",), "warmup_ratio")
        job.not_needed([at for at in said if at != ("warmup_ratio",)], "warmup_ratio says it")
    elif steps is not None:
        job.move(("warmup_steps",), "warmup_steps", 0)
    else:
        job.add("warmup_ratio", default, f"{job.tool}'s default")


def precision(job: Job, bfloat: str, halves: str, *, default: str) -> None:
    """Weights that are trained stay float32 here; dtype is what a pass computes in, as mixed precision is there."""
    for key in halves.split():
        job.lost(
            [(key,)] if job.ledger.says(key) else [],
            "half precision is not trained in. The recipe uses dtype: auto, which is bfloat16 on a GPU.",
        )
    value = job.get(bfloat)
    half = any(is_on(job.get(key)) for key in halves.split())
    if value is None or half:
        job.not_needed([(bfloat,)] if value is not None else [], "half precision was asked for instead")
        job.add("dtype", "auto" if half else default, f"{job.tool}'s default")
    elif value == "auto":
        job.move((bfloat,), "dtype", "auto")
    else:
        job.move((bfloat,), "dtype", "bfloat16" if is_on(value) else "float32")


def optimiser(job: Job, key: str) -> None:
    name = str(job.get(key, default="")).lower()
    if not name:
        return
    if name in ADAMW:
        if job.draft.fitting("optim", "adamw")[1]:
            job.not_needed([(key,)], "the optimiser is AdamW")
        else:
            job.move((key,), "optim", "adamw")
    elif name in ADAMW_8BIT:
        remedy = "AdamW keeps its state in full precision: more memory, otherwise the same."
        job.move((key,), "optim", ADAMW_8BIT[name], remedy=remedy)
    else:
        job.lost([(key,)], f"the optimiser is AdamW. Rates that suit {name} may not suit it: look at learning_rate.")


def checkpointing(job: Job, key: str = "gradient_checkpointing") -> None:
    value = job.get(key)
    if value is not None:
        job.move((key,), "gradient_checkpointing", not is_off(value))


def saving(job: Job) -> None:
    """Checkpoints and log lines change no result; steps are carried, the rest is said."""
    steps = job.number("save_steps")
    if steps is not None and steps < 1:
        job.lost([("save_steps",)], "save_steps counts steps; a share of the run is not read.")
    elif steps is not None:
        job.move(("save_steps",), "save_steps")
    strategy = str(job.get("save_strategy", default=""))
    if strategy in ("steps", "no"):
        job.not_needed("save_strategy", "a checkpoint is written every save_steps, and the last always")
    elif strategy:
        job.lost("save_strategy", f"no checkpoint at each {strategy}: set save_steps to that many steps.")
    logs = job.number("logging_steps")
    if logs is not None and logs < 1:
        job.lost([("logging_steps",)], "logging_steps counts steps; a share of the run is not read.")
    elif logs is not None:
        job.move(("logging_steps",), "logging_steps")


def evaluating(job: Job) -> None:
    """Needs the draft's eval_datasets."""
    held_out = bool(job.draft.eval_datasets)
    nothing = "there are no eval_datasets"
    for key in ("eval_strategy", "evaluation_strategy"):
        if not job.ledger.says(key):
            continue
        if is_off(job.get(key)) or not held_out:
            job.not_needed(key, "is off" if is_off(job.get(key)) else nothing)
        elif job.get(key) == "steps":
            job.not_needed(key, "eval_steps says when")
        else:
            job.lost(key, f"not measured at each {job.get(key)}: set eval_steps to that many steps.")
    steps = job.number("eval_steps")
    if steps is not None and not held_out:
        job.not_needed("eval_steps", nothing)
    elif steps is not None and steps < 1:
        job.lost("eval_steps", "eval_steps counts steps; a share of the run is not read.")
    elif steps is not None:
        job.move(("eval_steps",), "eval_steps")
    best = job.get("load_best_model_at_end")
    if best is not None and is_on(best) and not job.draft.has("eval_steps"):
        job.lost("load_best_model_at_end", "it needs eval_datasets and eval_steps: set both, then this.")
    elif best is not None:
        job.move(("load_best_model_at_end",), "load_best_model_at_end")
    metric = job.get("metric_for_best_model")
    if metric in ("loss", "eval_loss"):
        job.not_needed("metric_for_best_model greater_is_better", "the best checkpoint is the one of the lowest loss")
    elif metric is not None or job.ledger.says("greater_is_better"):
        job.lost("metric_for_best_model greater_is_better", "the best checkpoint is the one of the lowest loss.")


def tracking(job: Job) -> None:
    to = job.get("report_to")
    names = [str(name) for name in (to if isinstance(to, list) else [to]) if not is_off(name)]
    if to is None:
        return
    if set(names) <= {"mlflow"}:
        job.not_needed("report_to", "is off" if not names else "runs are tracked in MLflow")
    else:
        job.lost("report_to", MLFLOW)


def trainer(job: Job, *, epochs: float, packed: bool, group: int = 1, batch_size: int = 8, dtype: str) -> None:
    """Everything of transformers' TrainingArguments that needs thought, with its defaults where ours differ."""
    duration(job, "num_train_epochs", epochs)
    batch(job, "per_device_train_batch_size", "gradient_accumulation_steps", batch_size, group=group, packed=packed)
    schedule(job, "lr_scheduler_type", "linear")
    precision(job, "bf16", "fp16 fp16_full_eval", default=dtype)
    job.not_needed([("bf16_full_eval",)] if job.ledger.says("bf16_full_eval") else [], "dtype says it")
    optimiser(job, "optim")
    saving(job)
    evaluating(job)
    tracking(job)
    job.not_needed("use_liger_kernel", "the output layer never forms the logits of a batch")
    if not job.ledger.says("weight_decay"):
        job.add("weight_decay", 0.0, f"{job.tool}'s default")
    if job.ledger.says("seed"):
        job.move_top(("seed",), "seed", job.get("seed"))
