"""``model.transformer``: which fields of ``TransformerConfig`` a run sets, and to what."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from ...mcore import field_verdict, transformer_config_class
from ..config import convert, nearest, raise_problems


def transformer_settings(
    overrides: Mapping[str, Any], of_hf: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The fields that a run sets itself, with values of their types.

    Args:
        overrides: ``model.transformer``; dtypes and the activation by name.
        of_hf: the fields that ``model.hf`` fixes; None for a model from scratch.

    Raises:
        ValueError: listing every field that is unknown, set elsewhere, said by ``model.hf``
            otherwise or without effect, and every value that is none of its field's.
    """
    cls = transformer_config_class({**(of_hf or {}), **overrides})
    hints = typing.get_type_hints(cls) | _HINTS
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, given in overrides.items():
        path = f"model.transformer.{name}"
        if name not in fields and name in _OF_LATENT_ATTENTION:
            problems.append(f"{path} is of latent attention; set multi_latent_attention: true too")
        elif name not in fields:
            problems.append(f"{path} is unknown{nearest(str(name), list(fields))}")
        elif name in _OWNED:
            problems.append(f"{path} {_OWNED[name]}")
        else:
            before = len(problems)
            value = _value(name, hints[name], given, path, problems)
            if len(problems) == before:
                values[name] = value
                problems += _field_problems(name, value, given, fields[name], of_hf)
    raise_problems("in model.transformer", problems)
    return values


def _value(name: str, hint: Any, given: Any, path: str, problems: list[str]) -> Any:
    if name in _NAMED:
        if isinstance(given, str) and given in _NAMED[name]:
            return _NAMED[name][given]
        hint_text = nearest(str(given), list(_NAMED[name]))
        problems.append(f"{path}={given!r} must be one of {', '.join(_NAMED[name])}{hint_text}")
        return None
    return convert(hint, given, path, problems)


def _field_problems(
    name: str, value: Any, given: Any, field: Any, of_hf: Mapping[str, Any] | None
) -> Iterator[str]:
    path = f"model.transformer.{name}={given!r}"
    verdict = field_verdict(name)
    if of_hf is not None and name in of_hf and name not in _FREE and value != of_hf[name]:
        yield f"{path} contradicts model.hf, which says {_shown(name, of_hf[name])}; remove it"
    elif of_hf is not None and name not in of_hf and _makes_another_model(name, value, field):
        yield f"{path} makes another model of the weights of model.hf; remove it"
    elif verdict is not None and verdict.is_inert and value != field.default:
        yield f"{path} would be ignored: what it qualifies is off; remove it"
    least = 1 if name in _SIZES else -math.inf
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            if not math.isfinite(number):
                yield f"{path} must be finite"
            elif number < least or (name in _ABOVE_ZERO and number <= 0):
                yield f"{path} must be {'at least 1' if name in _SIZES else 'above 0'}"


def _shown(name: str, value: Any) -> str:
    """A value as a file would say it; a function that no file can name by its own name."""
    words = [word for word, named in _NAMED.get(name, {}).items() if named is value]
    return repr(words[0] if words else getattr(value, "__name__", value))


def _makes_another_model(name: str, value: Any, field: Any) -> bool:
    """Whether it is a value that packed rows take, and the same weights compute something else."""
    verdict = field_verdict(name)
    if verdict is None or not verdict.changes_model or not verdict.allows(value):
        return False
    return bool(value != field.default)


def refused_settings(values: Mapping[str, Any]) -> list[str]:
    """Those that ``mcore.validate_config`` would refuse, had Megatron-Core taken them."""
    verdicts = ((name, value, field_verdict(name)) for name, value in values.items())
    return [
        f"model.transformer.{name}={value!r}: {verdict.problem}"
        for name, value, verdict in verdicts
        if verdict is not None and not verdict.allows(value)
    ]


_DTYPES: dict[str, Any] = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    # Exact to more digits than an optimizer of Megatron's takes: for checks of gradients.
    "float64": torch.float64,
}
_NAMED: dict[str, dict[str, Any]] = {
    "params_dtype": _DTYPES,
    "activation_func": {
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "relu": torch.nn.functional.relu,
        "squared_relu": squared_relu,
    },
}
_SIZES = {
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"),
    *("kv_channels", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_router_num_groups", "moe_router_group_topk"),
    *("recompute_num_layers", "num_layers_in_first_pipeline_stage"),
    "num_layers_in_last_pipeline_stage",
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    "original_max_position_embeddings",
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
}
_ABOVE_ZERO = {
    *("layernorm_epsilon", "softmax_scale", "init_method_std", "embedding_init_method_std"),
    *("activation_func_clamp_value", "moe_router_topk_scaling_factor", "rotary_percent"),
    *("rotary_scaling_factor", "beta_fast", "beta_slow"),
}
_OF_LATENT_ATTENTION = {field.name for field in dataclasses.fields(MLATransformerConfig)} - {
    field.name for field in dataclasses.fields(TransformerConfig)
}
# Said otherwise than it is read: without a rank there is one projection of queries.
_HINTS: dict[str, Any] = {"q_lora_rank": int | None}
# How the model of a folder is run stays the run's choice.
_FREE = {
    *("attention_dropout", "hidden_dropout", "moe_router_load_balancing_type"),
    *("moe_token_dispatcher_type", "moe_grouped_gemm"),
    *("moe_router_bias_update_rate", "moe_router_dtype"),
}
_PARALLEL = "is set by parallel.{0}; set it there"
_OFFERED_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "cp_comm_type",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
)
_FOLLOWS_DTYPE = "follows model.transformer.params_dtype; omit it"
_FOLLOWS_VPP = "follows parallel.virtual_pipeline_model_parallel_size; omit it"
_GROUPS = "needs process groups that no run makes; omit it"
_OWN_LOGPROBS = "would be ignored: logprobs are computed from predictor rows; omit it"
_SEEDED = "would break the start from run.seed or model.hf; omit it"
_HOOK = "is set by the run; omit it"
# Settings that have one place elsewhere, or that the recipe depends on or does not look at.
_OWNED = {name: _PARALLEL.format(name) for name in _OFFERED_PARALLEL} | {
    "fp16": "is not supported; use params_dtype: bfloat16",
    "bf16": _FOLLOWS_DTYPE,
    "pipeline_dtype": _FOLLOWS_DTYPE,
    "overlap_p2p_comm": _FOLLOWS_VPP,
    "batch_p2p_comm": _FOLLOWS_VPP,
    "microbatch_group_size_per_vp_stage": _FOLLOWS_VPP,
    "hierarchical_context_parallel_sizes": _GROUPS,
    "hybrid_context_parallel": _GROUPS,
    "gtp_weight_remat_size": _GROUPS,
    "expert_gtp_weight_remat_size": _GROUPS,
    "tensor_parallel_num_weight_shards": _GROUPS,
    "expert_tensor_parallel_num_weight_shards": _GROUPS,
    "pipeline_model_parallel_comm_backend": _GROUPS,
    "calculate_per_token_loss": "must stay true: the loss carries its own denominators; omit it",
    "variable_seq_lengths": "must stay true: packed rows differ in length; omit it",
    "attention_backend": "is not of packed rows; set prefix_group.attention_backend",
    "flash_attention_version": "is not of packed rows; set prefix_group.attention_backend",
    "transformer_impl": "is set by model.transformer_impl; set it there",
    "rotary_base": "is set by model.rotary_base; set it there",
    "cross_entropy_loss_fusion": _OWN_LOGPROBS,
    "cross_entropy_fusion_impl": _OWN_LOGPROBS,
    "apply_residual_connection_post_layernorm": "would be ignored: no layer reads it; omit it",
    "fp32_residual_connection": "hands fp32 to linear layers of 16-bit weights; omit it",
    "use_te_activation_func": "needs a layer spec that no run makes; omit it",
    "moe_use_legacy_grouped_gemm": "lays experts out as no folder does; set moe_grouped_gemm",
    "perform_initialization": _SEEDED,
    "init_model_with_meta_device": _SEEDED,
    "is_hybrid_model": "would be ignored: hybrid models come of model.hf alone; omit it",
    **dict.fromkeys(
        ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
        "would be ignored: state-space layers come of model.hf alone; omit it",
    ),
    "use_te_rng_tracker": _SEEDED,
    "inference_rng_tracker": _SEEDED,
    **dict.fromkeys(
        (
            *("timers", "finalize_model_grads_func", "grad_scale_func", "no_sync_func"),
            *("grad_sync_func", "param_sync_func", "moe_grad_scale_func", "mtp_grad_scale_func"),
        ),
        _HOOK,
    ),
}
