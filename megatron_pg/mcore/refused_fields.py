"""Fields of ``TransformerConfig`` that are refused, with the values that are fine, and why."""

from __future__ import annotations

from typing import Any

_BALANCE = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss")
_OFF = (False, None)
_NONE = (None,)
_ZERO = (None, 0, 0.0)
_ONE_MASK = "a shared prefix would get one mask where written-out samples get one each"
_LAYOUTS = "every microbatch has its own layout"
_NOT_PROVEN = "it has not been proven exact with packed rows"
_DIVIDED = "context_parallel_size ranks divide every packed row evenly, whatever samples it holds"
_PRECISION = "scaling factors of a packed row differ from those of written-out rows"
_LENGTHS = "its buffers are made for rows of one length"
_WEIGHTS = "weights in that layout have not been proven exact with packed rows"

# field -> (values that are fine, why others are not, does it change the model?)
REFUSED: dict[str, tuple[tuple[Any, ...], str, bool]] = {
    "attention_dropout": ((0, 0.0), _ONE_MASK, False),
    "hidden_dropout": ((0, 0.0), _ONE_MASK, False),
    "hierarchical_context_parallel_sizes": (_NONE, _DIVIDED, False),
    "max_seqlen_per_dp_cp_rank": (_NONE, _DIVIDED, False),
    "hybrid_context_parallel": (_OFF, _DIVIDED, False),
    "mamba_training_ssm_states_dtype": (_NONE, _NOT_PROVEN, False),
    "heterogeneous_block_specs": (_OFF, _NOT_PROVEN, True),
    "mrope_section": (_NONE, "positions of a packed row are one number per token", True),
    # Megatron-Core declares no such field; models that read it off the config do.
    "attn_logit_softcapping": (_ZERO, "softcap is not applied by the kernels in use", True),
    "qk_clip": (_OFF, "no maximum attention logit is collected", True),
    "log_max_attention_logit": (_OFF, "no maximum attention logit is collected", False),
    "batch_invariant_mode": (_OFF, "passes of packed attention are not batch invariant", False),
    "use_mup": (_OFF, "its logit and attention multipliers are not applied", True),
    "mtp_num_layers": (
        (None, 0),
        "multi-token prediction rolls labels across samples of a row",
        True,
    ),
    "mtp_standalone": (_OFF, "it belongs to multi-token prediction", False),
    "fp8": (_OFF, _PRECISION, False),
    "fp8_dot_product_attention": (_OFF, _PRECISION, False),
    "fp8_multi_head_attention": (_OFF, _PRECISION, False),
    "fp4": (_OFF, _PRECISION, False),
    "quant_recipe": (_NONE, _PRECISION, False),
    "use_kitchen": (_OFF, _PRECISION, False),
    "use_kitchen_attention": (_OFF, _PRECISION, False),
    "enable_autocast": (_OFF, _NOT_PROVEN, False),
    "flash_decode": (_OFF, "it is an inference path", False),
    "cache_mla_latents": (_OFF, "it is an inference path", False),
    "use_inference_optimized_layers": (_OFF, "it is an inference path", False),
    "fused_single_qkv_rope": (
        _OFF,
        "Megatron-Core does not fuse it with packed sequences",
        False,
    ),
    "fused_residual_rmsnorm": (_OFF, _NOT_PROVEN, False),
    "mlp_chunks_for_training": ((1,), _NOT_PROVEN, False),
    "use_transformer_engine_op_fuser": (_OFF, _NOT_PROVEN, False),
    "use_grouped_gemm_for_dense_mlp": (_OFF, _WEIGHTS, False),
    "use_grouped_gemm_for_shared_expert": (_OFF, _WEIGHTS, False),
    "enable_cuda_graph": (_OFF, _LAYOUTS, False),
    "external_cuda_graph": (_OFF, _LAYOUTS, False),
    "cuda_graph_impl": (("none", None), _LAYOUTS, False),
    "tp_comm_overlap": (_OFF, _LENGTHS, False),
    "distribute_saved_activations": (_OFF, _NOT_PROVEN, False),
    "num_microbatches_with_partial_activation_checkpoints": (_NONE, _NOT_PROVEN, False),
    "cpu_offloading": (_OFF, _NOT_PROVEN, False),
    "fine_grained_activation_offloading": (_OFF, _NOT_PROVEN, False),
    "overlap_p2p_comm_warmup_flush": (_OFF, _NOT_PROVEN, False),
    "overlap_moe_expert_parallel_comm": (
        _OFF,
        "its schedule plan bypasses the model's forward",
        False,
    ),
    "overlap_dispatch_backward_with_experts_wgrad": (_OFF, _NOT_PROVEN, False),
    "delay_wgrad_compute": (_OFF, "no schedule of packed rows computes the delayed part", False),
    "defer_embedding_wgrad_compute": (
        _OFF,
        "logprobs are computed from predictor rows, not by the output layer",
        False,
    ),
    "gtp_weight_remat_size": ((1,), _WEIGHTS, False),
    "expert_gtp_weight_remat_size": ((1,), _WEIGHTS, False),
    "moe_router_load_balancing_type": (
        _BALANCE,
        "it is none of 'none', 'aux_loss', 'seq_aux_loss', or, as sinkhorn and quantile balancing, "
        "chooses the experts of a token by all tokens of its row",
        False,
    ),
    "moe_expert_capacity_factor": (
        _NONE,
        "capacity counts a shared token once instead of once per sample",
        True,
    ),
    "moe_expert_rank_capacity_factor": (
        _NONE,
        "capacity counts a shared token once instead of once per sample",
        False,
    ),
    "moe_pad_expert_input_to_capacity": (_OFF, "it belongs to a capacity", False),
    "moe_token_dropping": (_OFF, "it belongs to a capacity", False),
    "moe_paged_stash": (_OFF, _NOT_PROVEN, False),
    "moe_router_padding_for_quantization": (_OFF, _NOT_PROVEN, False),
    "moe_router_padding_for_fp8": (_OFF, _NOT_PROVEN, False),
    "moe_input_jitter_eps": (
        _ZERO,
        "a shared token would get one jitter where written-out samples get one each",
        False,
    ),
    "moe_router_force_load_balancing": (
        _OFF,
        "random routes differ between packed and written-out rows",
        False,
    ),
    "moe_router_force_biased": (
        _NONE,
        "random routes differ between packed and written-out rows",
        False,
    ),
    "moe_enable_routing_replay": (
        _OFF,
        "it replays routes in the order of calls; pass routed_experts to PrefixGroupedSeqParams",
        False,
    ),
    "moe_router_topk_limited_devices": (_NONE, "its routes depend on the ranks", True),
    "moe_latent_size": (_NONE, _NOT_PROVEN, True),
    "moe_single_grouped_weight": (_OFF, _WEIGHTS, False),
    "moe_single_grouped_bias": (_OFF, _WEIGHTS, False),
    "moe_mlp_glu_interleave_size": (_NONE, _WEIGHTS, True),
    "moe_shared_expert_glu_interleave_size": (_NONE, _WEIGHTS, True),
    "moe_extended_tp": (_OFF, "Megatron-Core has given it up", False),
}
