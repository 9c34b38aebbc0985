"""What Megatron-Core would refuse, or do otherwise than asked, once the model is built and run."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from ...parallel import ModelSizes, ParallelSizes

_OF_YARN = {
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
}


def megatron_problems(
    config: TransformerConfig, asked: Mapping[str, Any], vpp_size: int | None, use_te: bool
) -> Iterator[str]:
    """Everything that keeps a configuration from being built and trained as it was asked for.

    Args:
        config: as Megatron-Core made it.
        asked: the fields that a user set, by name.
        vpp_size: ``parallel.virtual_pipeline_model_parallel_size``.
        use_te: whether layers are Transformer Engine's.
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
        problems += _stage_problems(config)
    yield from problems or [*_recompute_problems(config), *_bare_stage_problems(config)]
    yield from _width_problems(config)
    if config.multi_latent_attention:
        yield from _latent_problems(config, asked, use_te)
    yield from _kernel_problems(config, use_te)
    if config.num_moe_experts:
        yield from _expert_problems(config)


def layers_per_stage(config: TransformerConfig) -> list[int]:
    """Layers on every pipeline rank, of all its chunks.

    Raises:
        AssertionError: Megatron-Core's, on layers that do not divide.
    """
    return [sum(chunks) for chunks in _layers_per_chunk(config)]


def expert_layers_per_stage(config: TransformerConfig) -> list[int]:
    """Of ``layers_per_stage``, those with experts."""
    if not config.num_moe_experts:
        return [0] * config.pipeline_model_parallel_size
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(number % pattern == 0) for number in range(config.num_layers)]
    chunks, left = _layers_per_chunk(config), iter(pattern)
    counts = [0] * len(chunks)
    # Layers go through the first chunks of all stages, then through the second ones.
    for chunk in range(len(chunks[0])):
        for rank, of_rank in enumerate(chunks):
            counts[rank] += sum(itertools.islice(left, of_rank[chunk]))
    return counts


def _layers_per_chunk(config: TransformerConfig) -> list[list[int]]:
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return [
            [sum(kind == LayerType.decoder for kind in chunk) for chunk in chunks]
            for chunks in layout.layout
        ]
    vpp = config.virtual_pipeline_model_parallel_size
    return [
        [
            get_num_layers_to_build(config, vp_stage=stage if vpp else None, pp_rank=rank)
            for stage in range(vpp or 1)
        ]
        for rank in range(config.pipeline_model_parallel_size)
    ]


def _stage_problems(config: TransformerConfig) -> Iterator[str]:
    """Of layers that are dealt out otherwise than evenly."""
    vpp = config.virtual_pipeline_model_parallel_size or 1
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    set_to = ", ".join(f"{name}={getattr(config, name)!r}" for name in ends)
    try:
        layers = layers_per_stage(config)
    except AssertionError as error:
        yield f"num_layers={config.num_layers}, {set_to}: {error}; choose other pipeline sizes"
        return
    if sum(layers) != config.num_layers or min(layers) < vpp:
        yield (
            f"num_layers={config.num_layers}, {set_to}: pipeline stages of {layers} layers; give "
            "every stage a layer, and all of them together num_layers"
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
    if wrong := [n for chunks in _layers_per_chunk(config) for n in chunks if n % number]:
        yield (
            f"recompute_num_layers={number} with recompute_method='uniform' does not divide the "
            f"{wrong[0]} layers of a stage; choose a divisor, or recompute_method='block'"
        )


def _kernel_problems(config: TransformerConfig, use_te: bool) -> Iterator[str]:
    """What Megatron-Core only finds missing once the model is built or run."""
    if use_te:
        return
    if config.gradient_accumulation_fusion and not _is_there("fused_weight_gradient_mlp_cuda"):
        yield (
            "gradient_accumulation_fusion=True needs Apex or Transformer Engine's layers, this "
            "machine has neither; set it to false"
        )
    if config.moe_grouped_gemm:
        yield "moe_grouped_gemm=True needs Transformer Engine's layers; leave it out"
    if _is_there("transformer_engine"):
        return
    needing = {"moe_router_fusion": config.moe_router_fusion}
    if config.recompute_granularity == "selective":
        needing |= {
            f"recompute_modules={name!r}": name in config.recompute_modules
            for name in ("layernorm", "moe_act")
        }
    for name in [name for name, is_on in needing.items() if is_on]:
        yield f"{name} needs Transformer Engine, which is not installed; leave it out"


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
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        return pattern >= 1
    return len(pattern) == config.num_layers and set(pattern) <= {0, 1} and 1 in pattern


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


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


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
