"""The parallel layouts and models that must be exact."""

from typing import Any

import torch
from megatron.core.activations import squared_relu

from megatron_pg.mcore.versions import (
    DIVIDES_GATES,
    DIVIDES_LINEAR_ATTENTION,
    HAS_HYBRID_MODEL,
    RECOMPUTES_GATED_NORM,
)
from tests.mcore.harness import Case
from tests.mcore.router_steps import RouterCase

FULL_RECOMPUTE = dict(
    recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
)
BLOCK_RECOMPUTE = dict(
    recompute_granularity="full", recompute_method="block", recompute_num_layers=1
)
SELECTIVE_RECOMPUTE = dict(recompute_granularity="selective")
MODULES_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])
# Activations that have been sent on.
FREED = dict(deallocate_pipeline_outputs=True)

MOE: dict[str, Any] = dict(
    config=dict(
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp64",
    ),
    spec=dict(num_experts=4, moe_grouped_gemm=False),
    # Megatron's router takes its softmax in fp32 whatever the model's dtype.
    bound=1e-6,
)
# Core refuses it for rows of several lengths.
ALLGATHER = dict(moe_token_dispatcher_type="allgather", variable_seq_lengths=False)


def moe(spec: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """``MOE`` with further settings."""
    return MOE | dict(config=MOE["config"] | config, spec=MOE["spec"] | (spec or {}))


def latent(spec: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """Latent attention: queries and keys of 12, of which 4 are positions; values of 8."""
    sizes = dict(kv_lora_rank=12, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8)
    return dict(
        config=dict(multi_latent_attention=True, transformer_impl="local", **sizes) | config,
        spec=dict(multi_latent_attention=True) | (spec or {}),
    )


LATENT_ROPE = dict(q_lora_rank=None, rope_type="rope", rotary_base=500.0)
LATENT_YARN = dict(
    q_lora_rank=16,
    qk_layernorm=True,
    rope_type="yarn",
    rotary_scaling_factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=1.5,
    mscale_all_dim=0.5,
)
LATENT = latent(dict(qk_layernorm=True), **LATENT_YARN)
LATENT_PLAIN = latent(**LATENT_ROPE)


def recomputed(model: dict[str, Any], **config: Any) -> dict[str, Any]:
    return model | dict(config=model["config"] | config)


UP_AND_CORE = dict(
    recompute_granularity="selective", recompute_modules=["mla_up_proj", "core_attn"]
)


def gated(**settings: Any) -> dict[str, Any]:
    """Attention with an output gate, norms around one, and positions in a quarter of a head."""
    config = dict(
        attention_output_gate=True,
        qk_layernorm=True,
        layernorm_zero_centered_gamma=True,
        kv_channels=16,
        **settings,
    )
    # Megatron computes the gate in fp32 whatever the model's dtype.
    return dict(
        config=config, spec=dict(qk_layernorm=True), model=dict(rotary_percent=0.25), bound=1e-6
    )


def window(size: int, **config: Any) -> dict[str, Any]:
    """Layers whose queries see ``size`` keys before themselves, with further settings."""
    return dict(config=dict(window_size=(size, 0)) | config)


# Of linear attention: two value heads of every key head.
DELTA_NET = dict(
    linear_conv_kernel_dim=3,
    linear_key_head_dim=6,
    linear_value_head_dim=5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
# A layer of softmax attention at the end.
LINEAR: dict[str, Any] = dict(
    config=dict(
        experimental_attention_variant="gated_delta_net", linear_attention_freq=2, **DELTA_NET
    )
)


EQUIVALENCE = {
    # One rank: models.
    "plain": Case(),
    "logits": Case(predictions=False),
    "tied": Case(tied=True),
    "mqa": Case(num_query_groups=1),
    "mha": Case(num_query_groups=4),
    "qk_layernorm": Case(config=dict(qk_layernorm=True), spec=dict(qk_layernorm=True)),
    "layernorm_bias": Case(
        config=dict(normalization="LayerNorm", add_bias_linear=True, gated_linear_unit=False)
    ),
    "softmax_scale": Case(config=dict(softmax_scale=0.7)),
    "block_order": Case(
        config=dict(
            kv_channels=12,
            layernorm_epsilon=1e-2,
            add_qkv_bias=True,
            glu_linear_offset=0.5,
            activation_func_clamp_value=1.0,
            apply_residual_connection_post_layernorm=True,
            apply_query_key_layer_scaling=True,
        )
    ),
    # Megatron computes these two in fp32 whatever the model's dtype.
    "qk_l2_norm": Case(config=dict(qk_l2_norm=True), spec=dict(qk_l2_norm=True), bound=1e-6),
    "output_gate": Case(**gated()),
    "output_gate_mqa_selective": Case(num_query_groups=1, **gated(**SELECTIVE_RECOMPUTE)),
    "no_rope": Case(config=dict(no_rope_freq=[0, 1])),
    "learned_absolute": Case(position_embedding_type="learned_absolute"),
    "no_positions": Case(position_embedding_type="none"),
    "rotary_percent": Case(model=dict(rotary_percent=0.5)),
    "rotary_interleaved": Case(config=dict(rotary_interleaved=True)),
    "rope_scaling": Case(model=dict(rope_scaling=True, rope_scaling_factor=4.0)),
    "rope_interpolation": Case(model=dict(seq_len_interpolation_factor=2.0)),
    "yarn": Case(position_embedding_type="yarn"),
    "moe": Case(**MOE),
    "moe_sigmoid": Case(
        **moe(
            moe_router_score_function="sigmoid",
            moe_router_num_groups=2,
            moe_router_group_topk=1,
            moe_router_topk_scaling_factor=2.5,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=16,
        ),
        loss_bound=1e-7,
    ),
    "moe_overlap": Case(
        **moe(moe_shared_expert_intermediate_size=16, moe_shared_expert_overlap=True),
    ),
    "moe_pre_softmax": Case(
        **moe(
            moe_router_pre_softmax=True,
            moe_router_topk=1,
            moe_apply_probs_on_input=True,
            moe_shared_expert_intermediate_size=16,
            moe_shared_expert_gate=True,
        )
    ),
    "moe_mixed": Case(**moe(moe_layer_freq=[0, 1])),
    "moe_modules": Case(
        **moe(recompute_granularity="selective", recompute_modules=["core_attn", "moe"])
    ),
    "latent": Case(**LATENT),
    "latent_rope": Case(**LATENT_PLAIN),
    "latent_partial": Case(**latent(**LATENT_ROPE, rotary_percent=0.5)),
    "latent_up_core": Case(**recomputed(LATENT, **UP_AND_CORE)),
    "selective": Case(config=SELECTIVE_RECOMPUTE),
    "modules": Case(config=MODULES_RECOMPUTE),
    "full": Case(config=FULL_RECOMPUTE),
    "block": Case(config=BLOCK_RECOMPUTE, num_layers=3),
    # Prompts of 9 to 19 tokens and a fork after 5, responses of 1 to 7.
    "window": Case(**window(3, window_attn_skip_freq=None)),
    "window_none": Case(**window(0, softmax_type="learnable")),
    "window_wide": Case(**window(12, softmax_type="off-by-one")),
    "window_freq": Case(**window(2, window_attn_skip_freq=2), num_layers=3),
    "window_selective": Case(
        **window(4, softmax_type="learnable", window_attn_skip_freq=[1, 0], **SELECTIVE_RECOMPUTE),
        backend="cpu",
    ),
    "window_latent": Case(
        **recomputed(
            LATENT, **window(3, softmax_type="learnable", window_attn_skip_freq=2)["config"]
        )
    ),
    "linear": Case(**LINEAR),
    "linear_alone": Case(**recomputed(LINEAR, linear_attention_freq=[1, 1])),
    "linear_full": Case(**recomputed(LINEAR, **FULL_RECOMPUTE)),
    # Two ranks.
    "linear_tp2_sp": Case(tp=2, sp=True, **LINEAR),
    "linear_pp2": Case(pp=2, **LINEAR),
    "linear_pp2_vpp2": Case(pp=2, vpp=2, num_layers=4, **LINEAR),
    "linear_tp2_sp_pp2_vpp2": Case(tp=2, sp=True, pp=2, vpp=2, num_layers=4, **LINEAR),
    "tp2": Case(tp=2),
    "tp2_sp": Case(tp=2, sp=True),
    "tp2_sp_logits": Case(tp=2, sp=True, predictions=False),
    "tp2_sp_tied": Case(tp=2, sp=True, tied=True),
    "tp2_sp_qk": Case(tp=2, sp=True, config=dict(qk_layernorm=True), spec=dict(qk_layernorm=True)),
    "tp2_sp_full": Case(tp=2, sp=True, config=FULL_RECOMPUTE),
    "tp2_sp_selective": Case(tp=2, sp=True, config=SELECTIVE_RECOMPUTE),
    "tp2_mqa": Case(tp=2, num_query_groups=1),
    "tp2_sp_output_gate": Case(tp=2, sp=True, **gated(**FULL_RECOMPUTE)),
    # One head on every rank.
    "latent_tp2": Case(tp=2, **latent(**LATENT_ROPE, num_attention_heads=2)),
    "latent_tp2_sp": Case(tp=2, sp=True, **LATENT),
    "latent_tp2_sp_up": Case(tp=2, sp=True, **recomputed(LATENT, **UP_AND_CORE)),
    "latent_pp2": Case(pp=2, **LATENT_PLAIN),
    "latent_pp2_vpp2_window": Case(
        pp=2,
        vpp=2,
        num_layers=4,
        **recomputed(
            LATENT,
            **window(3, softmax_type="learnable", window_attn_skip_freq=[1, 0, 0, 1])["config"],
            **UP_AND_CORE,
        ),
    ),
    "moe_tp2_sp": Case(tp=2, sp=True, **MOE),
    "moe_tp2_sp_etp1": Case(tp=2, sp=True, ep=2, etp=1, **MOE),
    "moe_ep2": Case(dp=2, ep=2, **MOE),
    "pp2": Case(pp=2),
    "pp2_first": Case(pp=2, num_layers=3, config=dict(num_layers_in_first_pipeline_stage=1)),
    "pp2_last": Case(pp=2, num_layers=3, config=dict(num_layers_in_last_pipeline_stage=1)),
    "pp2_layout": Case(pp=2, num_layers=3, config=dict(pipeline_model_parallel_layout="Et|ttL")),
    "pp2_loss_alone": Case(pp=2, config=dict(pipeline_model_parallel_layout="Ett|L")),
    "pp2_tied": Case(pp=2, tied=True),
    "pp2_full": Case(pp=2, config=FULL_RECOMPUTE),
    "pp2_vpp2": Case(pp=2, vpp=2, num_layers=4),
    "pp2_vpp2_full": Case(pp=2, vpp=2, num_layers=4, config=FULL_RECOMPUTE),
    "dp2": Case(dp=2),
    "tp2_sp_window": Case(tp=2, sp=True, **window(4, softmax_type="learnable", **FULL_RECOMPUTE)),
    # By local numbers every chunk would be alike.
    "pp2_vpp2_window": Case(
        pp=2, vpp=2, num_layers=4, **window(3, window_attn_skip_freq=[1, 0, 0, 1])
    ),
    # Context parallelism: key heads for every rank, one for two ranks, one for all.
    "cp2": Case(cp=2),
    "cp2_mqa": Case(cp=2, num_query_groups=1),
    "cp2_mha_tied": Case(cp=2, num_query_groups=4, tied=True),
    "cp2_qk": Case(cp=2, config=dict(qk_layernorm=True), spec=dict(qk_layernorm=True)),
    "cp2_output_gate": Case(cp=2, **gated()),
    "cp2_yarn": Case(cp=2, position_embedding_type="yarn"),
    "cp2_learned": Case(cp=2, position_embedding_type="learned_absolute"),
    "cp2_full": Case(cp=2, config=FULL_RECOMPUTE),
    "cp2_selective": Case(cp=2, config=SELECTIVE_RECOMPUTE),
    "cp2_window": Case(cp=2, **window(4, softmax_type="learnable", window_attn_skip_freq=[1, 0])),
    "cp2_latent": Case(cp=2, **LATENT),
    "cp2_latent_up": Case(cp=2, **recomputed(LATENT_PLAIN, **UP_AND_CORE)),
    "cp2_moe_ep2": Case(cp=2, ep=2, **MOE),
    # Four ranks.
    "cp4": Case(cp=4),
    "cp4_mqa": Case(cp=4, num_query_groups=1),
    "cp2_tp2": Case(cp=2, tp=2),
    "cp2_tp2_sp": Case(cp=2, tp=2, sp=True),
    "cp2_tp2_sp_latent": Case(cp=2, tp=2, sp=True, **LATENT),
    "cp2_tp2_sp_moe": Case(cp=2, tp=2, sp=True, ep=2, etp=1, **MOE),
    "cp2_pp2": Case(cp=2, pp=2),
    "cp2_pp2_first": Case(
        cp=2, pp=2, num_layers=3, config=dict(num_layers_in_first_pipeline_stage=1)
    ),
    "cp2_pp2_vpp2": Case(cp=2, pp=2, vpp=2, num_layers=4),
    "cp2_dp2": Case(cp=2, dp=2),
    # A head on every rank, and experts over all ranks that see tokens.
    "cp4_mha_selective": Case(cp=4, num_query_groups=4, config=SELECTIVE_RECOMPUTE),
    "cp2_dp2_moe_ep4": Case(cp=2, dp=2, ep=4, **MOE),
    # Eight ranks.
    "cp2_tp2_sp_pp2_vpp2": Case(cp=2, tp=2, sp=True, pp=2, vpp=2, num_layers=4),
    "cp4_pp2": Case(cp=4, pp=2),
    "cp4_tp2_sp": Case(cp=4, tp=2, sp=True, config=dict(num_attention_heads=8, kv_channels=8)),
    "cp2_pp2_dp2": Case(cp=2, pp=2, dp=2),
    "tp4": Case(tp=4, num_query_groups=4),
    "tp4_sp": Case(tp=4, sp=True, num_query_groups=2),
    "pp4": Case(pp=4, num_layers=4),
    # Stages of 1, 2, 2 and 1 layers.
    "pp4_counted": Case(
        pp=4,
        num_layers=6,
        config=dict(
            account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
        ),
    ),
    "pp4_vpp2": Case(pp=4, vpp=2, num_layers=8),
    "tp2_sp_pp2": Case(tp=2, sp=True, pp=2),
    "tp2_sp_pp2_tied_full": Case(tp=2, sp=True, pp=2, tied=True, config=FULL_RECOMPUTE),
    "tp2_sp_pp2_vpp2": Case(tp=2, sp=True, pp=2, vpp=2, num_layers=4),
    "tp2_sp_dp2": Case(tp=2, sp=True, dp=2),
    "pp2_dp2": Case(pp=2, dp=2),
    "pp2_vpp2_dp2": Case(pp=2, vpp=2, dp=2, num_layers=4),
}

GATED_NORM = dict(
    recompute_granularity="selective", recompute_modules=["core_attn", "gdn_norm_out"]
)
# Cases that not every Megatron-Core can run, and whether the installed one can.
NEWER = {
    "tp2_output_gate_mqa": (DIVIDES_GATES, Case(tp=2, num_query_groups=1, **gated())),
    "linear_cp2": (DIVIDES_LINEAR_ATTENTION, Case(cp=2, **LINEAR)),
    "linear_cp2_tp2_sp": (
        DIVIDES_LINEAR_ATTENTION,
        Case(
            cp=2,
            tp=2,
            sp=True,
            **recomputed(LINEAR, linear_num_key_heads=4, linear_num_value_heads=8),
        ),
    ),
    "linear_selective": (RECOMPUTES_GATED_NORM, Case(**recomputed(LINEAR, **GATED_NORM))),
}
EQUIVALENCE |= {name: case for name, (is_known, case) in NEWER.items() if is_known}

# Optimizer steps, in fp32 because Megatron's clipping takes nothing else.
TRAINING = {
    "tp2_sp": Case(tp=2, sp=True, dtype=torch.float32, bound=1e-4),
    "pp2": Case(pp=2, dtype=torch.float32, bound=1e-4),
    "pp2_tied_full": Case(pp=2, tied=True, dtype=torch.float32, config=FULL_RECOMPUTE, bound=1e-4),
    "dp2_distributed": Case(dp=2, dtype=torch.float32, distributed_optimizer=True, bound=1e-4),
    "cp2_distributed": Case(cp=2, dtype=torch.float32, distributed_optimizer=True, bound=1e-4),
    "linear_dp2_distributed": Case(
        dp=2, dtype=torch.float32, distributed_optimizer=True, num_steps=3, bound=1e-4, **LINEAR
    ),
}

# Resident prefixes, each in both modes.
SCHEDULE = {
    "plain": Case(),
    "output_gate": Case(**gated()),
    "tied": Case(tied=True),
    "selective": Case(config=SELECTIVE_RECOMPUTE),
    "full": Case(config=FULL_RECOMPUTE),
    "averaged": Case(config=dict(calculate_per_token_loss=False)),
    "moe": Case(**MOE),
    "latent": Case(**LATENT),
    "latent_full": Case(**recomputed(LATENT_PLAIN, **FULL_RECOMPUTE)),
    "latent_up_core": Case(**recomputed(LATENT, **UP_AND_CORE)),
    "latent_tp2": Case(tp=2, **LATENT),
    "latent_tp2_sp": Case(tp=2, sp=True, **LATENT),
    # Latents are kept of whole prompts, whatever a window shows of them.
    "latent_window": Case(
        backend="reference",
        **latent(**LATENT_ROPE, window_size=(4, 0), softmax_type="learnable"),
    ),
    "latent_frozen_latents": Case(
        **LATENT_PLAIN,
        trains=lambda stage, chunk, name: "kv_up_proj" in name or "output_layer" in name,
    ),
    "latent_pp2": Case(pp=2, **LATENT_PLAIN),
    "linear": Case(**LINEAR),
    "linear_full": Case(**recomputed(LINEAR, **FULL_RECOMPUTE)),
    "linear_frozen_projections": Case(
        **LINEAR, trains=lambda stage, chunk, name: "A_log" in name or "output_layer" in name
    ),
    "linear_tp2_sp": Case(tp=2, sp=True, **LINEAR),
    "linear_pp2": Case(pp=2, **LINEAR),
    "linear_tp2_sp_pp2_vpp2_full": Case(
        tp=2, sp=True, pp=2, vpp=2, num_layers=4, **recomputed(LINEAR, **FULL_RECOMPUTE)
    ),
    # Prefixes of 6 to 11 tokens, of which layers with a window keep the last.
    "window": Case(
        **window(4, softmax_type="learnable", window_attn_skip_freq=[1, 0], **SELECTIVE_RECOMPUTE)
    ),
    "window_none": Case(**window(0, softmax_type="learnable")),
    "window_wide": Case(**window(8, softmax_type="off-by-one", **FULL_RECOMPUTE)),
    "window_latent": Case(**recomputed(LATENT_PLAIN, **window(4)["config"])),
    "tp2_sp": Case(tp=2, sp=True),
    "pp2": Case(pp=2),
    "pp2_tied": Case(pp=2, tied=True),
    "pp2_full_freed": Case(pp=2, config=FULL_RECOMPUTE | FREED),
    "pp2_window": Case(pp=2, **window(3, softmax_type="learnable", window_attn_skip_freq=2)),
    "pp2_vpp2": Case(pp=2, vpp=2, num_layers=4),
    "pp2_vpp2_ends_tied": Case(
        pp=2, vpp=2, tied=True, config=dict(pipeline_model_parallel_layout="E|t|t|L")
    ),
    "dp2": Case(dp=2),
    "moe_ep2": Case(dp=2, ep=2, **MOE),
    "pp4": Case(pp=4, num_layers=4),
    "pp4_vpp2": Case(pp=4, vpp=2, num_layers=8),
    "tp2_sp_pp2": Case(tp=2, sp=True, pp=2),
    "tp2_sp_pp2_vpp2_full": Case(tp=2, sp=True, pp=2, vpp=2, num_layers=4, config=FULL_RECOMPUTE),
    "tp2_sp_dp2": Case(tp=2, sp=True, dp=2),
    "pp2_dp2": Case(pp=2, dp=2),
    "pp2_vpp2_dp2": Case(pp=2, vpp=2, dp=2, num_layers=4),
    "tp2_sp_pp2_dp2": Case(tp=2, sp=True, pp=2, dp=2),
    "cp2": Case(cp=2),
    "cp2_mqa_full": Case(cp=2, num_query_groups=1, config=FULL_RECOMPUTE),
    "cp2_window": Case(cp=2, **window(4, softmax_type="learnable", window_attn_skip_freq=[1, 0])),
    "cp2_latent": Case(cp=2, **LATENT),
    "cp2_latent_full": Case(cp=2, **recomputed(LATENT_PLAIN, **FULL_RECOMPUTE)),
    "cp2_moe_ep2": Case(cp=2, ep=2, **MOE),
    "cp2_tp2_sp": Case(cp=2, tp=2, sp=True),
    "cp2_tp2_sp_latent": Case(cp=2, tp=2, sp=True, **LATENT),
    "cp2_pp2": Case(cp=2, pp=2),
    "cp2_pp2_vpp2": Case(cp=2, pp=2, vpp=2, num_layers=4),
    "cp2_dp2_selective": Case(cp=2, dp=2, config=SELECTIVE_RECOMPUTE),
    "cp4": Case(cp=4),
    # Parameters that are not trained, as in adapter tuning.
    "frozen_all": Case(trains=lambda stage, chunk, name: False),
    "frozen_embedding": Case(trains=lambda stage, chunk, name: "embedding" not in name),
    "frozen_embedding_selective": Case(
        config=SELECTIVE_RECOMPUTE, trains=lambda stage, chunk, name: "embedding" not in name
    ),
    "frozen_all_but_embedding": Case(trains=lambda stage, chunk, name: "embedding" in name),
    "frozen_all_but_head": Case(trains=lambda stage, chunk, name: "output_layer" in name),
    "frozen_lower_layer": Case(
        trains=lambda stage, chunk, name: "embedding" not in name and "layers.0" not in name
    ),
    "frozen_lower_layer_full": Case(
        config=FULL_RECOMPUTE,
        trains=lambda stage, chunk, name: "embedding" in name or "layers.1" in name,
    ),
    "frozen_projections": Case(
        config=dict(qk_layernorm=True),
        spec=dict(qk_layernorm=True),
        trains=lambda stage, chunk, name: "k_layernorm" in name,
    ),
    "pp2_frozen_first": Case(pp=2, trains=lambda stage, chunk, name: stage == 1),
    "pp2_frozen_last": Case(pp=2, trains=lambda stage, chunk, name: stage == 0),
    "pp2_frozen_first_full": Case(
        pp=2, config=FULL_RECOMPUTE, trains=lambda stage, chunk, name: stage == 1
    ),
    "pp2_frozen_all": Case(pp=2, trains=lambda stage, chunk, name: False),
    "pp2_vpp2_frozen_first_chunk": Case(
        pp=2, vpp=2, num_layers=4, trains=lambda stage, chunk, name: (stage, chunk) != (0, 0)
    ),
    "pp2_vpp2_frozen_chunks": Case(
        pp=2, vpp=2, num_layers=4, trains=lambda stage, chunk, name: (stage, chunk) == (0, 1)
    ),
    "pp4_frozen_middle": Case(pp=4, num_layers=4, trains=lambda stage, chunk, name: stage == 1),
    "pp4_frozen_lower": Case(pp=4, num_layers=4, trains=lambda stage, chunk, name: stage > 1),
    "pp2_dp2_frozen_first": Case(pp=2, dp=2, trains=lambda stage, chunk, name: stage == 1),
}

if DIVIDES_LINEAR_ATTENTION:
    SCHEDULE["linear_cp2_pp2"] = Case(cp=2, pp=2, **LINEAR)


MAMBA = dict(mamba_head_dim=8, mamba_num_heads=4, mamba_num_groups=2, mamba_state_dim=6)


def linear_hybrid(pattern: str, **config: Any) -> dict[str, Any]:
    """A hybrid with layers that carry a state."""
    layers = pattern.replace("|", "")
    config = dict(is_hybrid_model=True) | MAMBA | DELTA_NET | config
    if "E" in layers:
        config["moe_layer_freq"] = [int(symbol == "E") for symbol in layers]
    return dict(pattern=pattern, num_layers=len(layers), config=config)


if HAS_HYBRID_MODEL:
    SCHEDULE["hybrid_tp2_sp_pp2"] = Case(tp=2, sp=True, pp=2, **linear_hybrid("G*|-M"))

# Layers of several kinds, by the pattern of a HybridModel.
HYBRID = {
    "learned_positions": Case(
        pattern="-*", position_embedding_type="learned_absolute", config=dict(is_hybrid_model=True)
    ),
    "moe_full": Case(
        pattern="*E-*",
        num_layers=4,
        bound=1e-6,
        config=MOE["config"] | FULL_RECOMPUTE | dict(moe_layer_freq=[0, 1, 0, 0]),
    ),
    "tp2_sp": Case(tp=2, sp=True, pattern="*-*-", num_layers=4, config=SELECTIVE_RECOMPUTE),
    "pp2_tied": Case(
        pp=2, pattern="*-|*", num_layers=3, tied=True, config=dict(is_hybrid_model=True)
    ),
    "pp2_vpp2": Case(
        pp=2, vpp=2, pattern="*|-|*-|*", num_layers=5, config=dict(is_hybrid_model=True)
    ),
    "cp2": Case(cp=2, pattern="*-*", num_layers=3),
    "gdn_tp2_sp": Case(tp=2, sp=True, **linear_hybrid("G-*-G")),
    "gdn_pp2": Case(pp=2, **linear_hybrid("G-|*G")),
    "mamba_full": Case(**linear_hybrid("M*-ME", **MOE["config"], **FULL_RECOMPUTE), bound=1e-6),
    "mamba_groups": Case(**linear_hybrid("MM", mamba_num_groups=4, mamba_state_dim=3)),
    "mamba_tp2_sp": Case(tp=2, sp=True, **linear_hybrid("M-*M")),
    "mamba_tp2": Case(tp=2, **linear_hybrid("M*")),
    "mamba_pp2_vpp2": Case(pp=2, vpp=2, **linear_hybrid("M|*|-|M")),
    "mamba_cp2": Case(cp=2, **linear_hybrid("M*M")),
    "mamba_cp4": Case(cp=4, **linear_hybrid("M*")),
}

if HAS_HYBRID_MODEL:
    SCHEDULE |= {
        "mamba_full": Case(**linear_hybrid("M*M", **FULL_RECOMPUTE)),
        # Nothing that the first layer scans has a gradient, but its decays.
        "mamba_frozen_projections": Case(
            **linear_hybrid("M*M"),
            trains=lambda stage, chunk, name: "A_log" in name or "output_layer" in name,
        ),
        "mamba_tp2_sp_pp2_vpp2_full": Case(
            tp=2, sp=True, pp=2, vpp=2, **linear_hybrid("M|*|-M|M", **FULL_RECOMPUTE)
        ),
        "mamba_tp4_sp": Case(
            tp=4, sp=True, num_query_groups=4, **linear_hybrid("M*M", mamba_num_groups=4)
        ),
        "mamba_cp2_pp2": Case(cp=2, pp=2, **linear_hybrid("M*|M-")),
        "mamba_pp2_vpp2_dp2": Case(pp=2, vpp=2, dp=2, **linear_hybrid("M|*|-M|M")),
    }


def router(*parts: dict[str, Any], **layout: Any) -> RouterCase:
    """A router with these statistics."""
    config: dict[str, Any] = dict(MOE["config"])
    for part in parts:
        config |= part
    return RouterCase(config=config, spec=MOE["spec"], **layout)


BIAS = dict(
    moe_router_enable_expert_bias=True,
    moe_router_score_function="sigmoid",
    moe_router_bias_update_rate=0.01,
)
AUX = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=3.0)
Z = dict(moe_z_loss_coeff=0.5)
SEQ = dict(
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=3.0,
    # Under it core 0.16 forgets the samples of a batch.
    calculate_per_token_loss=False,
)
BOTH = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"],
    moe_aux_loss_coeff=[3.0, 2.0],
    calculate_per_token_loss=False,
)
AVERAGED = dict(calculate_per_token_loss=False)
SHARED_EXPERTS = dict(moe_shared_expert_intermediate_size=16)
DEEPSEEK = dict(
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_topk_scaling_factor=2.5,
    moe_router_pre_softmax=True,
    **SHARED_EXPERTS,
)
MOE_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["moe"])
# Of experts in one module, the only ones for which Megatron has it.
ACT_RECOMPUTE = dict(
    moe_grouped_gemm=True, recompute_granularity="selective", recompute_modules=["moe_act"]
)


def hybrid_router(pattern: str, *parts: dict[str, Any], **layout: Any) -> RouterCase:
    """A router in some layers of a hybrid; the stock Mamba-2 layer takes a batch alone."""
    own = linear_hybrid(pattern, activation_func=squared_relu, gated_linear_unit=False)
    return router(own.pop("config"), *parts, **own, equal=True, **layout)


# Statistics, routes and placement of experts.
ROUTERS = {
    "bias": router(BIAS),
    "bias_constant": router(BIAS, dict(moe_router_bias_update_rate=0.0), DEEPSEEK),
    "aux": router(AUX),
    "aux_averaged": router(AUX, AVERAGED, DEEPSEEK),
    "z": router(Z),
    "seq": router(SEQ, equal=True),
    "both_mixed_layers": router(BOTH, dict(moe_layer_freq=[0, 1]), equal=True),
    "fp32_router": router(AUX, Z, dict(moe_router_dtype="fp32")),
    "pre_softmax_groups": router(
        AUX, Z, DEEPSEEK, dict(moe_router_dtype="fp32", moe_shared_expert_intermediate_size=None)
    ),
    "moe": router(AUX, Z, BIAS, MOE_RECOMPUTE),
    "moe_act": router(AUX, Z, BIAS, ACT_RECOMPUTE),
    "shared_experts": router(
        AUX,
        Z,
        SHARED_EXPERTS,
        dict(recompute_granularity="selective", recompute_modules=["shared_experts"]),
    ),
    "full": router(AUX, Z, BIAS, FULL_RECOMPUTE),
    "block": router(AUX, Z, BIAS, BLOCK_RECOMPUTE, num_layers=3),
    "replay": router(AUX, Z, replay=True),
    "replay_groups": router(
        *(AUX, Z, BIAS, DEEPSEEK, dict(moe_router_pre_softmax=False)), replay=True
    ),
    # Two ranks.
    "all_tp2_sp": router(AUX, Z, BIAS, tp=2, sp=True),
    "seq_z_tp2_sp": router(SEQ, Z, equal=True, tp=2, sp=True),
    "all_ep2": router(AUX, Z, BIAS, dp=2, ep=2),
    "all_cp2": router(AUX, Z, BIAS, cp=2),
    "seq_z_cp2": router(SEQ, Z, equal=True, cp=2),
    "averaged_cp2_ep2": router(AUX, AVERAGED, DEEPSEEK, cp=2, ep=2),
    "replay_cp2": router(AUX, Z, replay=True, cp=2),
    "all_cp2_tp2_sp": router(AUX, Z, BIAS, cp=2, tp=2, sp=True),
    "all_tp2_sp_ep2_etp1": router(AUX, Z, BIAS, tp=2, sp=True, ep=2, etp=1),
    "both_tp2_sp_ep2_etp1": router(
        BOTH, Z, BIAS, MOE_RECOMPUTE, equal=True, tp=2, sp=True, ep=2, etp=1
    ),
    "all_tp2_sp_ep2_etp1_allgather": router(
        *(AUX, Z, BIAS, ALLGATHER),
        tp=2,
        sp=True,
        ep=2,
        etp=1,
    ),
    "all_pp2_vpp2": router(AUX, Z, BIAS, MOE_RECOMPUTE, pp=2, vpp=2, num_layers=4),
    "seq_pp2_vpp2": router(SEQ, Z, BIAS, equal=True, pp=2, vpp=2, num_layers=4),
    # One stage has all the routers.
    "both_pp2_vpp2_bare": router(
        *(BOTH, Z, BIAS, dict(moe_layer_freq=[1, 0, 1, 0]), FULL_RECOMPUTE),
        equal=True,
        pp=2,
        vpp=2,
        num_layers=4,
    ),
    "replay_moe_act_tp2_sp_ep2_etp1": router(
        *(AUX, Z, BIAS, ACT_RECOMPUTE), replay=True, tp=2, sp=True, ep=2, etp=1
    ),
    "replay_tp2_sp": router(AUX, Z, BIAS, MOE_RECOMPUTE, replay=True, tp=2, sp=True),
    "replay_pp2_vpp2": router(
        *(AUX, Z, dict(moe_layer_freq=[0, 1, 1, 1]), FULL_RECOMPUTE),
        replay=True,
        pp=2,
        vpp=2,
        num_layers=4,
    ),
    # Four ranks.
    "all_tp2_sp_pp2_full": router(AUX, Z, BIAS, FULL_RECOMPUTE, tp=2, sp=True, pp=2),
    "all_tp2_sp_dp2_ep2_etp2": router(AUX, Z, BIAS, tp=2, sp=True, dp=2, ep=2, etp=2),
    "all_dp4_ep2_etp2": router(AUX, Z, BIAS, dp=4, ep=2, etp=2),
    "all_tp2_sp_pp2_ep2_etp1": router(
        AUX, Z, BIAS, MOE_RECOMPUTE, tp=2, sp=True, pp=2, ep=2, etp=1
    ),
    # Eight ranks.
    "replay_cp2_tp2_sp_dp2_ep4_etp1": router(
        AUX, Z, BIAS, replay=True, cp=2, tp=2, sp=True, dp=2, ep=4, etp=1
    ),
    # Of a HybridModel.
    "hybrid": hybrid_router("ME*E", AUX, Z, BIAS, DEEPSEEK),
    "hybrid_replay_full": hybrid_router("ME*E", AUX, Z, FULL_RECOMPUTE, replay=True),
    "hybrid_cp2": hybrid_router("ME*E", AUX, Z, BIAS, cp=2),
    "hybrid_tp2_sp_ep2_etp1": hybrid_router(
        "ME*E", AUX, Z, BIAS, MOE_RECOMPUTE, tp=2, sp=True, ep=2, etp=1
    ),
    "hybrid_seq_pp2": hybrid_router("ME|*E", SEQ, Z, pp=2),
    "hybrid_replay_pp2_vpp2": hybrid_router("E|M|*|E", AUX, Z, replay=True, pp=2, vpp=2),
}
