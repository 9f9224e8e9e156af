"""The arguments of Megatron-LM that do not change what a model computes, by theme.

They are those of v2.6 (2021) to core_v0.19.0 and of main in August 2026: what the parser has, what is generated from
dataclasses, the fields of the configs that are taken from the arguments by name, and what the training adds to the
arguments before it saves them. `tools/checkpoint/megatron_arguments.py` lists the arguments of a checkout, and fails
on one that is neither here nor among the carried and the refused ones of `argument_check`.
"""

from collections.abc import Mapping

HARMLESS: Mapping[str, frozenset[str]] = {
    theme: frozenset(names.split())
    for theme, names in {
        # They made the weights; the model computes without them.
        "optimizer and schedule": """
            _is_global_batch_size_explicitly_specified adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm
            batch_size calculate_per_token_loss clip_grad consumed_train_bins consumed_train_samples
            consumed_valid_samples curr_iteration decoupled_lr decoupled_min_lr decrease_batch_size_if_needed
            deprecated_use_mcore_models do_test do_train do_valid embedding_init_method embedding_init_method_std
            end_weight_decay eval_global_batch_size eval_interval eval_iters eval_micro_batch_size
            finalize_model_grads_func finetune global_batch_size init_method init_method_xavier_uniform
            iterations_to_skip lion_beta1 lion_beta2 lr lr_decay_iters lr_decay_samples lr_decay_steps
            lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters lr_warmup_samples lr_warmup_steps
            lr_wsd_decay_iters lr_wsd_decay_samples lr_wsd_decay_style micro_batch_size min_lr model_type
            muon_coefficient_type muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum muon_nesterov
            muon_num_ns_steps muon_scalar_optimizer muon_scale_mode muon_split_qkv muon_tp_mode muon_use_nesterov
            muon_use_syrk no_weight_decay_cond_type num_floating_point_operations_so_far
            offset_sampling_seed_by_dp_rank optimizer optimizer_cuda_graph optimizer_offload_fraction
            output_layer_init_method override_lr_scheduler override_opt_param_scheduler perform_initialization
            qk_clip qk_clip_alpha qk_clip_threshold rampup_batch_size seed sgd_momentum skip_train
            skipped_train_samples start_eval_at_iter start_weight_decay step_batch_size_schedule te_rng_tracker
            to_test train_iters train_samples train_sync_interval use_cpu_initialization use_distributed_optimizer
            use_precision_aware_optimizer use_te_rng_tracker warmup wd_incr_steps weight_decay
            weight_decay_incr_style wsd_decay_steps yaml_cfg
        """,
        "data and tokenizer": """
            allow_ambiguous_pad_tokens chat_template create_attention_mask_in_dataloader data_args_path
            data_cache_path data_impl data_path data_sharding dataloader_defer_npy_index_mmap
            dataloader_fast_cache_load dataloader_inter_document_masking dataloader_type eod_mask_loss eos_id
            full_validation legacy_tokenizer merge_file metadata_path mid_level_dataset_surplus mmap_bin_files
            mmap_warmup mock_data multiple_validation_sets null_tokenizer_eod_id null_tokenizer_pad_id
            num_dataset_builder_threads num_workers object_storage_cache_path pad_vocab_size
            per_dataset_sequences_path per_split_data_args_path phase_transition_iterations
            renormalize_blend_weights reset_attention_mask reset_position_ids s3_cache_path sft
            sft_tokenizer_prompt_format special_tokens split test_data_path tiktoken_num_special_tokens
            tiktoken_pattern tiktoken_special_tokens tokenizer_hf_include_special_tokens
            tokenizer_hf_no_include_special_tokens tokenizer_hf_no_use_fast tokenizer_hf_use_fast tokenizer_metadata
            tokenizer_model tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy
            tokenizer_special_tokens train_data_path trust_remote_code use_gigatoken valid_data_path
            validation_set_names vocab_file
        """,
        "logging, timing and faults": """
            adlr_autoresume adlr_autoresume_interval app_tag_run_name app_tag_run_version barrier_with_L1_time
            calc_ft_timeouts check_for_large_grads check_for_nan_in_loss_and_grad check_for_spiky_loss
            check_weight_hash_across_dp_replicas_interval config_logger_dir disable_straggler_on_startup
            dump_param_to_param_group_map enable_ft_package enable_one_logger ep_size error_injection_rate
            error_injection_type exit_duration_in_mins exit_interval exit_on_missing_checkpoint exit_signal
            exit_signal_handler exit_signal_handler_for_dataloader exit_signal_handler_for_training
            fault_injector_delay_start_iteration fault_injector_fault_delay fault_injector_fault_probabilities
            fault_injector_fault_types fault_injector_mtti_seconds fault_injector_num_ranks
            fault_injector_offset_seconds fault_injector_ranks fault_injector_seed flight_recorder_dump_on_timeout
            flight_recorder_dump_path flight_recorder_extra_dump_on_exec flight_recorder_include_only_active
            flight_recorder_include_stack_trace flight_recorder_trace_buffer_size ft_num_warmup_iters gemm_shapes
            gpu_sniff_test_interval inprocess_active_world_size inprocess_barrier_timeout
            inprocess_completion_timeout inprocess_empty_cuda_cache inprocess_granularity inprocess_hard_timeout
            inprocess_heartbeat_interval inprocess_heartbeat_timeout inprocess_last_call_wait
            inprocess_max_iterations inprocess_monitor_process_interval inprocess_monitor_thread_interval
            inprocess_progress_watchdog_interval inprocess_restart inprocess_soft_timeout
            inprocess_termination_grace_time log_batch_size_to_tensorboard log_device_memory_used log_energy
            log_interval log_learning_rate_to_tensorboard log_loss_scale_to_tensorboard log_max_attention_logit
            log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm log_progress
            log_straggler log_throughput log_timers_to_tensorboard log_validation_ppl_to_tensorboard
            log_world_size_to_tensorboard logging_level memory_snapshot_path nvtx_ranges one_logger_async
            one_logger_entity one_logger_project one_logger_run_name otel_enabled otel_service_name otel_span_groups
            profile profile_ranks profile_step_end profile_step_start pytorch_profiler_collect_callstack
            pytorch_profiler_collect_chakra pytorch_profiler_collect_shapes record_memory_history record_shapes
            rerun_mode result_rejected_tracker_filename run_workload_inspector_server save_activations_interval
            save_dgrads_interval save_interval save_params_interval save_retain_interval
            save_tokens_per_expert_interval save_wgrads_interval sharp_enabled_group skip_allreduce skip_alltoall
            skip_gemm skip_reducescatter skip_sendrecv straggler_ctrlr_port straggler_minmax_count tensorboard_dir
            tensorboard_log_interval tensorboard_queue_size timers timing_log_level timing_log_option tp_size
            use_pytorch_profiler wandb_entity wandb_exp_name wandb_project wandb_save_dir
        """,
        "checkpoints": """
            allow_transformer_engine async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm
            async_save async_strategy auto_detect_ckpt_format ckpt_assume_constant_structure ckpt_convert_format
            ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format ckpt_drop_redundant_extra_state ckpt_format
            ckpt_fully_parallel_load ckpt_fully_parallel_load_exchange_algo
            ckpt_fully_parallel_load_per_rank_objects ckpt_fully_parallel_load_process_group
            ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated ckpt_fully_parallel_save_process_group
            ckpt_load_validate_sharding_integrity ckpt_pg_tensors_cache_create ckpt_pg_tensors_cache_path ckpt_step
            disable_msc_deprecated dist_ckpt_format dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
            dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers
            distrib_optim_fully_reshardable_mem_efficient enable_msc hetereogenous_dist_checkpoint iteration load
            load_main_params_from_ckpt no_load_optim no_load_rng no_save_optim no_save_rng non_persistent_ckpt_type
            non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo non_persistent_local_ckpt_dir
            non_persistent_save_interval override_ckpt_iteration pretrained_checkpoint replication
            replication_factor replication_jump save save_tokenizer_assets strict_fsdp_dtensor_load
            use_checkpoint_args use_checkpoint_lr_scheduler use_checkpoint_opt_param_scheduler use_dist_ckpt
            use_dist_ckpt_deprecated use_mp_args_from_checkpoint_args use_persistent_ckpt_worker
            use_tokenizer_model_from_checkpoint_args verify_integrity
        """,
        # How a model is cut over ranks is in the tensors, or read as the layout.
        "layout and communication": """
            DDP_impl account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split align_grad_reduce
            align_param_gather async_tensor_model_parallel_allreduce batch_p2p_sync cp_comm_type
            create_all_gather_group data_parallel_random_init data_parallel_sharding_strategy
            ddp_average_in_collective ddp_pad_buckets_for_high_nccl_busbw
            ddp_param_name_patterns_for_fp32_local_accumulation ddp_reduce_scatter_with_fp32_accumulation
            decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers defer_embedding_wgrad_compute
            delay_grad_reduce delay_offload_until_cuda_graph delay_param_gather delay_wgrad_compute
            disable_symmetric_registration distributed_backend distributed_timeout_minutes
            distributed_timeout_seconds_after_init enable_full_sharding_in_hsdp enable_gloo_process_groups
            expert_gtp_weight_remat_size expert_tensor_parallel_num_weight_shards fake_process_group
            first_pipeline_num_layers fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer
            fsdp_manual_registration grad_reduce_in_bf16 grad_scale_func grad_sync_func gradient_accumulation_fusion
            gradient_reduce_div_fusion gtp_expert_remat_nccl_ub gtp_remat_nccl_ub gtp_remat_opt_in_modules
            gtp_remat_reduce_scatter_with_fp32_accumulation gtp_weight_remat_size
            hierarchical_context_parallel_sizes hybrid_context_parallel init_model_with_meta_device
            last_pipeline_num_layers lazy_mpu_init local_rank max_seqlen_per_dp_cp_rank
            megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_grad_comm_dtype
            megatron_fsdp_main_grads_dtype megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer
            megatron_fsdp_version microbatch_group_size_per_vp_stage model_parallel_size
            nccl_communicator_config_path nccl_ub no_sync_func num_distributed_optimizer_instances
            num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank outer_dp_sharding_strategy
            overlap_cpu_optimizer_d2h_h2d overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather
            overlap_param_gather_with_optimizer_step param_sync_func pipeline_model_parallel_comm_backend
            pipeline_model_parallel_layout pipeline_model_parallel_split_rank rank
            scatter_gather_tensors_in_pipeline standalone_embedding_stage suggested_communication_unit_size
            tensor_parallel_num_weight_shards torch_fsdp2_reshard_after_forward tp_comm_atomic_ag tp_comm_atomic_rs
            tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag
            tp_comm_overlap_cfg tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs
            tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_only_amax_red
            transformer_pipeline_model_parallel_size use_contiguous_buffers_in_local_ddp use_custom_fsdp
            use_gloo_process_groups use_layer_wise_distributed_optimizer use_layer_wise_param_layout
            use_megatron_fsdp use_ring_exchange_p2p use_sharp use_torch_fsdp2 use_torch_optimizer_for_cpu_offload
            use_tp_pp_dp_mapping variable_seq_lengths wgrad_deferral_limit world_size
        """,
        # Other rounding, the same function.
        "kernels and precision": """
            accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store apply_query_key_layer_scaling
            apply_rope_fusion attention_backend attention_softmax_in_fp32 autocast_dtype batch_invariant_backend
            batch_invariant_mode bf16 bias_dropout_fusion bias_swiglu_fusion clone_scatter_output_in_embedding
            cross_entropy_fusion_impl cross_entropy_loss_fusion cuda_graph_impl deterministic_mode
            disable_bf16_reduced_precision_matmul disable_jit_fuser disable_parameter_transpose_cache
            enable_autocast enable_experimental exp_avg_dtype exp_avg_sq_dtype first_last_layers_bf16
            flash_attention_version fp16 fp16_lm_cross_entropy fp32_residual_connection fp4 fp4_param_gather
            fp4_quantizer_factory fp4_recipe fp8 fp8_amax_compute_algo fp8_amax_history_len
            fp8_dot_product_attention fp8_interval fp8_margin fp8_multi_head_attention fp8_output_proj
            fp8_param_gather fp8_quantizer_factory fp8_recipe fp8_wgrad fused_residual_rmsnorm fused_single_qkv_rope
            hysteresis initial_loss_scale keep_fp8_transpose_cache keep_fp8_transpose_cache_when_using_custom_fsdp
            kitchen_attention_backend kitchen_config_file kitchen_recipe_number logit_dtype loss_scale
            loss_scale_window main_grads_dtype main_params_dtype masked_softmax_fusion memory_efficient_layer_norm
            min_loss_scale no_persist_layer_norm num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 onnx_safe
            params_dtype quant_recipe reuse_grad_buf_for_mxfp8_param_ag te_precision_config_file test_mode
            transformer_impl use_flash_attn use_kitchen use_kitchen_attention use_te_activation_func
            use_transformer_engine_op_fuser
        """,
        "memory": """
            _cpu_offloading_context activation_offload_fraction activations_checkpoint_method
            activations_checkpoint_num_layers checkpoint_activations cpu_offloading cpu_offloading_activations
            cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers
            cpu_offloading_weights delta_offload_bytes_across_pp_ranks distribute_checkpointed_activations
            distribute_saved_activations empty_unused_memory_level fine_grained_activation_offloading
            fine_grained_offloading_max_inflight_offloads manual_gc manual_gc_eval manual_gc_interval
            min_offloaded_tensor_size num_microbatches_with_partial_activation_checkpoints offload_modules
            optimizer_cpu_offload pin_cpu_grads pin_cpu_params recompute_activations recompute_granularity
            recompute_method recompute_modules recompute_num_layers
        """,
        "experts: kernels, messages and losses": """
            ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream high_priority_stream_groups
            moe_combine_bwd_dtype moe_deepep_num_sms moe_dispatch_fwd_dtype moe_enable_deepep
            moe_enable_routing_replay moe_extended_tp moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms
            moe_grad_scale_func moe_grouped_gemm moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
            moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs
            moe_layer_recompute moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_expert_input_to_capacity
            moe_pad_experts_for_cuda_graph_inference moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
            moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size moe_per_layer_logging
            moe_permute_fusion moe_permute_fusion_into_hybridep moe_router_bias_update_rate moe_router_dtype
            moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization
            moe_router_quantile_balancing_ema moe_routing_trace_capture_hidden_states
            moe_routing_trace_capture_logits moe_routing_trace_dump_weights moe_routing_trace_max_training_iters
            moe_routing_trace_path moe_shared_expert_overlap moe_single_grouped_bias moe_single_grouped_weight
            moe_token_dispatcher_type moe_token_drop_policy moe_upcycling_granularity moe_use_grouped_tensor
            moe_use_legacy_grouped_gemm moe_use_upcycling moe_z_loss_coeff
            overlap_dispatch_backward_with_experts_wgrad overlap_moe_expert_parallel_comm
            use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
        """,
        "inference": """
            cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_scope_deprecated
            cuda_graph_use_single_mempool cuda_graph_warmup_steps decode_only_cuda_graphs disable_chunked_prefill
            enable_chunked_prefill enable_cuda_graph external_cuda_graph flash_decode
            inference_batch_times_seqlen_threshold inference_coordinator_port inference_cuda_graph_all_prefills
            inference_cuda_graph_max_tokens inference_cuda_graph_scope inference_disable_ep_consensus
            inference_disable_triton_nvls_kernels inference_dynamic_batching
            inference_dynamic_batching_async_sched_mode inference_dynamic_batching_block_size
            inference_dynamic_batching_buffer_guaranteed_fraction inference_dynamic_batching_buffer_overflow_factor
            inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_chunk_size
            inference_dynamic_batching_cuda_graph_max_tokens
            inference_dynamic_batching_cuda_graph_mixed_prefill_count
            inference_dynamic_batching_cuda_graph_sizing_distribution
            inference_dynamic_batching_enable_prefix_caching inference_dynamic_batching_logprobs_mode
            inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_max_requests
            inference_dynamic_batching_max_requests_override inference_dynamic_batching_max_tokens
            inference_dynamic_batching_max_tokens_override inference_dynamic_batching_num_cuda_graphs
            inference_dynamic_batching_paused_buffer_size_gb
            inference_dynamic_batching_prefix_caching_coordinator_policy
            inference_dynamic_batching_prefix_caching_eviction_policy
            inference_dynamic_batching_prefix_caching_mamba_gb
            inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_sampling_backend
            inference_dynamic_batching_track_generated_token_events
            inference_dynamic_batching_track_paused_request_events inference_dynamic_batching_unified_memory_level
            inference_fuse_tp_communication inference_grouped_gemm_backend inference_logging_step_interval
            inference_max_batch_size inference_max_requests inference_max_seq_length
            inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type inference_rng_tracker
            inference_sampling_seed inference_shards inference_text_gen_server_logging
            inference_use_synchronous_zmq_collectives inference_wandb_logging max_tokens_to_oom
            mlp_chunks_for_prefill mlp_chunks_for_training nccl_all_reduce_for_prefill num_speculative_tokens
            output_bert_embeddings refit_method symmetric_ar_type use_inference_optimized_layers
            use_legacy_static_engine
        """,
        "post-training and reinforcement learning": """
            export_default_te_spec export_draft_vocab_size export_eagle_algorithm export_force_local_attention
            export_freeze_mtp export_kd_cfg export_kd_finalize export_kd_teacher_ckpt_format export_kd_teacher_load
            export_kd_teacher_model_config export_legacy_megatron export_model_type export_offline_model
            export_te_mcore_model finetune_data_files finetune_data_split finetune_hf_dataset freeze_all_layers
            freeze_base_for_mtp grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_default_temperature
            grpo_default_top_p grpo_entropy_term_weight grpo_filter_groups_with_same_reward grpo_group_size
            grpo_iterations grpo_kl_beta grpo_prompts_per_step grpo_samples_per_iteration head_lr_mult
            langrl_env_config langrl_external_server langrl_inference_server_conversation_template
            langrl_inference_server_type load_model_opt_format logits_load_decode_threads logits_load_dir
            logits_load_ignore_errors logits_load_kd_loss_alpha logits_load_msc_prefetch_depth
            logits_load_prefetch_factor logits_save_dir logits_save_dtype logits_save_top_k logits_save_top_p
            logits_save_top_p_min_k modelopt_enabled perform_rl_step qad_train_target
            rl_calculate_intra_group_similarity rl_consumption_granularity rl_default_temperature rl_default_top_k
            rl_default_top_p rl_durable_rollout_bank rl_enforce_generation_order rl_generation_batch_size
            rl_generation_lag rl_importance_sampling_truncation_coef rl_inference_expert_model_parallel_size
            rl_inference_expert_tensor_model_parallel_size rl_inference_logprobs_is_correction
            rl_inference_model_unified_memory_level rl_inference_parsers rl_inference_pipeline_model_parallel_size
            rl_inference_tensor_model_parallel_size rl_kv_cache_management_mode rl_max_inflight_requests
            rl_num_parallel_generation_batches rl_num_parallel_generations
            rl_offload_inference_model_weights_when_idle rl_offload_kv_cache_during_training
            rl_offload_optimizer_during_inference rl_parallel_generation_tasks rl_partial_rollouts
            rl_persist_cuda_graphs rl_profile rl_profile_dir rl_prompts_per_eval rl_remove_kv_cache_during_training
            rl_reset_cuda_graphs rl_rollout_bank_dir rl_rollout_bank_max_bytes rl_sequence_packing_algo
            rl_sequence_packing_bin_size rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token
            rl_submission_granularity rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap
            stream_ckpt_dequant teacher_model_config
        """,
        # Fields of the config that Megatron-LM sets from arguments of other names.
        "overridden by others": """
            batch_p2p_comm bias_activation_fusion deallocate_pipeline_outputs encoder_num_layers fp4_param fp8_param
            num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_moe_experts persist_layer_norm
            pipeline_dtype
        """,
        # They do nothing unless an argument that is refused turns their feature on.
        "settings of refused features": """
            beta_fast beta_slow cache_mla_latents disable_mamba_mem_eff_path dsa_indexer_head_dim
            dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 dsa_indexer_loss_coeff dsa_indexer_n_heads
            dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
            dsa_indexer_skip_topk_offset dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_use_sparse_loss
            dsa_kernel_backend experimental_attention_variant_loss_scale_func gdp_cutedsl_kernel
            gdp_num_chunk_states_to_recompute gdp_num_householder kv_lora_rank linear_conv_kernel_dim
            linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim mamba_head_dim
            mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype mamba_num_groups mamba_num_heads
            mamba_state_dim mamba_training_ssm_states_dtype mhc_init_gating_factor mhc_num_residual_streams
            mhc_recompute_layer_num mhc_sinkhorn_iterations mla_down_proj_fusion mscale mscale_all_dim
            mtp_detach_heads mtp_grad_scale_func mtp_hsm mtp_loss_scaling_factor mtp_standalone
            mtp_use_repeated_layer original_max_position_embeddings q_lora_rank qk_head_dim qk_pos_emb_head_dim
            rotary_scaling_factor use_fused_weighted_squared_relu use_mamba_mem_eff_path v_head_dim
            window_attn_skip_freq yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
            yarn_original_max_position_embeddings
        """,
        # BERT, T5, retrieval, vision: a GPT ignores them, or they are settings of a refused feature.
        "other kinds of models": """
            bert_binary_head bert_embedder_type bert_load biencoder_projection_dim
            biencoder_shared_query_context_model block_data_path classes_fraction data_per_class_fraction
            decoder_seq_length dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size
            dino_local_crops_number dino_local_img_size dino_norm_last_layer dino_teacher_temp
            dino_warmup_teacher_temp dino_warmup_teacher_temp_epochs embedding_path
            encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
            evidence_data_path fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
            fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token ict_head_size ict_load img_dim
            img_h img_w indexer_batch_size indexer_log_interval iter_per_epoch mask_factor mask_prob mask_type
            num_channels num_classes patch_dim query_in_block_prob relative_attention_max_distance
            relative_attention_num_buckets retriever_report_topk_accuracies retriever_score_scaling
            retriever_seq_length retro_attention_gate retro_bert_tokenizer_type retro_bert_vocab_file
            retro_block_size retro_chunk_length retro_cyclic_train_iters retro_encoder_attention_dropout
            retro_encoder_hidden_dropout retro_encoder_layers retro_neighbor_dirs retro_num_neighbors
            retro_num_retrieved_chunks retro_project_dir retro_return_doc_ids retro_split_preprocessing
            retro_verify_neighbor_count retro_workdir sample_rate short_seq_prob swin_backbone_type titles_data_path
            use_one_sent_docs vision_backbone_type vision_pretraining vision_pretraining_type vocab_extra_ids
        """,
    }.items()
}
"""Names of arguments, by theme."""
