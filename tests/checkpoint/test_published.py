"""Configurations as they are published: read whole, and the model is transformers' of that size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_pg.checkpoint import open_weights, parse_hf_config
from tests.checkpoint.tiny import FAMILIES, make_hf, save_hf
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
_LINEAR = dict(
    attention_bias=False,
    attention_dropout=0.0,
    full_attention_interval=4,
    head_dim=256,
    hidden_act="silu",
    initializer_range=0.02,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    max_position_embeddings=262144,
    num_attention_heads=16,
    rms_norm_eps=1e-06,
    tie_word_embeddings=False,
    use_cache=True,
)
_QWEN3_NEXT = _LINEAR | dict(
    architectures=["Qwen3NextForCausalLM"],
    bos_token_id=151643,
    decoder_sparse_step=1,
    eos_token_id=151645,
    hidden_size=2048,
    intermediate_size=5120,
    mlp_only_layers=[],
    model_type="qwen3_next",
    moe_intermediate_size=512,
    norm_topk_prob=True,
    num_experts=512,
    num_experts_per_tok=10,
    num_hidden_layers=48,
    num_key_value_heads=2,
    output_router_logits=False,
    partial_rotary_factor=0.25,
    rope_scaling=None,
    rope_theta=10000000,
    router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=512,
    torch_dtype="bfloat16",
    use_sliding_window=False,
    vocab_size=151936,
)
# The text part of a model that sees, with what is said there of images and of other programs.
_QWEN3_5 = _LINEAR | dict(
    attn_output_gate=True,
    dtype="bfloat16",
    eos_token_id=248044,
    mamba_ssm_dtype="float32",
    mtp_num_hidden_layers=1,
    mtp_use_dedicated_embeddings=False,
    rope_parameters=dict(
        mrope_interleaved=True,
        mrope_section=[11, 11, 10],
        partial_rotary_factor=0.25,
        rope_theta=10000000,
        rope_type="default",
    ),
    vocab_size=248320,
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
    "Qwen3-Next-80B-A3B": _QWEN3_NEXT,
    "Qwen3.5-9B": _QWEN3_5
    | dict(architectures=["Qwen3_5ForCausalLM"], model_type="qwen3_5_text")
    | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=32, num_key_value_heads=4),
    "Qwen3.5-35B-A3B": _QWEN3_5
    | dict(architectures=["Qwen3_5MoeForCausalLM"], model_type="qwen3_5_moe_text")
    | dict(hidden_size=2048, num_hidden_layers=40, num_key_value_heads=2)
    | dict(mlp_only_layers=[], moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8)
    | dict(output_router_logits=False, router_aux_loss_coef=0.001)
    | dict(shared_expert_intermediate_size=512),
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
# With a pattern, a second epsilon, and positions that no layer reads.
PUBLISHED["Nemotron-3-Nano-30B-A3B"] = dict(
    architectures=["NemotronHForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map=dict(AutoConfig="configuration_nemotron_h.NemotronHConfig"),
    bos_token_id=1,
    chunk_size=128,
    conv_kernel=4,
    eos_token_id=2,
    expand=2,
    head_dim=128,
    hidden_dropout=0.0,
    hidden_size=2688,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    initializer_range=0.02,
    intermediate_size=1856,
    layer_norm_epsilon=1e-05,
    mamba_head_dim=64,
    mamba_hidden_act="silu",
    mamba_num_heads=64,
    mamba_proj_bias=False,
    mamba_ssm_cache_dtype="float32",
    max_position_embeddings=262144,
    mlp_bias=False,
    mlp_hidden_act="relu2",
    model_type="nemotron_h",
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    n_group=1,
    n_groups=8,
    n_routed_experts=128,
    n_shared_experts=1,
    norm_eps=1e-05,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts_per_tok=6,
    num_hidden_layers=52,
    num_key_value_heads=2,
    num_logits_to_keep=1,
    pad_token_id=0,
    partial_rotary_factor=1.0,
    rescale_prenorm_residual=True,
    residual_in_fp32=False,
    rope_theta=10000,
    routed_scaling_factor=2.5,
    sliding_window=None,
    ssm_state_size=128,
    tie_word_embeddings=False,
    time_step_floor=0.0001,
    time_step_limit=[0.0, float("inf")],
    time_step_max=0.1,
    time_step_min=0.001,
    topk_group=1,
    torch_dtype="bfloat16",
    use_bias=False,
    use_cache=True,
    use_conv_bias=True,
    use_mamba_kernels=True,
    vocab_size=131072,
)
# A head's width has another name in it.
PUBLISHED["Nemotron-H-8B"] = {
    key: value
    for key, value in PUBLISHED["Nemotron-3-Nano-30B-A3B"].items()
    if key not in ("head_dim", "norm_eps", "rope_theta", "partial_rotary_factor", "n_group")
    and not any(part in key for part in ("moe", "expert", "topk"))
} | dict(
    attention_head_dim=128,
    hidden_size=4096,
    hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    intermediate_size=21504,
    mamba_num_heads=128,
    max_position_embeddings=8192,
    num_key_value_heads=8,
    rms_norm_eps=1e-05,
    time_step_rank=256,
)
CONFIGS = {name: f"{name}TextConfig" for name in ("Gemma3", "Qwen3_5", "Qwen3_5Moe")}
# Billions, as their cards say.
SIZES = {
    "DeepSeek-V3": 671,
    "Kimi-K2": 1026,
    "Moonlight-16B-A3B": 16,
    "GLM-4.5": 353,
    "GLM-4.7-Flash": 30,
    "MiniMax-M2": 229,
    "Mixtral-8x7B": 46.7,
    "Nemotron-3-Nano-30B-A3B": 31.6,
    "Nemotron-H-8B": 8.1,
    "Qwen3-Next-80B-A3B": 79.7,
    "Qwen3.5-9B": 9.0,
    "Qwen3.5-35B-A3B": 34.7,
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


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2", "MiniMax-M2"])
def test_weights_in_blocks_of_fp8(name: str) -> None:
    blocks = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    with refused("quantization_config of 'fp8'", "FineGrainedFP8Config(dequantize=True)"):
        parse_hf_config(PUBLISHED[name] | dict(quantization_config=blocks))


def test_fp8_that_transformers_has_dequantised(tmp_path: Path) -> None:
    """What the refusal advises, on a folder of the published form."""
    pytest.importorskip("accelerate")
    folder, size = tmp_path / "fp8", 16
    model = save_hf(FAMILIES["deepseek_v3"], folder, num_layers=2).bfloat16()
    weights = load_file(folder / "model.safetensors")
    want, stored = {}, {}
    for name, weight in weights.items():
        want[name] = stored[name] = weight.bfloat16() if weight.ndim > 1 else weight
        if "proj" in name and not any(n % size for n in weight.shape):
            blocks = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size))
            scale = blocks.abs().amax((1, 3)) / 448
            quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name] = quantised.reshape(weight.shape).contiguous()
            stored[f"{name}_scale_inv"] = scale
            want[name] = (quantised.float() * scale[:, None, :, None]).reshape(weight.shape)
    assert len(stored) > len(want)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    blocks = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[size, size])
    model.config.quantization_config = blocks
    model.config.save_pretrained(folder)
    with refused("FineGrainedFP8Config"):
        open_weights(folder)
    by = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", quantization_config=by
    )
    loaded.save_pretrained(tmp_path / "bf16")
    read = open_weights(tmp_path / "bf16")
    assert read.shapes.keys() == want.keys()
    for name, weight in want.items():
        assert torch.equal(read.read(name).bfloat16(), weight.bfloat16()), name


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
        ("Qwen3-Next-80B-A3B", dict(attention_bias=True), "attention_bias=True (must be false"),
        ("Qwen3-Next-80B-A3B", dict(sliding_window=8), "sliding_window=8 (must be None)"),
        ("Qwen3-Next-80B-A3B", dict(full_attention_interval=1), "linear attention in no layer"),
        ("Qwen3-Next-80B-A3B", dict(linear_num_key_heads=5), "no multiple of linear_num_key_he"),
        ("Qwen3-Next-80B-A3B", dict(layer_types=["full_attention"]), "for all 48 layers"),
        ("Qwen3-Next-80B-A3B", dict(linear_conv_kernel_dim=None), "'linear_conv_kernel_dim'"),
        ("Qwen3.5-9B", dict(attn_output_gate=False), "attn_output_gate=False (must be True)"),
        ("Qwen3.5-9B", dict(mtp_use_dedicated_embeddings=True), "mtp_use_dedicated_embeddings"),
        ("Qwen3.5-9B", dict(num_experts=4), "unknown key num_experts"),
        ("Qwen3.5-35B-A3B", dict(mlp_only_layers=[3]), "mlp_only_layers=[3] (must be [])"),
        ("Qwen3.5-35B-A3B", dict(norm_topk_prob=False), "norm_topk_prob=False (must be True)"),
        ("Nemotron-H-8B", dict(head_dim=64), "head_dim=64 (must be 128)"),
        ("Nemotron-H-8B", dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06 (must be 1e-05)"),
        ("Nemotron-H-8B", dict(attention_head_dim=None), "key 'head_dim' is missing"),
        ("Qwen1.5-MoE-A2.7B", dict(qkv_bias=False), "qkv_bias=False"),
        ("Qwen1.5-MoE-A2.7B", dict(mlp_only_layers=["a"]), "mlp_only_layers=['a']"),
    ],
)
def test_another_model_of_other_families(name: str, change: dict[str, Any], named: str) -> None:
    with refused(named):
        parse_hf_config(PUBLISHED[name] | change)


_EYES = dict(
    Gemma3=(
        dict(image_size=28, patch_size=14, intermediate_size=16, num_hidden_layers=1),
        dict(mm_tokens_per_image=4, image_token_index=80),
    ),
    Qwen3_5=(
        dict(depth=1, intermediate_size=16, num_heads=2, out_hidden_size=32),
        dict(image_token_id=80, video_token_id=81, tie_word_embeddings=True),
    ),
)


@pytest.mark.parametrize("name", _EYES)
def test_the_text_model_of_a_model_that_sees(name: str, tmp_path: Path) -> None:
    """What the refusal advises, word for word."""
    sees, tokens = _EYES[name]
    config = getattr(transformers, f"{name}Config")(
        text_config=make_hf(FAMILIES[name.lower()], num_layers=2).config.to_dict(),
        vision_config=sees | dict(hidden_size=16, num_attention_heads=2),
        **tokens,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).bfloat16()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(NotImplementedError) as told:
        open_weights(tmp_path / "whole")
    advice = str(told.value).partition("saved alone: ")[2].partition(f". {name}For")[0]
    first, *others, last = advice.split("; ")
    steps = first.replace("...", "whole_folder"), *others, last.replace("...", "text_folder")
    folders = dict(whole_folder=tmp_path / "whole", text_folder=tmp_path / "text")
    start = f"from transformers import AutoModelForImageTextToText, {name}ForCausalLM"
    exec("\n".join((start, *steps)), folders)
    text = open_weights(tmp_path / "text")
    want = model.model.language_model.state_dict()
    assert {f"model.{name}" for name in want} == text.shapes.keys() - {"lm_head.weight"}
    for name, weight in want.items():
        assert torch.equal(text.read(f"model.{name}"), weight), name


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            dict(
                architectures=["Gemma3ForConditionalGeneration"],
                model_type="gemma3",
                text_config=dict(model_type="gemma3_text"),
            ),
            "text = Gemma3ForCausalLM(whole.config.text_config)",
        ),
        (
            dict(
                architectures=["Qwen3_5MoeForConditionalGeneration"],
                model_type="qwen3_5_moe",
                text_config=dict(model_type="qwen3_5_moe_text"),
            ),
            "text = Qwen3_5MoeForCausalLM(whole.config.text_config)",
        ),
        (
            dict(architectures=["KimiLinearForCausalLM"], model_type="kimi_linear"),
            "its delta attention has a decay of its own in every channel; choose another model",
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
