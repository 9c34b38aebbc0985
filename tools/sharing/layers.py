"""Heads and MLPs of every layer; what is not counted right is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pg.data import AttentionSizes

# Layers whose FLOPs are neither full attention's nor an MLP's. A value that is off is none.
_HF_UNCOUNTED = {
    *("attention_chunk_size", "attn_layer_period", "block_types", "index_topk"),
    *("is_encoder_decoder", "hybrid_override_pattern", "cross_attention_layers", "attn_type_list"),
    *("full_attention_interval", "interleave_moe_layer_step", "moe_topk", "num_shared_expert"),
}
_HF_UNCOUNTED_PREFIXES = ("linear_", "mamba_", "ssm_", "lru_", "conv_")
_MEGATRON_UNCOUNTED = {
    *("attention_output_gate", "experimental_attention_variant", "hybrid_override_pattern"),
    *("hybrid_layer_pattern", "heterogeneous_layers_config_path", "is_hybrid_model"),
    *("heterogeneous_layers_config_encoded_json", "linear_attention_freq", "moe_latent_size"),
    "enable_mhc_connections",
}
# Types whose configs say the window of all layers, where they have no ``layer_types``.
_HF_WINDOW_IN_EVERY_LAYER = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def hf_attention(values: Mapping[str, Any]) -> AttentionSizes:
    """Of a Hugging Face config.

    Raises:
        NotImplementedError: naming a key of layers that are not counted.
    """
    uncounted = [
        key
        for key, value in values.items()
        if value and (key in _HF_UNCOUNTED or key.startswith(_HF_UNCOUNTED_PREFIXES))
    ]
    _refuse(uncounted, values)
    heads = values["num_attention_heads"]
    if values.get("kv_lora_rank"):
        rope = values["qk_rope_head_dim"]
        return AttentionSizes(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=values["qk_nope_head_dim"] + rope,
            value_dim=values["v_head_dim"],
            q_lora_rank=values.get("q_lora_rank"),
            kv_lora_rank=values["kv_lora_rank"],
            rotary_dim=rope,
        )
    size = values.get("head_dim") or values["hidden_size"] // heads
    groups = values.get("num_key_value_heads") or heads
    return AttentionSizes(num_heads=heads, num_kv_heads=groups, head_dim=size, value_dim=size)


def megatron_attention(values: Mapping[str, Any]) -> AttentionSizes:
    """Of Megatron-LM's arguments.

    Raises:
        NotImplementedError: naming an argument of layers that are not counted.
    """
    _refuse([key for key in sorted(_MEGATRON_UNCOUNTED) if values.get(key)], values)
    heads = values["num_attention_heads"]
    if values.get("multi_latent_attention"):
        shared = values.get("qk_pos_emb_head_dim", 64)
        return AttentionSizes(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=values.get("qk_head_dim", 128) + shared,
            value_dim=values.get("v_head_dim", 128),
            q_lora_rank=values.get("q_lora_rank"),
            kv_lora_rank=values["kv_lora_rank"],
            rotary_dim=shared,
        )
    groups = values.get("num_query_groups") if values.get("group_query_attention", True) else None
    size = values.get("kv_channels") or values["hidden_size"] // heads
    return AttentionSizes(
        num_heads=heads, num_kv_heads=groups or heads, head_dim=size, value_dim=size
    )


def hf_windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Keys that a token of every layer sees before itself; None sees all.

    Raises:
        NotImplementedError: naming a key of layers that are not counted.
    """
    number: int = values["num_hidden_layers"]
    kinds, reach = values.get("layer_types"), values.get("max_position_embeddings")
    size = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    # transformers counts the token itself.
    window: int | None = size - 1 if size else None
    if kinds:
        known = {"full_attention"} | ({"sliding_attention"} if size else set())
        _refuse(["layer_types"] if set(kinds) - known or len(kinds) != number else [], values)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if window is None or (reach and window >= reach - 1):
        return (None,) * number
    is_known = values.get("model_type") in _HF_WINDOW_IN_EVERY_LAYER
    _refuse([] if is_known else ["sliding_window"], values)
    return (window,) * number


def megatron_windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Keys that a token of every layer sees before itself; None sees all.

    Raises:
        NotImplementedError: naming an argument that packed rows do not take.
    """
    number: int = values["num_layers"]
    window = values.get("window_size")
    if not window:
        return (None,) * number
    which = values.get("window_attn_skip_freq")
    if which is None:
        which = [1] * number
    elif type(which) is int and which > 0:
        which = [layer % which for layer in range(1, number + 1)]
    wrong = ["window_attn_skip_freq"] * (not isinstance(which, list) or len(which) != number)
    is_pair = isinstance(window, list | tuple) and len(window) == 2
    if not is_pair or any(type(n) is not int or n < 0 for n in window) or window[1]:
        wrong.append("window_size")
    _refuse(wrong, values)
    return tuple(window[0] if has_window else None for has_window in which)


def hf_mlps(values: Mapping[str, Any]) -> tuple[list[int], dict[str, int]]:
    """Width that a token goes through in every layer, and the widths that are divided.

    Raises:
        NotImplementedError: naming a key of experts that are not counted.
    """
    num_layers, topk = values["num_hidden_layers"], values.get("num_experts_per_tok")
    known = {"shared_expert_intermediate_size", "shared_intermediate_size", "n_shared_experts"}
    unknown = [k for k in values if "shared_exp" in k and values[k] and k not in known]
    counts = [key for key in _EXPERT_COUNTS if (values.get(key) or 0) > 1]
    _refuse(unknown + (counts if not topk else []), values)
    if not (counts and topk):
        dense = values["intermediate_size"]
        return [dense] * num_layers, {"ffn_hidden_size": dense}
    expert = values.get("moe_intermediate_size") or values["intermediate_size"]
    shared = (
        values.get("shared_expert_intermediate_size")
        or values.get("shared_intermediate_size")
        or (values.get("n_shared_experts") or 0) * expert
    )
    frequency, dense_layers = values.get("moe_layer_freq", 1), values.get("mlp_only_layers") or []
    first, step = values.get("first_k_dense_replace") or 0, values.get("decoder_sparse_step") or 1
    has_experts = [
        bool(frequency[i] if isinstance(frequency, list) else i % frequency == 0)
        and i >= first
        and i not in dense_layers
        and (i + 1) % step == 0
        for i in range(num_layers)
    ]
    if kinds := values.get("mlp_layer_types"):
        has_experts = [kind == "sparse" for kind in kinds]
    return _mlps(has_experts, values.get("intermediate_size"), expert, topk, shared)


def megatron_mlps(values: Mapping[str, Any], dense: int) -> tuple[list[int], dict[str, int]]:
    """As ``hf_mlps``, of Megatron-LM's arguments; ``dense`` is the width of an MLP."""
    num_layers = values["num_layers"]
    if not values.get("num_experts"):
        return [dense] * num_layers, {"ffn_hidden_size": dense}
    frequency = values.get("moe_layer_freq", 1)
    has_experts = [
        bool(frequency[i] if isinstance(frequency, list) else i % frequency == 0)
        for i in range(num_layers)
    ]
    expert = values.get("moe_ffn_hidden_size") or dense
    shared = values.get("moe_shared_expert_intermediate_size") or 0
    return _mlps(has_experts, dense, expert, values.get("moe_router_topk", 2), shared)


def _mlps(
    has_experts: list[bool], dense: int | None, expert: int, topk: int, shared: int
) -> tuple[list[int], dict[str, int]]:
    widths = {"moe_ffn_hidden_size": expert}
    if shared:
        widths["moe_shared_expert_intermediate_size"] = shared
    if not all(has_experts):
        if not dense:
            raise KeyError("intermediate_size")
        widths["ffn_hidden_size"] = dense
    layers = [topk * expert + shared if sparse else dense or 0 for sparse in has_experts]
    return layers, widths


def _refuse(keys: list[str], values: Mapping[str, Any]) -> None:
    if keys:
        named = ", ".join(f"{key}={str(values[key])[:60]}" for key in keys)
        raise NotImplementedError(
            f"{named}: FLOPs and memory of such layers are not counted; name an args.json with the "
            "sizes of an ordinary decoder that costs the same"
        )
