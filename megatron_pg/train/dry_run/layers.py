"""What tokens keep in the layers of a model, of every kind that it has."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from ...data import (
    AttentionSizes,
    ExpertSizes,
    LayerKind,
    LayerSizes,
    LinearSizes,
    MemoryModel,
    ModuleKinds,
    RankShare,
)
from ...parallel import ParallelSizes, kv_head_copies
from ..model import ModelPlan


def layer_memory(plan: ModelPlan, kind: LayerKind) -> MemoryModel:
    """Of a token in a layer of this kind, with the recompute that a run asks for."""
    config = plan.config
    recompute = set(config.recompute_modules or ()) if config.recompute_granularity else set()
    if config.recompute_granularity == "full":
        recompute = {"full"}
    share = rank_share(config)
    return MemoryModel.of_layer(layer_sizes(plan, kind), share, recompute)


def layer_sizes(plan: ModelPlan, kind: LayerKind) -> LayerSizes:
    """Widths of a layer of this kind, and what its modules are."""
    c = plan.config
    experts, width = None, c.ffn_hidden_size if kind.mlp == "dense" else 0
    if kind.has_experts:
        width = c.moe_shared_expert_intermediate_size or 0
        experts = ExpertSizes(
            number=c.num_moe_experts,
            topk=c.moe_router_topk,
            ffn_hidden_size=c.moe_ffn_hidden_size or c.ffn_hidden_size,
        )
    return LayerSizes(
        hidden_size=c.hidden_size,
        mixer=mixer_sizes(c, kind),
        ffn_hidden_size=width,
        gated_linear_unit=c.gated_linear_unit,
        value_bytes=c.params_dtype.itemsize,
        experts=experts,
        has_qk_norms=c.qk_layernorm or getattr(c, "has_norms_over_heads", False),
        has_rotary=plan.gpt["position_embedding_type"] in ("rope", "yarn", "mrope"),
        has_norms_before=getattr(c, "has_pre_layernorms", True),
        has_norms_behind=getattr(c, "has_post_layernorms", False),
        modules=ModuleKinds(
            # On CPUs PyTorch puts the norm without mean together of several operations.
            has_fused_norms=plan.on_cuda or c.normalization != "RMSNorm",
            has_fused_activation=c.bias_activation_fusion,
            gathers_latents=not plan.use_te,
            has_fused_recurrence=plan.on_cuda,
        ),
    )


def mixer_sizes(config: TransformerConfig, kind: LayerKind) -> AttentionSizes | LinearSizes | None:
    """Heads of a layer of this kind."""
    if kind.mixer is None:
        return None
    if kind.mixer == "attention":
        return AttentionSizes.from_config(config)
    return LinearSizes.from_config(config, kind.mixer)


def rank_share(config: TransformerConfig) -> RankShare:
    """Of every rank in a layer of its stage."""
    sizes, attention = ParallelSizes.from_config(config), AttentionSizes.from_config(config)
    heads = attention.num_heads // sizes.tp
    kv_heads = max(attention.num_kv_heads // sizes.tp, 1)
    return RankShare(
        tp_size=sizes.tp,
        sequence_parallel=sizes.sp,
        cp_size=sizes.cp,
        kv_head_copies=kv_head_copies(heads, kv_heads, sizes.cp),
        expert_tp_size=sizes.expert_tp,
    )
