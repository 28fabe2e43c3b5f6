"""Keys of other training tools that no key of a recipe means, and what to do instead."""

from __future__ import annotations

from dtrain.config.objectives import OBJECTIVES

# What to write, or why nothing → the keys of other tools; * stands for any end of a name.
ANSWERS = {
    "gradient accumulation follows from global_batch_size, micro_batch_size and the number of "
    "ranks": ("gradient_accumulation_steps gradient_accumulation"),
    "use stages[].train.warmup_ratio, the share of the steps with a rising learning rate": (
        "warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_iters"
    ),
    "put held-out rows into a file of their own and name it in evaluation.sets: dtrain does "
    "not split a source": (
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
        "load_in_4bit load_in_8bit quantization_bit quantization_method quant_method "
        "quant_bits quantization_config bnb_4bit_compute_dtype bnb_4bit_quant_type "
        "bnb_4bit_use_double_quant double_quantization quantization_type "
        "quantization_device_map use_bnb_nested_quant bnb_4bit_quant_storage "
        "bnb_config_kwargs model_quantization_config model_quantization_config_kwargs "
        "quant_config quantizer gptq gptq_* qlora_sharded_model_loading"
    ),
    "the reference is the model that the stage starts from, as the stage before it left it": (
        "ref_model reference_model ref_model_name_or_path ref_adapter_name sync_ref_model "
        "ref_model_adapters ref_model_quantization_bit ref_model_mixup_alpha "
        "ref_model_sync_steps ref_checkpointer force_use_ref_model reference_free"
    ),
    "use stages[].method.kind: pissa, olora or loftq": (
        "init_lora_weights pissa_init pissa_iter pissa_convert loftq_config "
        "peft_init_lora_weights loftq_bits loftq_iter eva_config corda_config lora_ga_config "
        "init_weights"
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
        "include_num_input_tokens_seen log_level log_level_replica log_on_each_node "
        "logging_first_step logging_nan_inf_filter disable_tqdm print_param_status "
        "include_tkps include_tokens_per_second include_effective_tokens_per_second "
        "log_peak_memory_stats skip_memory_metrics profiler profiler_* profile_* "
        "enable_torch_profiler eval_table_size"
    ),
    "dtrain chooses the number of workers; `dtrain data prepare --processes N` sets it": (
        "preprocessing_num_workers dataset_num_proc dataset_processes dataset_num_workers "
        "dataloader_num_workers num_workers dataloader_pin_memory dataloader_prefetch_factor "
        "dataloader dataloader_persistent_workers dataloader_multiprocessing_context"
    ),
    "the base model's own files decide it": (
        "model_type tokenizer_type tokenizer_config tokenizer_name tokenizer_name_or_path "
        "processor_type is_llama_derived_model tokenizer_use_fast use_fast_tokenizer "
        "rope_scaling tokenizer tokenizer_kwargs tokenizer_legacy "
        "tokenizer_use_mistral_common tokenizer_save_jinja_files pad_token eos_token "
        "bos_token unk_token model_config overrides_of_model_config overrides_of_model_kwargs "
        "cls_model_config type_of_model model_init_kwargs is_falcon_derived_model "
        "is_mistral_derived_model is_qwen_derived_model low_cpu_mem_usage low_cpu_ram "
        "device_map max_memory use_cache upcast_layernorm upcast_lmhead_output "
        "embeddings_skip_upcast experimental_skip_move_to_device"
    ),
    "use model.tokens.add": (
        "add_tokens tokens new_special_tokens add_special_tokens additional_special_tokens "
        "new_special_tokens_config"
    ),
    "dtrain does not change the base's own tokens": (
        "special_tokens eot_tokens added_tokens_overrides fix_untrained_tokens"
    ),
    "model.tokens.add makes the matrices as large as its tokens need": (
        "resize_vocab resize_token_embeddings init_special_tokens mean_resizing_embeddings "
        "resize_token_embeddings_to_32x shrink_embeddings"
    ),
    "packing fills every sequence, so batches need no sorting by length": (
        "group_by_length length_column_name pad_to_multiple_of dataloader_drop_last "
        "train_sampling_strategy curriculum_sampling label_pad_token_id padding_value "
        "ignore_pad_token_for_loss collate_fn"
    ),
    "the order of the data follows from seed": (
        "shuffle data_seed shuffle_merged_datasets shuffle_dataset disable_shuffling "
        "shuffle_before_merging_datasets dataloader_in_order"
    ),
    "prepared data are stored in dtrain's cache folder and used again": (
        "dataset_prepared_path tokenized_path cache_dir streaming skip_prepare_dataset "
        "dataset_keep_in_memory dataset_streaming preprocess_shards buffer_size "
        "preprocessing_batch_size data_shared_file_system pretrain_streaming is_preprocess "
        "dataset_kwargs"
    ),
    "dtrain has no such setting: cut the source file instead": (
        "max_samples max_train_samples max_eval_samples num_samples"
    ),
    "dtrain has no such setting: AdamW's betas and epsilon are torch's defaults": (
        "adam_beta1 adam_beta2 adam_epsilon optim_args adam_beta3 adam_eps adam_epsilon2 "
        "beta1 beta2"
    ),
    f"use stages[], each with a kind: {', '.join(OBJECTIVES)}": (
        "stage task task_type do_train training_type rlhf_type lora_task_type rl"
    ),
    "use engine.kind: zero2 or zero3, and engine.config for a DeepSpeed JSON file": (
        "deepspeed deepspeed_config zero_stage zero_optimization deepcompile "
        "ds3_gather_for_generation"
    ),
    "use engine.kind: fsdp2; it wraps every decoder layer by itself": (
        "fsdp fsdp_* reshard_after_forward transformer_layer_cls_to_wrap auto_wrap_policy "
        "custom_sharded_layers sync_module_states cpu_ram_efficient_loading "
        "mixed_precision_policy state_dict_type final_state_dict_type "
        "memory_efficient_fsdp_wrap"
    ),
    "use engine.kind: ddp, which has no settings of its own": "ddp ddp_*",
    "the engine shards the model; dtrain has no tensor, pipeline, context or expert parallelism": (
        "tensor_parallel_* tensor_model_parallel_size pipeline_model_parallel_size "
        "virtual_pipeline_model_parallel_size context_parallel_size sequence_parallel "
        "sequence_parallel_degree cp_size cp_mode expert_parallel_* "
        "expert_model_parallel_size ring_attn_func heads_k_stride parallelism_config "
        "dist_config use_mca use_megatron_bridge megatron_* use_hyper_parallel "
        "hyper_parallel_* use_distributed_optimizer overlap_grad_reduce overlap_param_gather"
    ),
    "the launcher or `dtrain submit` decides it": (
        "num_machines machine_rank main_process_ip main_process_port master_addr master_port "
        "rdzv_backend same_network compute_environment distributed_type "
        "main_training_function nnodes node_rank use_ray ray_* tpu_* gpu_count local_rank "
        "downcast_bf16 resources_per_worker use_cpu_ids node_count n_node gpu "
        "dockerfile_commands timeout_preprocess memory_preprocess"
    ),
    "use stages[].method.kind: rslora; with qlora multiply alpha by √r": (
        "use_rslora peft_use_rslora rslora lora_use_rslora"
    ),
    "weights and activations are computed in bfloat16 or float32, without fp8 or training for "
    "quantization": (
        "fp8 fp8_* qat fake_quant_after_n_steps weight_dtype activation_dtype "
        "quantize_embedding nvfp4_merge_aware"
    ),
    "dtrain has no such method; stages[].method.kind names those it has": (
        "oft_* boft_* vblora_* xlora_* randlora_* use_qalora qalora_group_size use_bdlora "
        "use_llama_pro mixture_of_depths relora relora_* lisa_* unfrozen_parameters "
        "freeze_trainable_modules freeze_extra_modules prefix_projection encoder_hidden_size "
        "encoder_num_layers prompt_tuning_init prompt_tuning_init_text"
    ),
    "an adapter has no such setting; stages[].method.target_modules names its layers": (
        "lora_bias bias layers_to_transform layers_pattern peft_layers_to_transform "
        "peft_layers_pattern peft_layer_replication layer_replication exclude_modules "
        "fan_in_fan_out lora_fan_in_fan_out trainable_token_indices "
        "peft_trainable_token_indices ensure_weight_tying "
        "peft_ensure_weight_tying alora_invocation_tokens module_dropout rank_dropout "
        "lora_on_cpu peft_autocast_adapter_dtype megatron_core"
    ),
    "stages[].method.target_modules names the weights of experts too: gate_up_proj, down_proj": (
        "target_parameters lora_target_parameters"
    ),
    "dtrain writes it into adapter_config.json by itself": (
        "auto_mapping base_model_name_or_path inference_mode runtime_config peft_version"
    ),
    "use stages[].train.optimizer; dtrain has no such optimizer": (
        "use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini qgalore_* "
        "dion_* optim_target_modules torchdistx_path optimizer_in_bwd"
    ),
    "use stages[].train.lr_scheduler and its keys": (
        "lr_quadratic_warmup lr_div_factor cosine_constant_lr_ratio jagged_* num_cycles "
        "lr_end power"
    ),
    "dtrain trains on answers that exist; it has no PPO, GRPO or other training on generated "
    "ones": (
        "ppo_* grpo_* gdpo_* reward_* trl use_vllm vllm vllm_* sglang_* num_generations "
        "num_generations_eval num_iterations rollout_func scale_rewards kl_coef kl_coeff "
        "cliprange vf_coef whiten_rewards advantage_estimator epsilon_high "
        "importance_sampling_level policy_model value_checkpointer ref_policy_checkpointer "
        "reward_and_value_model missing_eos_penalty penalise_no_eos "
        "max_tool_calling_iterations steps_per_generation vespo_* ebft "
        "center_rewards_coefficient process_reward_model num_labels epsilon entropy_coef "
        "num_completions_to_print mask_truncated_completions lmbda min_response_length "
        "stop_token_ids"
    ),
    "dtrain has no such loss; stages[].preference.loss names those it has": (
        "f_divergence_type f_alpha_divergence_coef use_weighting dpo_use_weighting "
        "discopop_tau ld_alpha pref_bco_weight dpo_loss_weights use_dft_loss use_asft_loss "
        "asft_alpha use_eaft use_eaft_loss eaft_alpha eaft_k"
    ),
    "use stages[].method.router: train; the coefficient of its loss is that in config.json": (
        "router_aux_loss_coef moe_aux_loss_coef moe_aux_loss_coeff output_router_logits"
    ),
    "use stages[].method.kind: qlora, which keeps experts in 4 bits too": "quantize_moe_experts",
    "experts are computed on the tokens that each of them gets, without a setting": (
        "experts_implementation use_scattermoe use_sonicmoe llama4_linearized_experts moe_* "
        "use_kt kt_*"
    ),
    "dtrain trains on text only": (
        "image_* video_* audio_* crop_to_patches use_audio_in_video media_dir "
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model "
        "freeze_mm_modules processor_kwargs is_multimodal"
    ),
    "the file's suffix decides it": "ds_type",
    "a source has no subset: save it as files, and name these in stages[].data.sources[].path": (
        "subset dataset_config dataset_config_name"
    ),
    "role and content, or from and value, are found in the rows": (
        "message_property_mappings message_field_role message_field_content role_tag "
        "content_tag user_tag assistant_tag roles role role_boundaries"
    ),
    "a turn's own `train: true` or `train: false` decides it": (
        "message_field_training message_field_training_detail train_on_last_step_only"
    ),
    "a system prompt is in the rows, in the column system or a turn": (
        "default_system default_system_message drop_system_message new_system_prompt "
        "system_prompt system_format"
    ),
    "the template decides it: name a jinja file in stages[].data.template": (
        "chat_template_kwargs enable_thinking preserve_thinking split_thinking "
        "template_thinking_key tool_format efficient_eos"
    ),
    "set environment variables where the command starts": "env",
    "download the revision, and name its folder in model.base": (
        "model_revision revision_of_model hub_revision revision"
    ),
    "dtrain trains a base that exists": "train_from_scratch reinit_weights init_config",
    "nothing is uploaded while it trains": (
        "push_to_hub hub_* export_hub_model_id push_dataset_to_hub hf_use_auth_token "
        "hf_hub_token ms_hub_token om_hub_token"
    ),
    "use `dtrain merge`, `dtrain generate` or `dtrain serve` on the run": (
        "export_* infer_backend infer_dtype merge_lora merge_method gradio_* "
        "max_generated_tokens num_beams do_sample repetition_penalty length_penalty "
        "use_kv_cache enable_kv_cache sample_backend offload_folder"
    ),
    "the tracker's own environment variables decide it": (
        "wandb_* mlflow_* comet_* trackio_* swanlab_* otel_* use_otel_metrics "
        "hf_mlflow_log_artifacts"
    ),
    "a checkpoint holds what trains and the optimizer's state, in safetensors": (
        "save_only_model save_safetensors save_on_each_node save_first_step "
        "enable_jit_checkpoint dynamic_checkpoint checkpointer save_adapter_weights_only "
        "save_last_checkpoint restore_callback_states_from_checkpoint"
    ),
    "held-out sets are evaluated before the first stage and after each": (
        "eval_on_start eval_delay batch_size_val eval_accumulation_steps "
        "eval_do_concat_batches include_for_metrics batch_eval_metrics prediction_loss_only "
        "compute_accuracy fp16_full_eval eval_use_gather_object"
    ),
    "use stages[].train.micro_batch_size: auto, as many sequences as the plan allows": (
        "auto_find_batch_size"
    ),
    "give the sources a weight each: stages[].data.sources[].weight": "mix_strategy",
    "cut the source file instead": (
        "shards shards_idx dataset_shard_num dataset_shard_idx min_sample_len"
    ),
    "dtrain compiles what stays exact by itself; see model.kernels": (
        "compile torch_compile torch_compile_*"
    ),
    "dtrain's attention is exact: no shifted or sparse windows": (
        "s2_attention shift_attn use_pose pose_* flex_attn_compile_kwargs flash_optimum"
    ),
    "dtrain is extended in its own code: dtrain/README.md": (
        "plugins trainer_cls reward_functions llmcompressor"
    ),
    "activations are recomputed, not moved: model.gradient_checkpointing": (
        "activation_offloading enable_activation_offloading layer_offloading"
    ),
    "dtrain has no such setting": (
        "remove_unused_columns strict torch_empty_cache_steps gc_steps gc_collect_steps "
        "gpu_memory_limit debug accelerator_config label_names average_tokens_across_devices "
        "lora_plus disable_dropout dpo_use_logits_to_keep precompute_ref_batch_size "
        "ignore_bias_buffers chunked_cross_entropy_num_chunks use_orig_params layer_dropout "
        "early_exit_loss forward_batch_size diffusion use_distributed_state_dict "
        "total_num_tokens fp32_norms"
    ),
    "write the rows in one of the formats of stages[].data.sources[].format": (
        "input_format no_input_format prompt_format chosen_format rejected_format "
        "completion_format step_separator input_transform conversation apply_chat_template "
        "pretraining_sample_concatenation"
    ),
}
