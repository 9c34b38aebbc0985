"""Every setting that prefix grouping cannot honour, reported at once."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.transformer_config import TransformerConfig


def validate_config(config: TransformerConfig) -> None:
    """Refuse a configuration under which packed groups would differ from written-out samples.

    Called by every wrapped layer when the model is built, before any work is done.

    Raises:
        ValueError: listing every unsupported setting, its value and the remedy.
    """
    problems = list(_problems(config))
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"{len(problems)} setting(s) are not supported with prefix-grouped attention:\n{listed}"
        )


# setting -> (values that are fine, why, remedy)
_REQUIRED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "attention_dropout": (
        (0, 0.0),
        "a shared prefix would get one mask where written-out samples get one each",
        "set attention_dropout=0",
    ),
    "hidden_dropout": (
        (0, 0.0),
        "a shared prefix would get one mask where written-out samples get one each",
        "set hidden_dropout=0",
    ),
    "context_parallel_size": (
        (1,),
        "packed rows are not split over context-parallel ranks",
        "set context_parallel_size=1; use tensor parallelism with sequence_parallel instead",
    ),
    "multi_latent_attention": (
        (False, None),
        "latent attention has its own core attention",
        "set multi_latent_attention=False (ordinary or grouped-query attention)",
    ),
    "experimental_attention_variant": (
        (None,),
        "linear and sparse attention carry state across the row",
        "set experimental_attention_variant=None",
    ),
    "mrope_section": (
        (None,),
        "positions of a packed row are one number per token",
        "set mrope_section=None and position_embedding_type='rope'",
    ),
    "window_size": (
        (None,),
        "sliding windows are not expressed in the attention plan",
        "set window_size=None",
    ),
    "softmax_type": (
        ("vanilla", None),
        "attention sinks and softmax-off-by-one change the merge of passes",
        "set softmax_type='vanilla'",
    ),
    "attn_logit_softcapping": (
        (None, 0, 0.0),
        "softcap is not applied by the kernels in use",
        "set attn_logit_softcapping=None",
    ),
    "qk_clip": (
        (False, None),
        "no maximum attention logit is collected",
        "set qk_clip=False",
    ),
    "log_max_attention_logit": (
        (False, None),
        "no maximum attention logit is collected",
        "set log_max_attention_logit=False",
    ),
    "fp8": (
        (None, False),
        "scaling factors of a packed row differ from those of written-out rows",
        "set fp8=None (bf16)",
    ),
    "fp4": (
        (None, False),
        "scaling factors of a packed row differ from those of written-out rows",
        "set fp4=None (bf16)",
    ),
    "mtp_num_layers": (
        (None, 0),
        "multi-token prediction rolls labels across samples of a row",
        "set mtp_num_layers=None",
    ),
    "flash_decode": ((False, None), "it is an inference path", "set flash_decode=False"),
    "fused_single_qkv_rope": (
        (False, None),
        "Megatron-Core does not fuse it with packed sequences",
        "set fused_single_qkv_rope=False",
    ),
    "enable_cuda_graph": (
        (False, None),
        "every microbatch has its own layout",
        "set enable_cuda_graph=False",
    ),
    "external_cuda_graph": (
        (False, None),
        "every microbatch has its own layout",
        "set external_cuda_graph=False",
    ),
    "cuda_graph_impl": (
        ("none", None),
        "every microbatch has its own layout",
        "set cuda_graph_impl='none'",
    ),
    "fine_grained_activation_offloading": (
        (False, None),
        "it has not been proven exact with packed rows",
        "set fine_grained_activation_offloading=False",
    ),
    "overlap_moe_expert_parallel_comm": (
        (False, None),
        "its schedule plan bypasses the model's forward",
        "set overlap_moe_expert_parallel_comm=False",
    ),
    "defer_embedding_wgrad_compute": (
        (False, None),
        "logprobs are computed from predictor rows, not by the output layer",
        "set defer_embedding_wgrad_compute=False",
    ),
    "use_mup": (
        (False, None),
        "its logit and attention multipliers are not applied",
        "set use_mup=False",
    ),
    "moe_z_loss_coeff": (
        (None, 0, 0.0),
        "router statistics count a shared token once instead of once per sample",
        "set moe_z_loss_coeff=None",
    ),
    "moe_router_enable_expert_bias": (
        (False, None),
        "router statistics count a shared token once instead of once per sample",
        "set moe_router_enable_expert_bias=False",
    ),
    "moe_expert_capacity_factor": (
        (None,),
        "capacity counts a shared token once instead of once per sample",
        "set moe_expert_capacity_factor=None (dropless)",
    ),
    "moe_input_jitter_eps": (
        (None, 0, 0.0),
        "a shared token would get one jitter where written-out samples get one each",
        "set moe_input_jitter_eps=None",
    ),
    "moe_router_force_load_balancing": (
        (False, None),
        "random routes differ between packed and written-out rows",
        "set moe_router_force_load_balancing=False",
    ),
}


def _problems(config: TransformerConfig) -> Iterator[str]:
    for name, (allowed, reason, remedy) in _REQUIRED.items():
        # A setting that this version of Megatron-Core does not have cannot be on.
        value = getattr(config, name, None)
        if value is not None and value not in allowed:
            yield f"{name}={value!r}: {reason}; {remedy}"
    yield from _moe_problems(config)
    yield from _parallel_problems(config)


def _moe_problems(config: TransformerConfig) -> Iterator[str]:
    if config.num_moe_experts is None:
        return
    coefficients = config.moe_aux_loss_coeff
    if not isinstance(coefficients, list | tuple):
        coefficients = [coefficients]
    if any(coefficients):
        yield (
            f"moe_aux_loss_coeff={config.moe_aux_loss_coeff!r}: router statistics count a shared "
            "token once instead of once per sample; set moe_aux_loss_coeff=0"
        )
    balancing = config.moe_router_load_balancing_type
    if "sinkhorn" in (balancing if isinstance(balancing, list | tuple) else [balancing]):
        yield (
            f"moe_router_load_balancing_type={balancing!r}: sinkhorn routes depend on the whole "
            "row; set moe_router_load_balancing_type='none'"
        )


def _parallel_problems(config: TransformerConfig) -> Iterator[str]:
    tp_size, heads = config.tensor_model_parallel_size, config.num_attention_heads
    groups = config.num_query_groups or heads
    if heads % tp_size:
        yield (
            f"num_attention_heads={heads} is no multiple of tensor_model_parallel_size={tp_size}; "
            "choose a tensor_model_parallel_size that divides it"
        )
    if groups % tp_size and tp_size % groups:
        yield (
            f"num_query_groups={groups} neither divides nor is a multiple of "
            f"tensor_model_parallel_size={tp_size}; choose a tensor_model_parallel_size that fits"
        )
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        yield (
            "variable_seq_lengths=False with pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size}: packed rows differ in length between "
            "microbatches; set variable_seq_lengths=True"
        )
