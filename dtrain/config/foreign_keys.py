"""Keys of other training tools, and what a recipe says instead.

From the documentation of Hugging Face's Trainer and TRL, LLaMA-Factory, axolotl, ms-swift,
torchtune and DeepSpeed. Someone who brings a recipe of one of them gets an answer for each key.
"""

from __future__ import annotations

# dtrain's key → the keys of other tools that mean the same.
EQUIVALENTS = {
    "name": "run_name experiment_name",
    "model.base": (
        "model_name_or_path base_model base_model_config model_name model_id "
        "pretrained_model_name_or_path"
    ),
    "model.attention": (
        "flash_attn flash_attention sdp_attention eager_attention attn_implementation attn_impl "
        "use_flash_attn xformers_attention"
    ),
    "model.kernels": (
        "use_liger_kernel enable_liger_kernel liger_kernel use_unsloth unsloth "
        "liger_fused_linear_cross_entropy"
    ),
    "model.gradient_checkpointing": (
        "use_gradient_checkpointing enable_activation_checkpointing activation_checkpointing "
        "gradient_checkpointing_kwargs disable_gradient_checkpointing"
    ),
    "launch.processes": "nproc_per_node num_processes num_gpus n_gpu world_size",
    "stages[].method": "peft peft_config lora lora_config adapter_config",
    "stages[].method.kind": (
        "finetuning_type adapter train_type tuner_type tuner sft_type use_peft use_lora"
    ),
    "stages[].method.r": "lora_rank lora_r lora_dim",
    "stages[].method.frozen_modules": "freeze_parameters frozen_parameters freeze_parameters_regex",
    "stages[].method.trainable_layers": "freeze_trainable_layers num_layer_trainable",
    "stages[].method.alpha": "lora_alpha",
    "stages[].method.dropout": "lora_dropout lora_dropout_p",
    "stages[].method.target_modules": (
        "lora_target lora_target_modules lora_target_linear lora_target_regex lora_attn_modules"
    ),
    "stages[].method.virtual_tokens": "num_virtual_tokens prompt_length prefix_length pre_seq_len",
    "stages[].method.modules_to_save": "lora_modules_to_save additional_target",
    "stages[].method.from_adapter": "adapter_name_or_path lora_model_dir resume_from_adapter",
    "stages[].data.sources": (
        "dataset datasets train_dataset train_datasets dataset_name dataset_dir data_path "
        "data_files train_file train_files dataset_mixer pretraining_dataset"
    ),
    "stages[].data.sources[].path": "file_name dataset_path",
    "stages[].data.sources[].format": "formatting ds_type dataset_format",
    "stages[].data.sources[].split": "dataset_split train_on_split train_split",
    "stages[].data.sources[].weight": "interleave_probs mix_probs",
    "stages[].data.sources[].loss_weight": "dataset_loss_weight loss_weights",
    "stages[].data.sequence_length": (
        "cutoff_len sequence_len max_seq_length max_length max_seq_len seq_length seq_len "
        "model_max_length block_size context_length"
    ),
    "stages[].data.packing": (
        "sample_packing neat_packing packing_strategy packed pad_to_sequence_len "
        "multipack_attn eval_packing eval_sample_packing padding_free"
    ),
    "stages[].data.overlong": "truncation_strategy excess_length_strategy truncation",
    "stages[].data.template": "chat_template chat_template_jinja prompt_template template_type",
    "stages[].data.train_on": (
        "train_on_inputs train_on_prompt train_on_input mask_prompt mask_history roles_to_train "
        "assistant_only_loss completion_only_loss loss_scale"
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
    "stages[].train.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "stages[].train.steps": "max_steps max_steps_per_epoch train_steps max_iters train_iters",
    "stages[].train.tokens": "max_tokens num_tokens total_tokens",
    "stages[].train.learning_rate": "lr peak_lr max_lr base_lr",
    "stages[].train.learning_rate_scales": (
        "lr_groups embedding_lr embedding_lr_scale embedding_learning_rate loraplus_lr_embedding"
    ),
    "stages[].train.lr_scheduler": "lr_scheduler_type lr_decay_style scheduler scheduler_type",
    "stages[].train.min_lr_ratio": "min_lr min_lr_rate cosine_min_lr_ratio lr_scheduler_kwargs",
    "stages[].train.decay_ratio": "num_decay_steps lr_decay_steps",
    "stages[].train.optimizer": "optim optimizer_type optim_name",
    "stages[].train.max_grad_norm": (
        "gradient_clipping gradient_clip_val clip_grad grad_clip clip_grad_norm clip_norm"
    ),
    "stages[].train.label_smoothing": "label_smoothing_factor",
    "stages[].train.neftune_noise_alpha": "neftune_alpha neft_alpha noisy_embedding_alpha",
    "stages[].train.evaluate_every_steps": (
        "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval do_eval"
    ),
    "stages[].train.checkpoint_every_steps": (
        "save_steps save_strategy saves_per_epoch save_interval save_freq"
    ),
    "stages[].preference": "dpo rlhf rlhf_args dpo_args",
    "stages[].preference.loss": "loss_type pref_loss rl_loss",
    "stages[].preference.beta": "pref_beta rl_beta dpo_beta kto_beta orpo_alpha orpo_lambda",
    "stages[].preference.sft_weight": "pref_ftx rpo_alpha dpo_ftx cpo_alpha",
    "stages[].preference.target_margin": "simpo_gamma gamma_beta_ratio",
    "stages[].preference.desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "stages[].preference.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "stages[].preference.precompute_reference": "precompute_ref_log_probs precompute_ref_logps",
    "evaluation.sets": (
        "eval_dataset eval_datasets test_datasets val_dataset validation_file eval_file"
    ),
    "output.folder": "output_dir output_path save_dir checkpoint_dir",
    "monitoring.report_to": (
        "report_to use_wandb use_tensorboard use_swanlab wandb_log_model mlflow_tracking_uri"
    ),
    "monitoring.project": (
        "wandb_project mlflow_experiment_name comet_project_name swanlab_project"
    ),
    "output.keep_checkpoints": "save_total_limit max_checkpoints keep_last_n_checkpoints",
}

# What to write where no key means the same → the keys of other tools.
ANSWERS = {
    "gradient accumulation follows from global_batch_size, micro_batch_size and the number of "
    "ranks": "gradient_accumulation_steps gradient_accumulation",
    "use stages[].train.warmup_ratio, the share of the steps with a rising learning rate": (
        "warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_iters"
    ),
    "put held-out rows into a file of their own and name it in evaluation.sets: dtrain does not "
    "split a source": (
        "val_set_size val_size validation_split eval_split split_dataset_ratio test_size"
    ),
    "evaluation uses stages[].train.micro_batch_size": (
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size"
    ),
    "use model.dtype: bfloat16; float16 is not supported": (
        "bf16 fp16 tf32 pure_bf16 bfloat16 float16 torch_dtype precision mixed_precision "
        "compute_dtype bf16_full_eval half_precision"
    ),
    "use stages[].method.kind: qlora, whose base is quantized to 4 bits (NF4)": (
        "load_in_4bit load_in_8bit quantization_bit quantization_method quant_method quant_bits "
        "quantization_config bnb_4bit_compute_dtype bnb_4bit_quant_type "
        "bnb_4bit_use_double_quant double_quantization"
    ),
    "use engine.kind: zero2 or zero3, and engine.config for a DeepSpeed JSON file": (
        "deepspeed deepspeed_config zero_stage zero_optimization"
    ),
    "use engine.kind: fsdp2": "fsdp fsdp_config fsdp_version fsdp_transformer_layer_cls_to_wrap",
    "use engine.kind: ddp": "ddp ddp_timeout ddp_find_unused_parameters ddp_backend",
    "use stages, a list whose entries each have a kind: cpt (continued pretraining) or sft": (
        "stage task task_type do_train training_type rlhf_type"
    ),
    "the reference is the model that the stage starts from, as the stage before it left it": (
        "ref_model reference_model ref_model_name_or_path ref_adapter_name sync_ref_model"
    ),
    "use stages[].method.kind: rslora": ("use_rslora rslora peft_use_rslora lora_use_rslora"),
    "use stages[].method.kind: pissa, olora or loftq": (
        "init_lora_weights pissa_init pissa_iter pissa_convert loftq_config peft_init_lora_weights"
    ),
    "use stages[].method.kind: dora, or qdora for a base in NF4": "use_dora dora peft_use_dora",
    "training resumes from the newest complete checkpoint by itself": (
        "resume_from_checkpoint auto_resume_from_checkpoints resume resume_only_model "
        "ignore_data_skip"
    ),
    "nothing is overwritten: choose another output.folder for another run": (
        "overwrite_output_dir overwrite_cache"
    ),
    "every step is logged: to metrics.jsonl and report.html in output.folder": (
        "logging_steps log_every_n_steps logging_dir logging_strategy log_interval plot_loss "
        "wandb_entity wandb_name wandb_run_id include_num_input_tokens_seen"
    ),
    "dtrain chooses the number of workers; `dtrain data prepare --processes N` sets it": (
        "preprocessing_num_workers dataset_num_proc dataset_processes dataset_num_workers "
        "dataloader_num_workers num_workers dataloader_pin_memory dataloader_prefetch_factor"
    ),
    "the base model's own files decide it": (
        "model_type tokenizer_type tokenizer_config tokenizer_name tokenizer_name_or_path "
        "processor_type is_llama_derived_model tokenizer_use_fast use_fast_tokenizer rope_scaling"
    ),
    "dtrain does not change the vocabulary": (
        "special_tokens add_tokens tokens new_special_tokens resize_vocab resize_token_embeddings"
    ),
    "packing fills every sequence, so batches need no sorting by length": (
        "group_by_length length_column_name"
    ),
    "the order of the data follows from seed": "shuffle data_seed shuffle_merged_datasets",
    "dtrain uploads nothing": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo export_hub_model_id"
    ),
    "prepared data are stored in dtrain's cache folder and used again": (
        "dataset_prepared_path tokenized_path cache_dir streaming"
    ),
    "dtrain has no such setting: cut the source file instead": (
        "max_samples max_train_samples max_eval_samples num_samples"
    ),
    "dtrain has no such setting: AdamW's betas and epsilon are torch's defaults": (
        "adam_beta1 adam_beta2 adam_epsilon optim_args"
    ),
    "dtrain has no such setting": (
        "activation_offloading "
        "lora_bias layers_to_transform remove_unused_columns dataset_text_field strict "
        "local_rank torch_compile"
    ),
}

KEYS = {foreign: key for key, names in EQUIVALENTS.items() for foreign in names.split()}
SENTENCES = {foreign: answer for answer, names in ANSWERS.items() for foreign in names.split()}
