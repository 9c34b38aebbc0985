"""Hugging Face folders a few kilobytes large, written without transformers, and their content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_pg.checkpoint import parse_hf_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MODEL_TYPES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma3ForCausalLM": "gemma3_text",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "GptOssForCausalLM": "gpt_oss",
    "LlamaForCausalLM": "llama",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronHForCausalLM": "nemotron_h",
    "Olmo3ForCausalLM": "olmo3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
}
_QWEN_EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4)
_BIASED_EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    num_nextn_predict_layers=0,
)
_LATENT = dict(
    num_key_value_heads=2,
    q_lora_rank=6,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=6,
    head_dim=2,
)
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=2,
    linear_value_head_dim=3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    partial_rotary_factor=0.5,
)
_SHARED_EXPERT = dict(num_experts_per_tok=2, shared_expert_intermediate_size=6)
_OWN: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": _BIASED_EXPERTS | _LATENT | dict(first_k_dense_replace=1),
    "Gemma3ForCausalLM": dict(query_pre_attn_scalar=4, sliding_window=64),
    "Glm4MoeForCausalLM": _BIASED_EXPERTS | dict(first_k_dense_replace=1, use_qk_norm=True),
    "Glm4MoeLiteForCausalLM": _BIASED_EXPERTS | _LATENT | dict(first_k_dense_replace=1),
    "GptOssForCausalLM": dict(
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=64,
        rope_parameters=dict(rope_type="default"),
    ),
    "MiniMaxM2ForCausalLM": dict(num_local_experts=2, num_experts_per_tok=2, rotary_dim=2),
    "MistralForCausalLM": dict(sliding_window=None),
    "MixtralForCausalLM": dict(num_local_experts=2, num_experts_per_tok=2),
    "NemotronHForCausalLM": dict(
        layers_block_type=["mamba", "mlp"],
        layer_norm_epsilon=1e-5,
        mamba_num_heads=4,
        mamba_head_dim=2,
        n_groups=2,
        ssm_state_size=3,
    ),
    "Olmo3ForCausalLM": dict(sliding_window=64),
    "Qwen2MoeForCausalLM": _QWEN_EXPERTS | dict(shared_expert_intermediate_size=6),
    "Qwen3MoeForCausalLM": _QWEN_EXPERTS,
    "Qwen3NextForCausalLM": _QWEN_EXPERTS | _SHARED_EXPERT | _LINEAR,
    "Qwen3_5ForCausalLM": _LINEAR,
    "Qwen3_5MoeForCausalLM": _QWEN_EXPERTS | _SHARED_EXPERT | _LINEAR,
}
# Neither positions nor an epsilon under this name.
_NOT_OF = {"NemotronHForCausalLM": ("rope_theta", "rms_norm_eps")}
# All of its layers have experts.
_WITHOUT_MLP = {"Qwen3_5MoeForCausalLM"}


def make_config(architecture: str, **settings: Any) -> dict[str, Any]:
    config = dict(
        architectures=[architecture],
        model_type=MODEL_TYPES[architecture],
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        rms_norm_eps=1e-6,
        vocab_size=11,
        max_position_embeddings=64,
        rope_theta=1e4,
        tie_word_embeddings=False,
        torch_dtype="float32",
    )
    config |= _OWN.get(architecture, {})
    for key in _NOT_OF.get(architecture, ()):
        del config[key]
    if architecture in _WITHOUT_MLP:
        del config["intermediate_size"]
    return config | settings


def make_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = parse_hf_config(config).weight_table().hf_shapes()
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Factors from a half on, which are exact less one.
    exact = (name for name in weights if name.endswith("linear_attn.norm.weight"))
    return weights | {name: weights[name].abs() + 0.5 for name in exact}


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], num_shards: int = 1
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(weights, folder / SINGLE)
        return
    names = list(weights)
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[number::num_shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = dict(metadata=dict(total_size=size), weight_map=weight_map)
    (folder / INDEX).write_text(json.dumps(index))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What transformers takes from a folder: the single file, or the index's shards."""
    if (folder / SINGLE).is_file():
        return load_file(folder / SINGLE)
    weights = {}
    for file in set(json.loads((folder / INDEX).read_text())["weight_map"].values()):
        weights |= load_file(folder / file)
    return weights


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
