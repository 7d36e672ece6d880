"""Axolotl configurations. Method: `rl`, or SFT without it."""

from __future__ import annotations

from posttrain.importers import adapters, axolotl_data, rewards, scoring, templates, training
from posttrain.importers.job import Job, Tables, by_reason, put_model
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe.yaml_lines import KeyPath

METHOD_OF = {"": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo"}
SCORING = ("reward_model", "process_reward_model")  # switches, and methods of the same names here
METHOD_OF |= {name: name for name in SCORING}
QUANTISED = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
TABLES = Tables(
    same={
        "learning_rate": "learning_rate",
        "weight_decay": "weight_decay",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_epsilon": "adam_epsilon",
        "max_grad_norm": "max_grad_norm",
        "cosine_min_lr_ratio": "min_lr_ratio",
        "dataset_processes": "dataset_num_proc",
        "dataset_num_proc": "dataset_num_proc",
        "center_rewards_coefficient": "center_rewards_coefficient",
    },
    unneeded=by_reason(
        {
            training.OUTPUT: "output_dir",
            training.NO_PADDING: "sample_packing eval_sample_packing pad_to_sequence_len group_by_length "
            "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially multipack_real_batches "
            "batch_flattening eval_batch_size auto_find_batch_size micro_batch_tokens",
            training.ATTENTION: "flash_attention sdp_attention xformers_attention flex_attention eager_attention "
            "attn_implementation flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp "
            "flash_optimum flex_attn_compile_kwargs",
            "kernels are chosen for the machine": "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
            "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
            "liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy "
            "liger_cross_entropy cut_cross_entropy use_kernels",
            "classes are found by the model's config.json": "model_type tokenizer_type is_llama_derived_model "
            "is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model processor_type "
            "tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files cls_model_config base_model_config",
            training.PREPARED: "dataset_prepared_path dataset_keep_in_memory shuffle_merged_datasets "
            "dataset_shard_num dataset_shard_idx is_preprocess skip_prepare_dataset",
            training.LOADING: "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
            "remove_unused_columns",
            "the newest checkpoint is kept, and is always safetensors": "save_total_limit save_safetensors",
            "a stage that was started goes on where it stopped": "resume_from_checkpoint auto_resume_from_checkpoints",
            "one process trains, so there is nothing to tune": "ddp ddp_timeout ddp_bucket_cap_mb "
            "ddp_broadcast_buffers ddp_find_unused_parameters local_rank device device_map low_cpu_mem_usage "
            "fsdp_final_state_dict_type qlora_sharded_model_loading lora_on_cpu max_memory gpu_memory_limit",
            "only float32 matrix products would change, and they stay exact": "tf32",
            "unknown keys are always refused": "strict",
            "every step's figures go to metrics.jsonl": "profiler_steps include_tokens_per_second gc_steps "
            "include_tkps debug",
            "recomputation is set up by gradient_checkpointing alone": "gradient_checkpointing_kwargs",
            "an adapter stage saves the merged model as well": "merge_lora merge_method lora_out_dir",
            "a run stops by itself when its loss is no number": "loss_watchdog_threshold loss_watchdog_patience",
        }
    ),
    missing=by_reason(
        {
            training.ONE_PROCESS: "deepspeed fsdp fsdp_config fsdp_version accelerator_config "
            "sequence_parallel_degree context_parallel_size tensor_parallel_size dp_shard_size heads_k_stride "
            "ring_attn_func use_ray ray_run_name",
            training.UPLOAD: "hub_model_id hub_strategy hub_revision push_dataset_to_hub push_to_hub",
            training.MLFLOW: "wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_mode "
            "wandb_log_model "
            "use_wandb use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts "
            "use_comet comet_project_name comet_workspace use_tensorboard",
            "the tokenizer is taken as it is: add tokens to the model's folder first.": "tokens "
            "special_tokens added_tokens_overrides resize_token_embeddings_to_32x tokenizer_config eot_tokens "
            "fix_untrained_tokens shrink_embeddings mean_resizing_embeddings",
            "models that need their own Python code are not loaded.": "trust_remote_code",
            "save that revision of the model and name its folder as the model.": "revision_of_model",
            "the model is taken as its config.json says: change that file.": "overrides_of_model_config rope_scaling "
            "model_config",
            "merge that adapter into its base and name the result as the model.": "lora_model_dir",
            "no noise is added to embeddings.": "neftune_noise_alpha noisy_embedding_alpha",
            "one learning rate for all trained weights.": "embedding_lr embedding_lr_scale lr_groups "
            "loraplus_lr_embedding",
            "schedules are cosine, linear and constant, with min_lr_ratio.": "cosine_constant_lr_ratio lr_div_factor "
            "lr_quadratic_warmup",
            "every layer is trained, or adapted by name: lora.target_modules.": "unfrozen_parameters "
            "peft_layers_to_transform peft_layers_pattern peft_layer_replication lora_target_parameters",
            "plain LoRA only: it is neither restarted nor pruned.": "relora relora_steps relora_warmup_steps "
            "relora_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload lisa_n_layers "
            "lisa_step_interval lisa_layers_attribute peft",
            "no such quantised bases are trained on.": "gptq qat quantization model_quantization_config fp8",
            "nothing stops early; see load_best_model_at_end.": "early_stopping_patience",
            "there are no plug-ins.": "plugins",
            "models are not compiled.": "torch_compile torch_compile_backend torch_compile_mode",
            "remove copies first: posttrain data dedup.": "dataset_exact_deduplication",
            "drop short rows first, or set filters: {min_answer_chars: …}.": "min_sample_len",
            "checkpoints hold what resuming needs.": "save_only_model",
            "number of steps: set save_steps.": "saves_per_epoch",
            "rows carry their own system message: write it into the data.": "default_system_message",
            "answers are judged by a gate: gate: {suite: …}.": "do_bench_eval bench_dataset bench_split "
            "eval_table_size "
            "eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics",
            "rows come in random order.": "curriculum_sampling",
            "positions are the model's own.": "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
            "attention is exact.": "s2_attention",
            "only AdamW is used; its settings are adam_beta1, adam_beta2, adam_epsilon.": "optim_args "
            "optim_target_modules adam_beta3 adam_epsilon2 torchdistx_path",
            "the last incomplete batch is trained on.": "dataloader_drop_last",
            "answers are sampled in the training process, without a server.": "vllm",
            "add the likelihood of the chosen answer: loss_type: [sigmoid, sft], with loss_weights.": "rpo_alpha",
            "answers are compared by the sum over their tokens; loss_type: sigmoid_norm takes means.": "dpo_norm_loss",
            "no token is read from a recipe: use the HF_TOKEN environment variable.": "hf_use_auth_token",
        }
    ),
    handled=frozenset(
        "base_model rl reward_model process_reward_model num_labels bnb_config_kwargs datasets test_datasets "
        "pretraining_dataset val_set_size "
        "sequence_len excess_length_strategy max_prompt_len micro_batch_size gradient_accumulation_steps batch_size "
        "world_size num_epochs max_steps lr_scheduler lr_scheduler_kwargs warmup_steps warmup_ratio bf16 fp16 bfloat16 "
        "float16 float32 optimizer gradient_checkpointing eval_strategy evaluation_strategy eval_steps evals_per_epoch "
        "save_strategy save_steps logging_steps load_best_model_at_end metric_for_best_model greater_is_better "
        "report_to seed adapter load_in_4bit load_in_8bit lora_r lora_alpha lora_dropout lora_target_modules "
        "lora_target_linear lora_modules_to_save lora_fan_in_fan_out loraplus_lr_ratio peft_use_dora peft_use_rslora "
        "peft_init_lora_weights chat_template chat_template_jinja train_on_inputs rl_beta dpo_beta "
        "dpo_use_weighting dpo_label_smoothing orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight "
        "kto_undesirable_weight precompute_ref_log_probs trl".split()
    ),
)


def convert(job: Job) -> None:
    """Fill the draft from the ledger."""
    put_model(job, "base_model")
    axolotl_data.convert(job)
    _lengths(job)
    _adapter(job)
    _trainer(job)
    _preference(job)
    if job.draft.method == "grpo":
        rewards.grpo(job, ("trl",))
    _template(job)


def _lengths(job: Job) -> None:
    packed = is_on(job.get("sample_packing"))
    if job.ledger.says("sequence_len"):
        job.move(("sequence_len",), "max_length")
    else:
        job.add("max_length", 512, "Axolotl's default")
    job.not_needed("max_prompt_len", "max_length counts prompt and answer together")
    how = job.get("excess_length_strategy")
    if how is None:
        scoring.overflow(job, "drop", "Axolotl drops longer rows")
    elif how == "truncate" and scoring.makes_scores(job):
        job.lost("excess_length_strategy", f"{scoring.NEVER_CUT}.")
        scoring.overflow(job, "drop", "")
    else:
        job.move(("excess_length_strategy",), "on_overflow", "error" if how == "raise" else how)
    per_answer = rewards.group_size(job, ("trl",)) if job.draft.method == "grpo" else 1
    training.processes(job, "world_size")
    training.batch(
        job,
        "micro_batch_size",
        "gradient_accumulation_steps",
        1,
        total="batch_size" if job.ledger.says("batch_size") else "",
        group=per_answer,
        packed=packed,
    )


def _adapter(job: Job) -> None:
    kind = str(job.get("adapter", default=""))
    four: list[KeyPath] = [("load_in_4bit",)]
    said: list[KeyPath] = [("adapter",)] if kind else []
    if kind not in ("", "lora", "qlora"):
        job.lost("adapter", f"there is no adapter {kind}; the recipe takes lora.")
        said = []
    adapters.choose(
        job, said, on=bool(kind), four=four, eight=[("load_in_8bit",)], dora="peft_use_dora", qlora=kind == "qlora"
    )
    section: KeyPath = ("bnb_config_kwargs",)
    kind_at, nested, *others = ((*section, key) for key in QUANTISED)
    adapters.quantisation(job, kind_at, nested, others)
    if is_on(job.get("lora_target_linear")) and job.draft.value("adapter", "none") != "none":
        job.move(("lora_target_linear",), "lora.target_modules", "all-linear")
        job.not_needed("lora_target_modules", "lora_target_linear names every linear layer")
    elif job.ledger.says("lora_target_modules"):
        adapters.targets(job, ("lora_target_modules",), ("all-linear",))
    elif kind:
        job.note(adapters.PEFT_CHOICE.format(tool="Axolotl"))
    job.not_needed("lora_target_linear", "is off" if kind else adapters.FULL)
    if is_on(job.get("lora_fan_in_fan_out")):
        job.lost("lora_fan_in_fan_out", "layers are read as the model's own code stores them.")
    job.not_needed("lora_fan_in_fan_out", "layers are read as the model's own code stores them")
    if job.get("peft_init_lora_weights") is True:
        job.not_needed("peft_init_lora_weights", "B starts at 0, as there")
    names = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_modules_to_save": "modules_to_save"}
    names |= {"peft_use_rslora": "use_rslora", "peft_init_lora_weights": "init"}
    adapters.keys(job, names, {"dropout": 0.0})
    adapters.loraplus(job, "loraplus_lr_ratio")


def _trainer(job: Job) -> None:
    job.not_needed([("special_tokens", "pad_token")], training.NO_PADDING)
    training.duration(job, "num_epochs", 1.0)
    training.schedule(job, "lr_scheduler", "cosine", default_warmup=0.03)
    for key in ("bfloat16", "float32"):
        if is_on(job.get(key)):
            job.move((key,), "dtype", key)
        job.not_needed(key, "is off")
    if job.draft.has("dtype"):
        job.not_needed("bf16 fp16 float16", "dtype is said by another key")
    else:
        training.precision(job, "bf16", "fp16 float16", default="auto")
    training.optimiser(job, "optimizer")
    training.checkpointing(job)
    if job.ledger.says("evals_per_epoch"):
        if job.draft.eval_datasets:
            job.lost("evals_per_epoch", "set eval_steps to that share of an epoch's steps.")
        job.not_needed("evals_per_epoch", "there are no eval_datasets")
    training.saving(job)
    training.evaluating(job)
    training.tracking(job)
    if not job.ledger.says("weight_decay"):
        job.add("weight_decay", 0.0, "Axolotl's default")
    if job.ledger.says("seed"):
        job.move_top(("seed",), "seed", job.get("seed"))
    if is_on(job.get("train_on_inputs")):
        remedy = "prompts never carry loss here. Rows of plain text do: format: text."
        job.move(("train_on_inputs",), "loss_on", "all", remedy=remedy)
    job.not_needed("train_on_inputs", "only answers carry loss")


def _preference(job: Job) -> None:
    """Keys of `rl`, and the losses' coefficients."""
    method = job.draft.method
    rl = job.get("rl")
    if rl == "ipo":
        job.move(("rl",), "loss_type", "ipo")
    elif rl is not None:
        job.ledger.carried(("rl",), "stages", method)
    for switch in SCORING:
        if switch == method and is_on(job.get(switch)):
            job.ledger.carried((switch,), "stages", method)
        job.lost(switch, "one stage is imported: write the other by hand.")
    if scoring.makes_scores(job):
        job.not_needed("num_labels", "a score has one label")
    job.lost("num_labels", "only reward models have labels.")
    alpha = {"orpo": "orpo_alpha"}.get(method, "rl_beta")
    for key in ("rl_beta", "dpo_beta", "orpo_alpha"):
        if not job.ledger.says(key):
            continue
        if key in (alpha, "dpo_beta" if method == "dpo" else alpha) and not job.draft.has("beta"):
            job.move((key,), "beta")
        else:
            job.not_needed(key, f"{method} does not read it" if key != alpha else "another key says it")
    if not job.draft.has("beta") and method not in ("sft", "grpo", *SCORING):
        if job.ledger.says("trl", "beta"):
            job.move(("trl", "beta"), "beta")
        job.add("beta", 0.1, "Axolotl's default")
    beta = job.draft.value("beta")
    gamma = job.number("simpo_gamma")
    if gamma is not None and method == "simpo":
        job.move(("simpo_gamma",), "gamma_beta_ratio", gamma / beta if beta else gamma)
    same = {
        "cpo_alpha": "cpo_alpha",
        "kto_desirable_weight": "desirable_weight",
        "kto_undesirable_weight": "undesirable_weight",
        "dpo_use_weighting": "use_weighting",
        "dpo_label_smoothing": "label_smoothing",
        "precompute_ref_log_probs": "precompute_ref_log_probs",
    }
    for theirs, ours in same.items():
        if is_off(job.get(theirs)):
            job.not_needed(theirs, "is off")
        else:
            job.move((theirs,), ours)
    job.not_needed("simpo_gamma", f"{method} does not read it")
    for ours in {"kto": ("desirable_weight", "undesirable_weight"), "simpo": ("cpo_alpha",)}.get(method, ()):
        job.add(ours, 1.0, "Axolotl's default")
    if method == "grpo":
        return
    if isinstance(job.get("trl"), dict):
        for key in job.get("trl"):
            job.not_needed([("trl", key)], f"{method} does not read it")


def _template(job: Job) -> None:
    name, text = job.get("chat_template"), job.get("chat_template_jinja")
    if text is not None:
        templates.from_file(job, ("chat_template_jinja",), str(text))
        job.not_needed("chat_template", "chat_template_jinja says it")
    elif name is not None:
        templates.named(job, ("chat_template",), str(name))
