"""LLaMA-Factory training files. Method: `stage`, and `pref_loss` for preference."""

from __future__ import annotations

from posttrain.importers import adapters, llama_factory_data, scoring, templates, training
from posttrain.importers.job import Job, Tables, by_reason, put_model
from posttrain.importers.ledger import is_off, is_on
from posttrain.recipe.yaml_lines import KeyPath

METHOD_OF = {"pt": "sft", "sft": "sft", "rm": "reward_model", "dpo": "dpo", "kto": "kto"}
LOSS_METHODS = ("orpo", "simpo")  # values of pref_loss that are methods of their own here
TABLES = training.TRAINER | Tables(
    same={"preprocessing_num_workers": "dataset_num_proc", "ld_alpha": "ld_alpha"},
    unneeded=by_reason(
        {
            training.OUTPUT: "plot_loss cache_dir adapter_folder offload_folder",
            training.NO_PADDING: "packing neat_packing",
            training.ATTENTION: "flash_attn",
            training.PREPARED: "overwrite_cache preprocessing_batch_size tokenized_path data_shared_file_system "
            "buffer_size",
            "kernels are chosen for the machine": "use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels "
            "use_kv_cache",
            "trained weights are kept in float32": "upcast_layernorm upcast_lmhead_output pure_bf16",
            "tokenizers are read as the model's folder says": "use_fast_tokenizer split_special_tokens "
            "low_cpu_mem_usage",
            "every step's figures go to metrics.jsonl": "include_effective_tokens_per_second print_param_status "
            "compute_accuracy",
            "recomputation is set up by gradient_checkpointing alone": "use_reentrant_gc",
            "it is read when a model is asked, not when one is trained": "infer_backend infer_dtype "
            "predict_with_generate temperature top_p top_k max_new_tokens do_sample num_beams eval_num_beams",
            "only text models are trained": "freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
            "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen "
            "audio_sampling_rate media_dir",
            "targets are the answers' own tokens": "ignore_pad_token_for_loss",
            "the paths of the data sets say it": "dataset_dir",
        }
    ),
    missing=by_reason(
        {
            training.MLFLOW: "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
            "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
            "models that need their own Python code are not loaded.": "trust_remote_code",
            "save that revision of the model and name its folder as the model.": "model_revision",
            "the model is taken as its config.json says: change that file.": "rope_scaling mixture_of_depths "
            "moe_aux_loss_coef train_from_scratch",
            "attention is exact.": "shift_attn",
            "merge those adapters into the base and name the result as the model.": "adapter_name_or_path",
            "the tokenizer is taken as it is: add tokens to the model's folder first.": "resize_vocab add_tokens "
            "add_special_tokens new_special_tokens_config init_special_tokens",
            "every layer is trained, or adapted by name: lora.target_modules.": "freeze_trainable_layers "
            "freeze_trainable_modules freeze_extra_modules use_llama_pro",
            "there is no such adapter: LoRA is.": "oft_rank oft_block_size oft_target module_dropout",
            "only AdamW is used; its settings are adam_beta1, adam_beta2, adam_epsilon.": "use_galore galore_target "
            "galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo "
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
            "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_adam_mini "
            "use_muon",
            "one learning rate for all trained weights.": "loraplus_lr_embedding",
            training.ONE_PROCESS: "use_mca ray_run_name ray_storage_path ray_num_workers resources_per_worker "
            "placement_strategy",
            "write the ppo stage by hand: docs/rl.md.": "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
            "ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit reward_model_type",
            "the reference is the model the stage starts from: name that as the model.": "ref_model "
            "ref_model_adapters ref_model_quantization_bit",
            "write what the loss is to be in loss_type; see posttrain schema.": "pref_bco_weight use_dft_loss "
            "use_eaft_loss use_asft_loss",
            "add the likelihood of the chosen answer: loss_type: [sigmoid, sft], with loss_weights.": "pref_ftx",
            "rows come in random order.": "disable_shuffling",
            "nothing stops early; see load_best_model_at_end.": "early_stopping_steps",
            "calls of tools are written by the chat template.": "tool_format",
            "write the reasoning into the messages, or leave it out of them.": "enable_thinking reasoning_effort",
            "rows carry their own system message: write it into the data.": "default_system",
            "adapters start from B = 0, or as lora.init says.": "pissa_convert",
            "8-bit floats are not trained in.": "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather",
            "the mean over all eval_datasets is measured.": "eval_on_each_dataset",
            "no token is read from a recipe: use the HF_TOKEN environment variable.": "hf_hub_token ms_hub_token "
            "om_hub_token",
            "quantise a finished model with other tools.": "export_dir export_size export_device "
            "export_quantization_bit export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen export_legacy_format export_hub_model_id quantization_device_map",
        }
    ),
    handled=frozenset(
        "model_name_or_path stage finetuning_type template dataset eval_dataset cutoff_len max_samples "
        "mix_strategy interleave_probs streaming val_size train_on_prompt mask_history lora_rank lora_alpha "
        "lora_dropout lora_target additional_target use_rslora use_dora pissa_init pissa_iter loraplus_lr_ratio "
        "create_new_adapter quantization_bit quantization_method quantization_type double_quantization "
        "bnb_4bit_compute_dtype pref_beta pref_loss dpo_label_smoothing kto_chosen_weight "
        "kto_rejected_weight simpo_gamma disable_gradient_checkpointing dataset_info.json".split()
    ),
)


def convert(job: Job) -> None:
    """Fill the draft from the ledger."""
    put_model(job, "model_name_or_path")
    if job.ledger.says("stage"):
        job.ledger.carried(("stage",), "stages", job.draft.method)
    llama_factory_data.convert(job)
    if job.ledger.says("cutoff_len"):
        job.move(("cutoff_len",), "max_length")
    else:
        job.add("max_length", 2048, "LLaMA-Factory's default")
    scoring.overflow(job, "truncate", "LLaMA-Factory cuts longer rows")
    _adapter(job)
    packed = is_on(job.get("packing")) or is_on(job.get("neat_packing"))
    if not job.ledger.says("learning_rate"):
        job.add("learning_rate", 5e-5, "LLaMA-Factory's default")
    training.trainer(job, epochs=3.0, packed=packed or job.get("stage") == "pt", dtype="auto")
    _checkpointing(job)
    _what_is_learnt(job)
    _preference(job)
    if job.ledger.says("template"):
        templates.named(job, ("template",), str(job.get("template")))


def _adapter(job: Job) -> None:
    kind = str(job.get("finetuning_type", default="lora"))
    said: list[KeyPath] = [("finetuning_type",)] if job.ledger.says("finetuning_type") else []
    if kind not in ("lora", "full"):
        job.lost("finetuning_type", f"{kind} is not done here: the recipe takes lora.")
        said = []
    bits: list[KeyPath] = [("quantization_bit",)]
    adapters.choose(job, said, on=kind != "full", four=bits, eight=bits, dora="use_dora")
    if job.get("quantization_bit") not in (None, 4, 8):
        job.lost("quantization_bit", "the base is quantised to 4 bits or not at all.")
    if job.ledger.says("lora_target"):
        adapters.targets(job, ("lora_target",), ("all",))
    if is_on(job.get("pissa_init")) and kind != "full":
        steps = int(job.number("pissa_iter", default=16) or 16)
        value = "pissa" if steps < 0 else f"pissa_niter_{steps}"
        job.move(("pissa_init",), "lora.init", value, remedy="adapters start from B = 0 in this version.")
        job.not_needed("pissa_iter", "lora.init says it" if job.draft.has("lora.init") else "PiSSA is not used")
    job.not_needed("pissa_init pissa_iter", "is off")
    job.not_needed("create_new_adapter", "a stage always trains a new adapter")
    if job.ledger.says("additional_target") and kind != "full":
        names = [name.strip() for name in str(job.get("additional_target")).split(",")]
        kept = scoring.without_heads(job, ("additional_target",), names)
        if kept is not None:
            job.move(("additional_target",), "lora.modules_to_save", kept)
    names_of = {"lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "use_rslora"}
    rank = int(job.number("lora_rank", default=8) or 8)
    adapters.keys(
        job, {**names_of, "additional_target": "modules_to_save"}, {"r": 8, "alpha": 2 * rank, "dropout": 0.0}
    )
    adapters.loraplus(job, "loraplus_lr_ratio")
    quantised = job.draft.value("adapter", "none") == "qlora"
    if quantised and job.get("quantization_method") not in (None, "bnb", "bitsandbytes"):
        job.lost("quantization_method", "a 4-bit base is quantised by bitsandbytes.")
    why = "bitsandbytes quantises, here too" if quantised else "the base is not quantised to 4 bits"
    job.not_needed([("quantization_method",)] if job.ledger.says("quantization_method") else [], why)
    adapters.quantisation(job, ("quantization_type",), ("double_quantization",), [("bnb_4bit_compute_dtype",)])


def _checkpointing(job: Job) -> None:
    """On by default there."""
    if job.ledger.says("disable_gradient_checkpointing"):
        off = is_on(job.get("disable_gradient_checkpointing"))
        job.move(("disable_gradient_checkpointing",), "gradient_checkpointing", not off)
        job.not_needed("gradient_checkpointing", "disable_gradient_checkpointing says it")
    training.checkpointing(job)
    job.add("gradient_checkpointing", True, "LLaMA-Factory's default")


def _what_is_learnt(job: Job) -> None:
    if is_on(job.get("train_on_prompt")):
        remedy = "prompts never carry loss here. Rows of plain text do: format: text."
        job.move(("train_on_prompt",), "loss_on", "all", remedy=remedy)
    job.not_needed("train_on_prompt", "only answers carry loss")
    if is_on(job.get("mask_history")):
        newer = not job.draft.fitting("loss_on", "last_turn")[1]
        job.move(("mask_history",), *(("loss_on", "last_turn") if newer else ("train_on", "last")))
    job.not_needed("mask_history", "every answer of a conversation is learnt, as there")


def _preference(job: Job) -> None:
    method, loss = job.draft.method, job.get("pref_loss")
    if method not in ("dpo", "orpo", "simpo", "kto"):
        why = "sft has no pairs" if method == "sft" else f"{method} does not read it"
        job.not_needed("pref_beta pref_loss dpo_label_smoothing simpo_gamma pref_ftx pref_bco_weight", why)
        job.not_needed("kto_chosen_weight kto_rejected_weight ref_model ld_alpha", why)
        return
    beta = job.number("pref_beta", default=0.1) or 0.1
    if job.ledger.says("pref_beta"):
        job.move(("pref_beta",), "beta")
    else:
        job.add("beta", beta, "LLaMA-Factory's default")
    if loss in LOSS_METHODS:
        job.ledger.carried(("pref_loss",), "stages", method)
    elif loss is not None and method == "dpo":
        job.move(("pref_loss",), "loss_type")
    job.not_needed("pref_loss", f"{method} has one loss")
    for theirs, ours in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
        if method == "kto" and job.ledger.says(theirs):
            job.move((theirs,), ours)
        elif method == "kto":
            job.add(ours, 1.0, "LLaMA-Factory's default")
        job.not_needed(theirs, f"{method} does not read it")
    if method == "simpo":
        gamma = job.number("simpo_gamma", default=0.5) or 0.0
        if job.ledger.says("simpo_gamma"):
            job.move(("simpo_gamma",), "gamma_beta_ratio", gamma / beta)
        else:
            job.add("gamma_beta_ratio", gamma / beta, "LLaMA-Factory's default, 0.5, as a share of beta")
    job.not_needed("simpo_gamma", f"{method} does not read it")
    if is_off(job.get("dpo_label_smoothing")):
        job.not_needed("dpo_label_smoothing", "is off")
    else:
        job.move(("dpo_label_smoothing",), "label_smoothing")
