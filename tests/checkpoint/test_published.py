"""Configurations as they are published: read whole, and the model is transformers' of that size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from megatron_pg.checkpoint import parse_hf_config
from tests.hostile import refused

pytestmark = pytest.mark.megatron

_DEEPSEEK = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map=dict(AutoConfig="configuration_deepseek.DeepseekV3Config"),
    hidden_act="silu",
    initializer_range=0.02,
    kv_lora_rank=512,
    moe_layer_freq=1,
    norm_topk_prob=True,
    pretraining_tp=1,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    use_cache=True,
    v_head_dim=128,
)
_YARN = dict(
    type="yarn", original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0, beta_slow=1
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": _DEEPSEEK
    | dict(
        bos_token_id=0,
        eos_token_id=1,
        ep_size=1,
        first_k_dense_replace=3,
        hidden_size=7168,
        intermediate_size=18432,
        max_position_embeddings=163840,
        model_type="deepseek_v3",
        moe_intermediate_size=2048,
        n_group=8,
        n_routed_experts=256,
        n_shared_experts=1,
        num_attention_heads=128,
        num_experts_per_tok=8,
        num_hidden_layers=61,
        num_key_value_heads=128,
        num_nextn_predict_layers=1,
        q_lora_rank=1536,
        rms_norm_eps=1e-06,
        rope_scaling=_YARN | dict(factor=40, beta_fast=32),
        rope_theta=10000,
        routed_scaling_factor=2.5,
        topk_group=4,
        transformers_version="4.33.1",
        vocab_size=129280,
    ),
    "Kimi-K2": _DEEPSEEK
    | dict(
        aux_loss_alpha=0.001,
        bos_token_id=163584,
        eos_token_id=163585,
        first_k_dense_replace=1,
        hidden_size=7168,
        intermediate_size=18432,
        max_position_embeddings=131072,
        model_type="kimi_k2",
        moe_intermediate_size=2048,
        n_group=1,
        n_routed_experts=384,
        n_shared_experts=1,
        num_attention_heads=64,
        num_experts_per_tok=8,
        num_hidden_layers=61,
        num_key_value_heads=64,
        num_nextn_predict_layers=0,
        q_lora_rank=1536,
        rms_norm_eps=1e-06,
        rope_scaling=_YARN | dict(factor=32.0, beta_fast=1.0, beta_slow=1.0),
        rope_theta=50000.0,
        routed_scaling_factor=2.827,
        seq_aux=True,
        topk_group=1,
        vocab_size=163840,
    ),
    "Moonlight-16B-A3B": _DEEPSEEK
    | dict(
        aux_loss_alpha=0.001,
        first_k_dense_replace=1,
        hidden_size=2048,
        intermediate_size=11264,
        max_position_embeddings=8192,
        model_type="deepseek_v3",
        moe_intermediate_size=1408,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        num_nextn_predict_layers=0,
        q_lora_rank=None,
        rms_norm_eps=1e-05,
        rope_theta=50000.0,
        routed_scaling_factor=2.446,
        seq_aux=True,
        topk_group=1,
        vocab_size=163840,
    ),
    "GLM-4.5": dict(
        architectures=["Glm4MoeForCausalLM"],
        attention_bias=True,
        attention_dropout=0.0,
        pad_token_id=151329,
        eos_token_id=[151329, 151336, 151338],
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        partial_rotary_factor=0.5,
        initializer_range=0.02,
        intermediate_size=12288,
        max_position_embeddings=131072,
        model_type="glm4_moe",
        moe_intermediate_size=1536,
        norm_topk_prob=True,
        num_attention_heads=96,
        n_group=1,
        topk_group=1,
        n_routed_experts=160,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        num_hidden_layers=92,
        num_key_value_heads=8,
        num_nextn_predict_layers=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=1000000,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        use_qk_norm=True,
        vocab_size=151552,
    ),
    "GLM-4.7-Flash": dict(
        architectures=["Glm4MoeLiteForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        pad_token_id=154820,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=10240,
        max_position_embeddings=202752,
        model_type="glm4_moe_lite",
        moe_intermediate_size=1536,
        topk_method="noaux_tc",
        norm_topk_prob=True,
        num_attention_heads=20,
        n_group=1,
        topk_group=1,
        n_routed_experts=64,
        n_shared_experts=1,
        routed_scaling_factor=1.8,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        num_hidden_layers=47,
        num_key_value_heads=20,
        num_nextn_predict_layers=1,
        partial_rotary_factor=1.0,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=1000000,
        tie_word_embeddings=False,
        dtype="bfloat16",
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        vocab_size=154880,
    ),
    "MiniMax-M2": dict(
        architectures=["MiniMaxM2ForCausalLM"],
        attn_type_list=[1] * 62,
        head_dim=128,
        hidden_act="silu",
        hidden_size=3072,
        initializer_range=0.02,
        intermediate_size=1536,
        max_position_embeddings=196608,
        model_type="minimax_m2",
        num_attention_heads=48,
        num_experts_per_tok=8,
        num_hidden_layers=62,
        num_key_value_heads=8,
        num_local_experts=256,
        num_mtp_modules=3,
        layernorm_full_attention_beta=1.0,
        layernorm_linear_attention_beta=1.0,
        layernorm_mlp_beta=1.0,
        mlp_intermediate_size=8192,
        output_router_logits=False,
        qk_norm_type="per_layer",
        rms_norm_eps=1e-06,
        rope_theta=5000000,
        rotary_dim=64,
        router_aux_loss_coef=0.001,
        router_jitter_noise=0.0,
        scoring_func="sigmoid",
        shared_intermediate_size=0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_mtp=True,
        use_qk_norm=True,
        use_routing_bias=True,
        vocab_size=200064,
    ),
    "Mixtral-8x7B": dict(
        architectures=["MixtralForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mixtral",
        num_attention_heads=32,
        num_experts_per_tok=2,
        num_hidden_layers=32,
        num_key_value_heads=8,
        num_local_experts=8,
        output_router_logits=False,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        vocab_size=32000,
    ),
    "Qwen1.5-MoE-A2.7B": dict(
        architectures=["Qwen2MoeForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151643,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=5632,
        max_position_embeddings=8192,
        max_window_layers=21,
        model_type="qwen2_moe",
        num_attention_heads=16,
        num_hidden_layers=24,
        num_key_value_heads=16,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        use_sliding_window=False,
        vocab_size=151936,
        decoder_sparse_step=1,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts_per_tok=4,
        num_experts=60,
        norm_topk_prob=False,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    ),
}
# As released by version 4: head and embeddings are tied by the class alone.
PUBLISHED |= {
    "gemma-3-1b-it": dict(
        architectures=["Gemma3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=None,
        bos_token_id=2,
        cache_implementation="hybrid",
        eos_token_id=[1, 106],
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        initializer_range=0.02,
        intermediate_size=6912,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        num_attention_heads=4,
        num_hidden_layers=26,
        num_key_value_heads=1,
        pad_token_id=0,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
        torch_dtype="bfloat16",
        use_cache=True,
        vocab_size=262144,
    ),
    "SmolLM3-3B": dict(
        architectures=["SmolLM3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=128012,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=11008,
        layer_types=["full_attention"] * 36,
        max_position_embeddings=65536,
        max_window_layers=28,
        mlp_bias=False,
        model_type="smollm3",
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=4,
        pad_token_id=128004,
        pretraining_tp=2,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        torch_dtype="bfloat16",
        use_cache=False,
        use_sliding_window=False,
        vocab_size=128256,
    ),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
# Billions, as their cards say.
SIZES = {
    "DeepSeek-V3": 671,
    "Kimi-K2": 1026,
    "Moonlight-16B-A3B": 16,
    "GLM-4.5": 353,
    "GLM-4.7-Flash": 30,
    "MiniMax-M2": 229,
    "Mixtral-8x7B": 46.7,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "gemma-3-1b-it": 1.0,
    "SmolLM3-3B": 3.075,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration(name: str) -> None:
    content = PUBLISHED[name]
    ours = parse_hf_config(dict(content))
    shapes = ours.weight_table().hf_shapes()
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count / 1e9 == pytest.approx(SIZES[name], rel=0.01)
    architecture = content["architectures"][0].removesuffix("ForCausalLM")
    with torch.device("meta"):
        named = CONFIGS.get(architecture, f"{architecture}Config")
        config = getattr(transformers, named)(**content)
        theirs = getattr(transformers, f"{architecture}ForCausalLM")(config)
    biases = [x for key, x in theirs.named_buffers() if key.endswith("correction_bias")]
    assert count == sum(x.numel() for x in (*theirs.parameters(), *biases))
    # What this model says of itself is read as the same model.
    again = parse_hf_config(ours.config_json())
    assert again == ours


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2"])
def test_weights_in_blocks_of_fp8(name: str) -> None:
    blocks = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    with pytest.raises(NotImplementedError, match="dequantise the model first$"):
        parse_hf_config(PUBLISHED[name] | dict(quantization_config=blocks))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(rope_interleave=False), "rope_interleave=False (must be True)"),
        (dict(scoring_func="softmax"), "scoring_func='softmax'"),
        (dict(topk_method="greedy"), "topk_method='greedy'"),
        (dict(norm_topk_prob=False), "norm_topk_prob=False"),
        (dict(moe_layer_freq=2), "moe_layer_freq=2"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(head_dim=128), "head_dim=128 (must be 64)"),
        (dict(first_k_dense_replace=61), "experts in no layer"),
        (dict(num_experts_per_tok=1), "num_experts_per_tok=1"),
        (dict(topk_group=2), "topk_group=2 with num_experts_per_tok=8"),
        (dict(topk_group=9), "topk_group=9 of n_group=8"),
        (dict(n_group=3), "n_group=3"),
        (dict(n_shared_experts=-1), "n_shared_experts=-1"),
        (dict(num_key_value_heads=8), "num_key_value_heads=8 (must be 128)"),
        (dict(num_nextn_predict_layers=0.5), "num_nextn_predict_layers=0.5"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 (must be 1.0)"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope type 'linear'"),
        (dict(rope_scaling=_YARN | dict(factor=40, truncate=False)), "truncate=False"),
        (dict(index_topk=2048), "unknown key index_topk"),
    ],
)
def test_another_model(change: dict[str, Any], named: str) -> None:
    """What Megatron-Core would compute otherwise, and what is not known, by name."""
    with refused(named):
        parse_hf_config(PUBLISHED["DeepSeek-V3"] | change)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("GLM-4.5", dict(partial_rotary_factor=0.01), "rotates 1 of 128 channels"),
        ("MiniMax-M2", dict(rotary_dim=3), "rotates 3 of 128 channels"),
        ("MiniMax-M2", dict(rotary_dim=64, partial_rotary_factor=0.25), "contradicts"),
        ("MiniMax-M2", dict(attn_type_list=[0] * 62), "attn_type_list"),
        ("MiniMax-M2", dict(qk_norm_type="per_head"), "qk_norm_type='per_head'"),
        ("GLM-4.7-Flash", dict(mlp_layer_types=["dense"] * 47), "experts in no layer"),
        ("GLM-4.7-Flash", dict(mlp_layer_types=["dense"] * 3), "must be dense or sparse for 47"),
        ("GLM-4.7-Flash", dict(first_k_dense_replace=2), "first_k_dense_replace=2 (must be 1)"),
        ("Mixtral-8x7B", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
        ("Mixtral-8x7B", dict(num_experts_per_tok=1), "num_experts_per_tok=1 with weights"),
        ("Qwen1.5-MoE-A2.7B", dict(qkv_bias=False), "qkv_bias=False"),
        ("Qwen1.5-MoE-A2.7B", dict(mlp_only_layers=["a"]), "mlp_only_layers=['a']"),
    ],
)
def test_another_model_of_other_families(name: str, change: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(PUBLISHED[name] | change)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            dict(
                architectures=["Gemma3ForConditionalGeneration"],
                model_type="gemma3",
                text_config=dict(model_type="gemma3_text"),
            ),
            "Save its text model alone, as Gemma3ForCausalLM",
        ),
        (dict(model_type="qwen2"), "name that in architectures"),
        (dict(architectures=["Phi3ForCausalLM"], model_type="phi3"), "--bridge"),
        (dict(architectures=["Qwen2ForSequenceClassification"], model_type="qwen2"), "--bridge"),
        (dict(text_config=[1], model_type=["a"]), "--bridge"),
    ],
)
def test_an_architecture_that_is_not_held(content: dict[str, Any], named: str) -> None:
    """With what can be done about it."""
    with refused("is not supported; supported are", named):
        parse_hf_config(content)
