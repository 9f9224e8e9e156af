"""Keys of a config.json that do not change what its weights compute, or that are read apart from the tables."""

HARMLESS = frozenset(
    """
    architectures auto_map model_type transformers_version torch_dtype dtype use_bfloat16 _name_or_path name_or_path
    _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled
    use_cache is_decoder is_encoder_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict
    torchscript pruned_heads tf_legacy_loss chunk_size_feed_forward gradient_checkpointing pretraining_tp
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty
    output_router_logits router_aux_loss_coef n_ctx n_special predict_special_tokens reorder_and_upcast_attn
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj classifier_dropout
    """.split()
) | {
    # read by functions of their own
    "layer_types",
    "max_window_layers",
    "partial_rotary_factor",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
}
