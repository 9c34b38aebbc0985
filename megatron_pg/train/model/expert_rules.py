"""What a run asks of a model's experts that it would not get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from ...parallel import ParallelSizes


def check_expert_biases(settings: Mapping[str, Any], sizes: ParallelSizes) -> None:
    """Refuse biases in experts that tensor parallelism divides, with what to set instead.

    Raises:
        ValueError: naming the sizes.
    """
    has_biases = settings.get("add_bias_linear", TransformerConfig.add_bias_linear)
    if settings.get("num_moe_experts") and has_biases and sizes.expert_tp > 1:
        raise ValueError(
            "Megatron-Core does not divide experts with biases, and "
            f"expert_tensor_parallel_size={sizes.expert_tp} would (tp's size where it is not set): "
            "set parallel.expert_tensor_parallel_size=1 and spread the experts by "
            f"parallel.expert_model_parallel_size={sizes.tp}, or another size above 1"
        )


def ignored_expert_settings(config: TransformerConfig, asked: Mapping[str, Any]) -> Iterator[str]:
    """Of the fields that a user set, by name, those that change nothing."""
    rate, kinds = "moe_router_bias_update_rate", "moe_router_load_balancing_type"
    if asked.get(rate) and not config.moe_router_enable_expert_bias:
        yield (
            f"model.transformer.{rate}={asked[rate]!r} would be ignored: the experts have no bias "
            "for their choice; remove it"
        )
    weights = config.moe_aux_loss_coeff
    has_weight = any(weights if isinstance(weights, list) else [weights])
    if asked.get(kinds, "none") != "none" and not has_weight:
        yield (
            f"model.transformer.{kinds}={asked[kinds]!r} would be ignored: moe_aux_loss_coeff is "
            "0; set that, or leave both out"
        )
