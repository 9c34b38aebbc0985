"""Norms, positions and activation functions of layers: memory depends on them, FLOPs hardly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.sharing.hybrids import HF_HYBRIDS

# Types that normalise queries and keys without saying so; latent attention does of its latents.
_QK_NORMS = {
    *("flex_olmo", "gemma3_text", "minimax_m2", "molmo2_text", "olmo2", "olmo3", "olmoe", "qwen3"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text"),
    "qwen3_vl_text",
}
_ONLY_BEHIND = {"flex_olmo", "olmo2", "olmo3"}
_BEHIND = {"gemma3_text", "glm4", "glm4v_text", *_ONLY_BEHIND}
# Positions that are added to the embedding, or none.
_NO_ROTARY = {"biogpt", "gpt2", "gpt_bigcode", *HF_HYBRIDS}
# Activations that a kernel computes with the gate, and types of others whatever they say.
_FUSED = {None, "silu", "swish"}
_UNFUSED = {"gemma", "gemma3_text", "gpt_oss", *HF_HYBRIDS}


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """What a layer has or lacks; see ``LayerSizes`` and its ``ModuleKinds``."""

    has_qk_norms: bool
    has_norms_before: bool
    has_norms_behind: bool
    has_rotary: bool
    has_fused_activation: bool


def hf_modules(values: Mapping[str, Any]) -> LayerModules:
    """Of a Hugging Face config."""
    kind = values.get("model_type")
    activation = values.get("hidden_activation") or values.get("hidden_act")
    said = values.get("qk_layernorm") or values.get("use_qk_norm") or values.get("kv_lora_rank")
    return LayerModules(
        has_qk_norms=kind in _QK_NORMS or bool(said),
        has_norms_before=kind not in _ONLY_BEHIND,
        has_norms_behind=kind in _BEHIND,
        has_rotary=kind not in _NO_ROTARY,
        has_fused_activation=activation in _FUSED and kind not in _UNFUSED,
    )


def megatron_modules(values: Mapping[str, Any]) -> LayerModules:
    """The same of Megatron-LM's arguments, or of fields of a ``TransformerConfig``."""
    positions = values.get("position_embedding_type", "rope")
    is_clamped = values.get("activation_func_clamp_value") or values.get("glu_linear_offset")
    has_biases = values.get("num_experts") and values.get("add_bias_linear")
    return LayerModules(
        has_qk_norms=bool(values.get("qk_layernorm") or values.get("has_norms_over_heads")),
        has_norms_before=bool(values.get("has_pre_layernorms", True)),
        has_norms_behind=bool(values.get("has_post_layernorms", False)),
        has_rotary=bool(values.get("use_rotary_position_embeddings"))
        or positions in ("rope", "yarn", "mrope"),
        has_fused_activation=bool(values.get("swiglu")) and not (is_clamped or has_biases),
    )
