"""What Megatron-Core would refuse, or do otherwise than asked, once the model is built and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from ...mcore import expert_layers_per_stage, layers_per_chunk, stage_problems
from ...parallel import ModelSizes, ParallelSizes
from .expert_rules import ignored_expert_settings
from .fusions import Machine, fusion_problems
from .linear_rules import is_layer_pattern, linear_problems

_OF_YARN = {
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
}


def megatron_problems(
    config: TransformerConfig, asked: Mapping[str, Any], vpp_size: int | None, machine: Machine
) -> Iterator[str]:
    """Everything that keeps a configuration from being built and trained as it was asked for.

    Args:
        config: as Megatron-Core made it.
        asked: the fields that a user set, by name.
        vpp_size: ``parallel.virtual_pipeline_model_parallel_size``.
        machine: that the run is on.
    """
    for name, value in asked.items():
        # A pattern of layers is kept in a form of its own.
        got = getattr(config, name)
        if name != "pipeline_model_parallel_layout" and got != value:
            yield (
                f"model.transformer.{name}={value!r}: Megatron-Core makes {got!r} of it beside the "
                "other settings; remove it, or change them"
            )
        elif name.startswith("moe_") and value is not None and not config.num_moe_experts:
            yield (
                f"model.transformer.{name}={value!r} would be ignored: the model has no experts; "
                "remove it, or set num_moe_experts"
            )
        elif name == "window_attn_skip_freq" and value is not None and not config.window_size:
            yield (
                f"model.transformer.{name}={value!r} would be ignored: no layer has a window; "
                "remove it, or set window_size"
            )
    if config.virtual_pipeline_model_parallel_size != vpp_size:
        made = config.virtual_pipeline_model_parallel_size
        yield (
            f"pipeline_model_parallel_layout has {made} virtual stages a rank: set "
            f"parallel.virtual_pipeline_model_parallel_size={made}, got {vpp_size}"
        )
    model = ModelSizes.from_config(config)
    sizes = ParallelSizes.from_config(config)
    problems = sizes.model_problems(model) + sizes.training_problems(model)
    if model.num_layers is None:
        problems += stage_problems(config)
    yield from problems or [*_recompute_problems(config), *_bare_stage_problems(config)]
    yield from _width_problems(config)
    if config.multi_latent_attention:
        yield from _latent_problems(config, asked, machine.has_te_layers)
    yield from linear_problems(config, asked)
    yield from fusion_problems(config, machine)
    if config.num_moe_experts:
        yield from _expert_problems(config)
        yield from ignored_expert_settings(config, asked)


def position_problems(config: TransformerConfig, position_embedding_type: str) -> Iterator[str]:
    """Positions that attention of the model does not take, or that turn no whole pairs."""
    if config.multi_latent_attention:
        if position_embedding_type != "rope":
            yield (
                f"position_embedding_type={position_embedding_type!r}: latent attention turns its "
                "own part of queries and keys; leave it at 'rope'"
            )
        if config.qk_pos_emb_head_dim % 2:
            yield (
                f"qk_pos_emb_head_dim={config.qk_pos_emb_head_dim} must be even: rotary positions "
                "turn pairs of channels"
            )
    elif position_embedding_type in ("rope", "yarn") and config.kv_channels % 2:
        yield (
            f"kv_channels={config.kv_channels} (hidden_size / num_attention_heads unless set) must "
            "be even: rotary positions turn pairs of channels"
        )


def _width_problems(config: TransformerConfig) -> Iterator[str]:
    if config.kv_channels < 1:
        yield (
            f"hidden_size={config.hidden_size} leaves num_attention_heads="
            f"{config.num_attention_heads} no channel; set kv_channels, or fewer heads"
        )


def _latent_problems(
    config: TransformerConfig, asked: Mapping[str, Any], use_te: bool
) -> Iterator[str]:
    for name in ("add_qkv_bias", "kv_channels", "no_rope_freq", "qk_l2_norm", "softmax_scale"):
        if asked.get(name):
            yield f"model.transformer.{name} would be ignored by latent attention; remove it"
    if config.rope_type != "yarn":
        for name in sorted(_OF_YARN & asked.keys()):
            yield f"model.transformer.{name} would be ignored: rope_type is 'rope'; remove it"
    if use_te:
        return
    tp = config.tensor_model_parallel_size
    widths = {
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank + qk_pos_emb_head_dim": config.kv_lora_rank + config.qk_pos_emb_head_dim,
    }
    for name, width in widths.items():
        if width % tp:
            yield f"{name}={width} is no multiple of tensor_model_parallel_size={tp}; change either"


def _recompute_problems(config: TransformerConfig) -> Iterator[str]:
    if config.recompute_granularity != "full" or config.recompute_method != "uniform":
        return
    number = config.recompute_num_layers
    if wrong := [n for chunks in layers_per_chunk(config) for n in chunks if n % number]:
        yield (
            f"recompute_num_layers={number} with recompute_method='uniform' does not divide the "
            f"{wrong[0]} layers of a stage; choose a divisor, or recompute_method='block'"
        )


def _pattern_problems(config: TransformerConfig) -> Iterator[str]:
    if not _is_pattern(config):
        yield (
            f"moe_layer_freq={config.moe_layer_freq!r} must be a whole number from 1, or a 1 "
            f"(experts) or 0 for each of num_layers={config.num_layers}, with a 1 among them"
        )


def _loss_problems(config: TransformerConfig) -> Iterator[str]:
    kinds, given = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if not isinstance(kinds, list) and kinds == "none" and given:
        yield (
            f"moe_aux_loss_coeff={given} would be ignored: moe_router_load_balancing_type is "
            "'none'; set that, or the coefficient to 0"
        )
    numbers = {
        "moe_aux_loss_coeff": given if isinstance(given, list) else [given],
        "moe_z_loss_coeff": [config.moe_z_loss_coeff or 0],
        "moe_router_bias_update_rate": [config.moe_router_bias_update_rate],
    }
    for name, values in numbers.items():
        if min(values, default=0) < 0:
            yield f"{name}={getattr(config, name)!r} must be at least 0"


def _is_pattern(config: TransformerConfig) -> bool:
    return is_layer_pattern(config.moe_layer_freq, config.num_layers, least=1)


def _bare_stage_problems(config: TransformerConfig) -> Iterator[str]:
    """Of stages that are dealt out well."""
    if not (config.num_moe_experts and _is_pattern(config)):
        return
    stages = expert_layers_per_stage(config)
    if min(stages) == 0:
        yield (
            f"moe_layer_freq={config.moe_layer_freq!r} leaves pipeline stages without experts "
            f"({stages} layers with them by stage): Megatron-Core does not save the optimizer of "
            "such stages beside others; choose fewer stages, or deal the layers out otherwise"
        )


def _expert_problems(config: TransformerConfig) -> Iterator[str]:
    experts, topk = config.num_moe_experts, config.moe_router_topk
    yield from _pattern_problems(config)
    yield from _loss_problems(config)
    if topk > experts:
        yield f"moe_router_topk={topk} must not exceed num_moe_experts={experts}"
    if config.moe_apply_probs_on_input and topk != 1:
        yield f"moe_apply_probs_on_input=True needs moe_router_topk=1, got {topk}; set it to false"
    shards = config.tensor_model_parallel_size * config.expert_model_parallel_size
    if config.moe_token_dispatcher_type == "flex" and shards == 1:
        yield (
            "moe_token_dispatcher_type='flex' needs expert or tensor parallelism; set it to "
            "'alltoall'"
        )
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if not (groups and chosen) or experts % groups or chosen > groups or topk % chosen:
        yield (
            f"moe_router_num_groups={groups} and moe_router_group_topk={chosen} must be given "
            f"together, the first dividing num_moe_experts={experts}, the second at most the first "
            f"and dividing moe_router_topk={topk}"
        )
    elif topk // chosen > experts // groups:
        yield (
            f"moe_router_topk={topk} of moe_router_group_topk={chosen} groups takes more than the "
            f"{experts // groups} experts of each; lower it"
        )
