"""Keys of other training tools, and what a recipe says instead.

From the argument classes, schemas and shipped configs of Hugging Face's Trainer, TRL and PEFT,
LLaMA-Factory, axolotl and torchtune, and the documentation of ms-swift and DeepSpeed. Someone who
brings a config of one of them gets an answer for each key; `dtrain import` uses the same answers.
A name that ends with * stands for all that begin so.
"""

from __future__ import annotations

from dtrain.config.foreign_answers import ANSWERS

# dtrain's key → the keys of other tools that mean the same.
EQUIVALENTS = {
    "name": "run_name experiment_name",
    "model.base": (
        "model_name_or_path base_model base_model_config model_name model_id "
        "pretrained_model_name_or_path"
    ),
    "model.attention": (
        "flash_attn flash_attention sdp_attention eager_attention attn_implementation "
        "attn_impl use_flash_attn xformers_attention sage_attention flex_attention "
        "sdpa_varlen use_flex"
    ),
    "model.kernels": (
        "use_liger_kernel enable_liger_kernel use_unsloth unsloth liger_kernel liger_* "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "cut_cross_entropy chunked_cross_entropy fused_attn_kernel flash_attn_cross_entropy "
        "flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv kernel_config "
        "use_kernels use_v1_kernels use_liger_loss dpo_use_liger_kernel apply_rope_fusion "
        "bias_activation_fusion masked_softmax_fusion cross_entropy_loss_fusion tiled_mlp* "
        "use_dsv4_kernels use_glm_dsa_kernels"
    ),
    "model.gradient_checkpointing": (
        "use_gradient_checkpointing enable_activation_checkpointing activation_checkpointing "
        "gradient_checkpointing_kwargs disable_gradient_checkpointing "
        "activation_checkpointing_kwargs selective_checkpointing recompute_granularity "
        "recompute_method recompute_num_layers use_reentrant_gc use_unsloth_gc ac_mode "
        "ac_option"
    ),
    "launch.processes": "nproc_per_node num_processes num_gpus n_gpu world_size",
    "stages[].method": "peft peft_config lora lora_config adapter_config",
    "stages[].method.kind": (
        "finetuning_type adapter train_type tuner_type tuner sft_type use_peft use_lora "
        "peft_type full_finetune"
    ),
    "stages[].method.r": "lora_rank lora_r lora_dim",
    "stages[].method.frozen_modules": (
        "freeze_parameters frozen_parameters freeze_parameters_regex"
    ),
    "stages[].method.trainable_layers": "freeze_trainable_layers num_layer_trainable",
    "stages[].method.alpha": "lora_alpha",
    "stages[].method.dropout": "lora_dropout lora_dropout_p",
    "stages[].method.target_modules": (
        "lora_target lora_target_modules lora_target_linear lora_target_regex lora_attn_modules"
    ),
    "stages[].method.virtual_tokens": (
        "num_virtual_tokens prompt_length prefix_length pre_seq_len"
    ),
    "stages[].method.modules_to_save": "lora_modules_to_save additional_target",
    "stages[].method.from_adapter": (
        "adapter_name_or_path lora_model_dir resume_from_adapter adapter_folder"
    ),
    "stages[].data.sources": (
        "dataset datasets train_dataset train_datasets dataset_name dataset_dir data_path "
        "data_files train_file train_files dataset_mixer pretraining_dataset train_data"
    ),
    "stages[].data.sources[].path": "file_name dataset_path",
    "stages[].data.sources[].format": "formatting dataset_format",
    "stages[].data.sources[].split": (
        "dataset_split train_on_split train_split dataset_train_split"
    ),
    "stages[].data.sources[].weight": "interleave_probs mix_probs",
    "stages[].data.sources[].loss_weight": "dataset_loss_weight loss_weights",
    "stages[].data.sequence_length": (
        "cutoff_len sequence_len max_seq_length max_length max_seq_len seq_length seq_len "
        "model_max_length block_size context_length max_prompt_length max_completion_length "
        "max_target_length eval_sequence_len max_packed_sequence_len"
    ),
    "stages[].data.packing": (
        "sample_packing neat_packing packing_strategy packed pad_to_sequence_len "
        "multipack_attn eval_packing eval_sample_packing padding_free sample_packing_* "
        "multipack_* pretrain_multipack_* batch_flattening dpo_padding_free "
        "use_packed_sequences batching_strategy streaming_multipack_buffer_size"
    ),
    "stages[].data.overlong": (
        "truncation_strategy excess_length_strategy truncation truncation_mode"
    ),
    "stages[].data.template": (
        "chat_template chat_template_jinja prompt_template template_type chat_template_path"
    ),
    "stages[].data.train_on": (
        "train_on_inputs train_on_prompt train_on_input mask_prompt mask_history "
        "roles_to_train assistant_only_loss completion_only_loss loss_scale train_on_eos "
        "train_on_eot use_eot_loss"
    ),
    "stages[].data.clean": "dedup deduplicate dataset_exact_deduplication",
    "stages[].train": "training training_args training_arguments trainer",
    "stages[].train.global_batch_size": (
        "train_batch_size batch_size total_batch_size effective_batch_size"
    ),
    "stages[].train.micro_batch_size": (
        "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu "
        "device_batch_size device_train_microbatch_size"
    ),
    "stages[].train.epochs": "num_train_epochs num_epochs n_epochs max_epochs max_epoch",
    "stages[].train.steps": (
        "max_steps max_steps_per_epoch train_steps max_iters train_iters num_steps"
    ),
    "stages[].train.tokens": "max_tokens num_tokens total_tokens",
    "stages[].train.learning_rate": "lr peak_lr max_lr base_lr",
    "stages[].train.learning_rate_scales": (
        "lr_groups embedding_lr embedding_lr_scale embedding_learning_rate loraplus_lr_embedding"
    ),
    "stages[].train.lr_scheduler": "lr_scheduler_type lr_decay_style scheduler scheduler_type",
    "stages[].train.decay_ratio": "num_decay_steps lr_decay_steps",
    "stages[].train.optimizer": "optim optimizer_type optim_name use_muon",
    "stages[].train.max_grad_norm": (
        "gradient_clipping gradient_clip_val clip_grad grad_clip clip_grad_norm clip_norm"
    ),
    "stages[].train.label_smoothing": "label_smoothing_factor",
    "stages[].train.neftune_noise_alpha": "neftune_alpha neft_alpha noisy_embedding_alpha",
    "stages[].train.evaluate_every_steps": (
        "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval do_eval "
        "run_val_every_n_steps"
    ),
    "stages[].train.checkpoint_every_steps": (
        "save_steps save_strategy saves_per_epoch save_interval save_freq save_every_n_steps "
        "save_every_n_epochs"
    ),
    "stages[].preference": "dpo rlhf rlhf_args dpo_args",
    "stages[].preference.loss": "loss_type pref_loss rl_loss dpo_loss_type",
    "stages[].preference.beta": "pref_beta rl_beta dpo_beta kto_beta orpo_alpha orpo_lambda",
    "stages[].preference.sft_weight": "pref_ftx rpo_alpha dpo_ftx cpo_alpha",
    "stages[].preference.target_margin": "simpo_gamma gamma_beta_ratio",
    "stages[].preference.desirable_weight": (
        "kto_chosen_weight kto_desirable_weight kto_desirable"
    ),
    "stages[].preference.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "stages[].preference.precompute_reference": "precompute_ref_log_probs precompute_ref_logps",
    "evaluation.sets": (
        "eval_dataset eval_datasets test_datasets val_dataset validation_file eval_file "
        "dataset_val dataset_test_split eval_on_each_dataset"
    ),
    "output.folder": "output_dir output_path save_dir checkpoint_dir",
    "monitoring.report_to": (
        "report_to use_wandb use_tensorboard use_swanlab use_mlflow use_comet use_trackio "
        "metric_logger"
    ),
    "monitoring.project": (
        "wandb_project mlflow_experiment_name comet_project_name swanlab_project "
        "trackio_project_name project_name"
    ),
    "output.keep_checkpoints": "save_total_limit max_checkpoints keep_last_n_checkpoints",
    "stages[].train.min_lr_ratio": (
        "min_lr min_lr_rate cosine_min_lr_ratio lr_scheduler_kwargs eta_min"
    ),
    "device": "use_cpu no_cuda",
    "determinism": "full_determinism enable_full_determinism deterministic",
    "seed": "random_seed rng_seed",
    "engine.kind": "accelerate_config",
    "engine.offload": "fsdp_cpu_offload cpu_offload offload_params fsdp_offload_params",
    "engine.shard": (
        "dp_shard_size dp_replicate_size data_parallel_shard_dim data_parallel_replicate_dim"
    ),
    "stages[].method.rank_pattern": "lora_rank_pattern",
    "stages[].method.alpha_pattern": "lora_alpha_pattern",
    "stages[].data.sources[].columns": (
        "column_map dataset_text_field text_column text_field field field_*"
    ),
    "stages[].train.early_stopping_patience": "early_stopping_steps",
    "stages[].train.on_divergence": "loss_watchdog_threshold loss_watchdog_patience",
    "stages[].distill": "kd_config kd_loss",
    "stages[].distill.teacher": "teacher_model teacher_model_name_or_path teacher_checkpointer",
    "stages[].distill.ce_weight": "kd_ratio kd_ce_alpha",
    "stages[].preference.label_smoothing": "dpo_label_smoothing",
    "stages[].preference.length_normalized": "dpo_norm_loss",
    "evaluation.tasks": "do_bench_eval bench_dataset bench_split task_dir",
    "evaluation.generation": (
        "predict_with_generate do_predict do_causal_lm_eval generate_samples "
        "eval_causal_lm_metrics eval_num_beams eval_max_new_tokens generation_* "
        "generate_during_eval dpo_generate_during_eval log_completions"
    ),
    "output.use": "load_best_model_at_end",
    "stages[].train.evaluate_on": "metric_for_best_model greater_is_better",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: entry for entry, names in table.items() for name in names.split()}


KEYS, SENTENCES = _by_name(EQUIVALENTS), _by_name(ANSWERS)


def equivalent(name: str) -> str | None:
    """The path of dtrain's key that means the same as a key of another tool."""
    return _find(KEYS, name)


def answer(name: str) -> str | None:
    """What to write instead of a key of another tool that has no equivalent."""
    return _find(SENTENCES, name)


def _find(table: dict[str, str], name: str) -> str | None:
    """The entry of a name, or of the longest beginning of it that the tables have."""
    beginnings = [f"{name[:length]}*" for length in range(len(name), 0, -1)]
    known = next((x for x in (name, *beginnings) if x in KEYS or x in SENTENCES), "")
    return table.get(known)
