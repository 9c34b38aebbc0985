"""What every field of ``TransformerConfig`` does to packed rows, as ``validate`` reads it.

A field is *proven* where tests compare packed with written-out rows under it, *harmless* where it
acts on no value, on every token alone, or only beside a setting that is refused, and *refused*
where packed rows would differ, or nothing shows that they do not: those are ``refused_fields``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The same weights give other outputs under another value.
PROVEN_MODEL = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
    *("kv_channels", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "gated_linear_unit"),
    *("activation_func_clamp_value", "glu_linear_offset", "qk_layernorm"),
    *("qk_l2_norm", "softmax_scale", "rotary_interleaved", "no_rope_freq"),
    *("attention_output_gate", "apply_residual_connection_post_layernorm"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk"),
    *("moe_router_pre_softmax", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_topk_scaling_factor", "moe_apply_probs_on_input"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
    "moe_router_enable_expert_bias",
    # Of latent attention; elsewhere the model is told of its rotary embedding, not the layers.
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim"),
    *("qk_pos_emb_head_dim", "v_head_dim", "rotary_base", "rotary_percent"),
    *("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim"),
    # Of state-space layers; of linear attention, and which layers have it.
    *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
    *("linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
}
# How the same model is run; which sizes are, ``parallel.ParallelSizes`` says.
PROVEN_RUN = {
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"),
    *("virtual_pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
    "account_for_loss_in_pipeline_split",
    *("variable_seq_lengths", "overlap_p2p_comm", "batch_p2p_comm", "calculate_per_token_loss"),
    *("params_dtype", "pipeline_dtype", "recompute_num_layers", "apply_query_key_layer_scaling"),
    *("init_method_std", "microbatch_group_size_per_vp_stage", "moe_shared_expert_overlap"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"),
}
# Every token on its own, but not with the norms and kernels that tests have.
HARMLESS_MODEL = {
    *("layernorm_zero_centered_gamma", "latent_layernorm_epsilon"),
    # Of ``DecoderConfig``.
    *("embedding_multiplier", "has_post_layernorms", "window_rotary_base"),
    *("has_norms_over_heads", "has_pre_layernorms"),
    # How the weights of layers without an MLP begin; ``GPTModel`` has none.
    "is_hybrid_model",
}
HARMLESS_RUN = {
    # Where and in which precision tensors live; how weights begin.
    *("fp16", "bf16", "fp32_residual_connection", "autocast_dtype"),
    *("perform_initialization", "use_cpu_initialization", "init_model_with_meta_device"),
    *("init_method", "output_layer_init_method"),
    *("embedding_init_method", "embedding_init_method_std", "use_te_rng_tracker"),
    *("inference_rng_tracker", "attention_softmax_in_fp32"),
    *("disable_bf16_reduced_precision_matmul", "deterministic_mode", "test_mode"),
    # Hooks that training sets.
    *("timers", "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func"),
    *("param_sync_func", "moe_grad_scale_func", "mtp_grad_scale_func"),
    "experimental_attention_variant_loss_scale_func",
    # Transport and logging.
    *("pipeline_model_parallel_comm_backend", "batch_p2p_sync", "use_ring_exchange_p2p"),
    *("async_tensor_model_parallel_allreduce", "barrier_with_L1_time", "config_logger_dir"),
    *("deallocate_pipeline_outputs", "moe_per_layer_logging"),
    *("high_priority_a2a_comm_stream", "hetereogenous_dist_checkpoint", "moe_enable_deepep"),
    *("moe_deepep_num_sms", "moe_flex_dispatcher_num_sms"),
    # Megatron-LM says them always; what they come to is refused: gtp_weight_remat_size.
    *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
    # Kernels that compute the same for every token.
    *("gradient_accumulation_fusion", "bias_activation_fusion", "masked_softmax_fusion"),
    *("persist_layer_norm", "memory_efficient_layer_norm", "bias_dropout_fusion"),
    *("apply_rope_fusion", "use_fused_weighted_squared_relu", "cross_entropy_loss_fusion"),
    *("moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm"),
    *("use_te_activation_func", "clone_scatter_output_in_embedding"),
    *("disable_parameter_transpose_cache", "mla_down_proj_fusion"),
    # Of ordinary batches, whose attention, exchanges and scans are not ours.
    *("attention_backend", "flash_attention_version", "cp_comm_type", "use_mamba_mem_eff_path"),
    # Deprecated spelling of a recomputed module.
    "moe_layer_recompute",
    # Of a provider that is its model's configuration too (Megatron-Bridge): outside the layers.
    *("vocab_size", "make_vocab_size_divisible_by", "should_pad_vocab", "seq_length"),
    *("share_embeddings_and_output_weights", "position_embedding_type"),
    *("seq_len_interpolation_factor", "fp16_lm_cross_entropy"),
    *("parallel_output", "scatter_embedding_sequence_parallel", "tp_comm_overlap_cfg"),
    *("transformer_layer_spec", "generation_config", "hf_model_id", "restore_modelopt_state"),
    *("use_transformer_engine_full_layer_spec", "mtp_enabled", "_pg_collection"),
    *("rope_scaling", "rope_scaling_factor", "yarn_rotary_scaling_factor", "yarn_beta_fast"),
    *("yarn_original_max_position_embeddings", "yarn_beta_slow", "yarn_mscale"),
    *("yarn_mscale_all_dim", "yarn_correction_range_round_to_int"),
}
# They do nothing: they only qualify a setting that is refused or off,
INERT = {
    # Megatron-Core's own inference,
    *("mlp_chunks_for_prefill", "inference_sampling_seed", "symmetric_ar_type"),
    *("inference_fuse_tp_communication", "nccl_all_reduce_for_prefill"),
    *("inference_disable_triton_nvls_kernels", "inference_grouped_gemm_backend"),
    *("inference_moe_disable_fused_quant_kernels", "inference_moe_token_dispatcher_type"),
    *("inference_cuda_graph_scope", "moe_pad_experts_for_cuda_graph_inference"),
    # user buffers,
    *("tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs"),
    *("tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_atomic_ag", "tp_comm_split_rs"),
    *("tp_comm_atomic_rs", "tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1"),
    "tp_comm_bootstrap_backend",
    # offloading, delayed gradients, graphs,
    *("cpu_offloading_num_layers", "_cpu_offloading_context", "cpu_offloading_activations"),
    *("cpu_offloading_weights", "cpu_offloading_double_buffering", "wgrad_deferral_limit"),
    *("cpu_offloading_retain_pinned_cpu_buffers", "offload_modules", "min_offloaded_tensor_size"),
    *("delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks"),
    *("activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads"),
    *("ep_overlap_early_attn_memory_release", "cuda_graph_use_single_mempool"),
    *("cuda_graph_retain_backward_graph", "cuda_graph_warmup_steps", "cuda_graph_scope"),
    "cuda_graph_modules",
    # low precision,
    *("fp8_recipe", "fp8_param", "fp8_quantizer_factory", "fp8_margin", "fp8_interval"),
    *("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad", "fp8_output_proj"),
    *("tp_only_amax_red", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
    *("num_layers_at_end_in_bf16", "fp4_recipe", "fp4_param", "fp4_quantizer_factory"),
    *("activation_func_fp8_input_store", "kitchen_attention_backend"),
    # experts' balance, capacity and stock dispatchers,
    *("moe_router_quantile_balancing_ema", "moe_token_drop_policy"),
    *("moe_hybridep_num_sms", "moe_hybridep_num_blocks_permute", "moe_ncclep_static_shape"),
    *("moe_hybridep_num_blocks_unpermute", "moe_hybridep_num_sms_preprocessing"),
    *("moe_hybridep_pad_uneven_dispatch_inputs", "moe_permute_fusion_into_hybridep"),
    *("moe_ncclep_zero_copy", "moe_paged_stash_page_size"),
    *("moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu"),
    # clipped queries and keys, multi-token prediction, mu-parametrisation,
    *("qk_clip_alpha", "qk_clip_threshold"),
    *("mtp_loss_scaling_factor", "mtp_use_repeated_layer", "mtp_hybrid_override_pattern"),
    *("mtp_detach_heads", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult"),
    *("mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power"),
    # sparse attention, blocks of their own.
    *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_loss_coeff"),
    *("dsa_indexer_use_sparse_loss", "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"),
    *("dsa_kernel_backend", "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation"),
    *("dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    "per_block_parameters",
}

_MODULES = (
    *("core_attn", "gdn_norm_out", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act"),
    "shared_experts",
)
# field -> (values that are proven; one or a list of them, does it change the model?)
PROVEN_VALUES: dict[str, tuple[tuple[Any, ...], bool]] = {
    "normalization": (("LayerNorm", "RMSNorm"), True),
    "experimental_attention_variant": ((None, "gated_delta_net"), True),
    "rope_type": (("rope", "yarn"), True),
    "softmax_type": (("vanilla", "off-by-one", "learnable"), True),
    "moe_router_score_function": (("softmax", "sigmoid"), True),
    "moe_router_dtype": ((None, "fp32", "fp64"), False),
    "moe_token_dispatcher_type": (("alltoall", "allgather", "flex"), False),
    "recompute_granularity": ((None, "full", "selective"), False),
    "recompute_method": ((None, "uniform", "block"), False),
    "recompute_modules": ((None, [], *_MODULES), False),
}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_window(value: Any) -> bool:
    """Megatron-Core's cores agree on these alone: its local one takes -1 for no key at all."""
    if value is None:
        return True
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and _is_count(value[0], 0) and _is_count(value[1], 0) and value[1] == 0


def _is_skip_freq(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(layer, int) and layer in (0, 1) for layer in value)
    return value is None or _is_count(value, 1)


# field -> (whether a value is proven, what is, does it change the model?)
PROVEN_FORMS: dict[str, tuple[Callable[[Any], bool], str, bool]] = {
    "activation_func": (callable, "a function", True),
    "window_size": (
        _is_window,
        "(n, 0), where n keys before a token are seen, or None, where all are",
        True,
    ),
    "window_attn_skip_freq": (
        _is_skip_freq,
        "None, a number n (every nth layer sees all keys) or a list of one 0 or 1 per layer "
        "(1: the layer has the window)",
        True,
    ),
}
# As above; nothing in them meets attention.
HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "transformer_impl": ("local", "transformer_engine"),
    "cross_entropy_fusion_impl": ("native", "te"),
    "moe_flex_dispatcher_backend": ("deepep",),
}
