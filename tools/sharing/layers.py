"""Heads and MLPs of every layer; what is not counted right is refused by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_pg.data import AttentionSizes, LayerKind, LinearSizes, linear_pattern
from tools.sharing.hybrids import (
    MAMBA_KEYS,
    hf_pattern,
    hybrid_kinds,
    mamba_sizes,
    megatron_pattern,
)

# Layers whose FLOPs are neither full attention's nor an MLP's. A value that is off is none.
_HF_UNCOUNTED = {
    *("attention_chunk_size", "attn_layer_period", "block_types", "index_topk"),
    *("is_encoder_decoder", "hybrid_override_pattern", "cross_attention_layers", "attn_type_list"),
    "moe_latent_size",
    *("full_attention_interval", "interleave_moe_layer_step", "moe_topk", "num_shared_expert"),
}
# What transformers calls other layers, in ``layer_types``.
_HF_UNCOUNTED_KINDS = {
    *("chunked_attention", "window_attention", "indexed_attention", "minimax_m3_sparse", "conv"),
    *("compressed_sparse_attention", "heavily_compressed_attention", "deepseek_sparse_attention"),
    *("moe", "mamba", "hybrid", "hybrid_sliding", "reference_sliding_attention"),
}
_HF_UNCOUNTED_PREFIXES = ("linear_", "mamba_", "ssm_", "lru_", "conv_")
_MEGATRON_UNCOUNTED = {
    *("experimental_attention_variant", "is_hybrid_model", "linear_attention_freq"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("moe_latent_size", "enable_mhc_connections"),
}
# Types whose configs say the window of all layers, where they have no ``layer_types``.
_HF_WINDOW_IN_EVERY_LAYER = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}
# Types of Gated DeltaNet and attention with an output gate, and the keys that say so.
HF_LINEAR = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
_OF_LINEAR = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
_LINEAR_KEYS = {*(f"linear_{name}" for name in (*_OF_LINEAR, "conv_kernel_dim"))}
_OF_HYBRIDS = {"hybrid_override_pattern", "conv_kernel", *MAMBA_KEYS.values()}
_OF_HYBRIDS |= {"mamba_hidden_act", "mamba_proj_bias", "mamba_ssm_cache_dtype"}


def hf_attention(values: Mapping[str, Any]) -> AttentionSizes:
    """Of a Hugging Face config.

    Raises:
        NotImplementedError: naming a key of layers that are not counted.
    """
    is_linear = values.get("model_type") in HF_LINEAR
    counted = {*_LINEAR_KEYS, "full_attention_interval"} if is_linear else set()
    if hf_pattern(values) is not None:
        counted = _OF_HYBRIDS
    uncounted = [
        key
        for key, value in values.items()
        if value and (key in _HF_UNCOUNTED or key.startswith(_HF_UNCOUNTED_PREFIXES))
        if key not in counted
    ]
    refuse(uncounted, values)
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
    return AttentionSizes(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        value_dim=size,
        has_output_gate=is_linear,
    )


def hf_kinds(values: Mapping[str, Any]) -> list[LayerKind]:
    """Of every layer; experts count as the MLP that a token goes through.

    Raises:
        ValueError: on names of layers that are none of the model's.
        NotImplementedError: on those of layers that are not counted.
    """
    number: int = values["num_hidden_layers"]
    if (pattern := hf_pattern(values)) is not None:
        return hybrid_kinds(pattern, number)
    if values.get("model_type") not in HF_LINEAR:
        return [LayerKind()] * number
    if kinds := values.get("layer_types"):
        return _decoder(kind == "linear_attention" for kind in kinds)
    name = "full_attention_interval"
    named = checked_pattern({name: values.get(name) or 4}, name, number)
    return _decoder(linear_pattern(named, number))


def megatron_kinds(values: Mapping[str, Any]) -> list[LayerKind]:
    """As ``hf_kinds``, of Megatron-LM's arguments."""
    number: int = values["num_layers"]
    if (pattern := megatron_pattern(values)) is not None:
        return hybrid_kinds(pattern, number)
    if not _has_gated_delta_net(values):
        return [LayerKind()] * number
    named = checked_pattern(values, "linear_attention_freq", number, least=2)
    return _decoder(linear_pattern(named, number))


def checked_pattern(
    values: Mapping[str, Any], name: str, num_layers: int, *, least: int = 1
) -> int | list[int]:
    """Which layers an argument names: one in so many, or by a 0 or 1 for each.

    Raises:
        ValueError: if it is neither.
    """
    pattern = values[name]
    is_list = isinstance(pattern, list) and len(pattern) == num_layers and set(pattern) <= {0, 1}
    if not is_list and (type(pattern) is not int or pattern < least):
        raise ValueError(
            f"{name}={str(pattern)[:80]} must be a whole number from {least}, or a list of 0 or 1 "
            f"for each of {num_layers} layers; correct it"
        )
    return pattern  # type: ignore[no-any-return]


def _decoder(is_linear: Iterable[bool]) -> list[LayerKind]:
    return [LayerKind("gated_delta" if linear else "attention") for linear in is_linear]


def linear_sizes(
    values: Mapping[str, Any], kinds: Sequence[LayerKind], *, is_hf: bool
) -> LinearSizes | None:
    """Of the layers that carry a state; None without.

    Raises:
        NotImplementedError: if these are of two kinds.
    """
    rules = {kind.mixer for kind in kinds if kind.is_linear}
    if len(rules) > 1:
        raise NotImplementedError(
            "it has Gated DeltaNet and Mamba-2 layers, which are not counted together; name an "
            "args.json with one of them"
        )
    if "state_space" in rules:
        return mamba_sizes(values, is_hf=is_hf)
    return _linear(values) if rules else None


def _linear(values: Mapping[str, Any]) -> LinearSizes:
    """Both spell the sizes alike."""
    key_heads, value_heads, key, value = (values[f"linear_{name}"] for name in _OF_LINEAR)
    return LinearSizes(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=key,
        value_dim=value,
        conv_kernel=values["linear_conv_kernel_dim"],
    )


def _has_gated_delta_net(values: Mapping[str, Any]) -> bool:
    return values.get("experimental_attention_variant") == "gated_delta_net"


def megatron_attention(values: Mapping[str, Any]) -> AttentionSizes:
    """Of Megatron-LM's arguments.

    Raises:
        NotImplementedError: naming an argument of layers that are not counted.
    """
    counted = {"experimental_attention_variant", "linear_attention_freq"}
    uncounted = _MEGATRON_UNCOUNTED - (counted if _has_gated_delta_net(values) else set())
    if megatron_pattern(values) is not None:
        uncounted -= {"is_hybrid_model"}
    refuse([key for key in sorted(uncounted) if values.get(key)], values)
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
        num_heads=heads,
        num_kv_heads=groups or heads,
        head_dim=size,
        value_dim=size,
        has_output_gate=bool(values.get("attention_output_gate")),
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
    if hf_pattern(values) is not None:
        return (None,) * number
    if kinds:
        _check_layer_types(values, kinds)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if window is None or (reach and window >= reach - 1):
        return (None,) * number
    is_known = values.get("model_type") in _HF_WINDOW_IN_EVERY_LAYER
    refuse([] if is_known else ["sliding_window"], values)
    return (window,) * number


def _check_layer_types(values: Mapping[str, Any], kinds: Any) -> None:
    """Names that no model has are wrong; those that others have are not counted."""
    number, model_type = values["num_hidden_layers"], values.get("model_type")
    own = ["full_attention", "sliding_attention"]
    own += ["linear_attention"] if model_type in HF_LINEAR else []
    told = f"layer_types={str(kinds)[:80]}"
    if not isinstance(kinds, list) or len(kinds) != number:
        count = f"names {len(kinds)} layers" if isinstance(kinds, list) else "is no list"
        raise ValueError(
            f"{told} {count}, num_hidden_layers={number}; name each layer, or correct the number"
        )
    uncounted = (_HF_UNCOUNTED_KINDS | {"linear_attention"}) - set(own)
    refuse(["layer_types"] if uncounted & set(map(str, kinds)) else [], values)
    if wrong := [str(kind) for kind in kinds if kind not in own]:
        raise ValueError(
            f"{told} names {wrong[0]!r:.40}: layers of this type are {', '.join(own)}; correct it"
        )
    if "sliding_attention" in kinds and not values.get("sliding_window"):
        raise ValueError(
            f"{told} names 'sliding_attention', but sliding_window="
            f"{values.get('sliding_window')!r}; set sliding_window, or name those layers "
            "'full_attention'"
        )


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
    refuse(wrong, values)
    return tuple(window[0] if has_window else None for has_window in which)


def refuse(keys: list[str], values: Mapping[str, Any]) -> None:
    """Raises: NotImplementedError that names ``keys`` and their values, unless there are none."""
    if keys:
        named = ", ".join(f"{key}={str(values[key])[:60]}" for key in keys)
        raise NotImplementedError(
            f"{named}: FLOPs and memory of such layers are not counted; name an args.json with the "
            "sizes of an ordinary decoder that costs the same"
        )
