"""Layers with linear attention in a spec of local modules."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


def with_local_linear_layers(
    spec: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Block submodules whose layers of ``linear_attention_freq`` have a ``GatedDeltaNet``.

    As ``get_transformer_block_with_experimental_attention_variant_spec``, which Megatron-Core has
    for Transformer Engine alone. Apply it before ``with_prefix_grouped_attention``. A
    configuration without linear attention gets the given spec.

    Args:
        spec: this stage's layers, of local modules.
        config: of the model.
        vp_stage: the virtual pipeline stage of an interleaved schedule.
    """
    if config.experimental_attention_variant != "gated_delta_net":
        return spec
    pattern = get_linear_attention_pattern(config)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = spec.layer_specs or []
    is_linear = pattern[first : first + len(layers)]
    made = [_linear(layer) if linear else layer for layer, linear in zip(layers, is_linear)]
    return replace(spec, layer_specs=made)


def decoder_block_spec(
    config: TransformerConfig, *, use_te: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Block submodules of the layers that a configuration names, as Megatron-Core has them.

    Its own function for a decoder leaves linear attention out, and that for linear attention knows
    Transformer Engine alone.

    Args:
        config: of the model.
        use_te: layers of Transformer Engine; local ones otherwise.
        vp_stage: the virtual pipeline stage of an interleaved schedule.
    """
    if use_te and config.experimental_attention_variant == "gated_delta_net":
        return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage)
    # It refuses such a configuration since core 0.19.
    plain = copy(config)
    plain.experimental_attention_variant = None
    spec = get_gpt_decoder_block_spec(
        plain,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return with_local_linear_layers(spec, config, vp_stage)


def local_gated_delta(norm: Any) -> ModuleSpec:
    """A ``GatedDeltaNet`` of local modules, with this class of norm behind its scan."""
    parts = GatedDeltaNetSubmodules(ColumnParallelLinear, norm, RowParallelLinear)
    return ModuleSpec(GatedDeltaNet, submodules=parts)


def _linear(layer: ModuleSpec) -> ModuleSpec:
    attention = local_gated_delta(layer.submodules.input_layernorm)
    # Checkpoints have the norm as Transformer Engine does, which fuses it into what follows.
    keys = layer.submodules.sharded_state_dict_keys_map | {
        "input_layernorm.": "self_attention.in_proj.layer_norm_"
    }
    parts = dict(self_attention=attention, sharded_state_dict_keys_map=keys)
    return replace(layer, submodules=replace(layer.submodules, **parts))
