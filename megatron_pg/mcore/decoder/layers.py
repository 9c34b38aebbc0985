"""Layers of a ``DecoderConfig``: a spec in, the same spec with what the configuration names out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from .config import DecoderConfig
from .linear import post_layernorm_linear
from .rotary import rotary_by_window


def with_decoder_layers(
    spec: TransformerBlockSubmodules, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Block submodules whose layers have what a ``DecoderConfig`` names beyond their own.

    Equals the given spec for any other configuration. Apply it before
    ``with_prefix_grouped_attention``, and ``fit_decoder`` to the model that is built.

    Args:
        spec: with the norm that its layers have as ``layer_norm``.
        config: of the model.
    """
    if not isinstance(config, DecoderConfig):
        return spec
    layers = [_layer(layer, config, spec.layer_norm) for layer in spec.layer_specs or []]
    return replace(spec, layer_specs=layers)


def _layer(spec: ModuleSpec, config: DecoderConfig, norm: Any) -> ModuleSpec:
    layer = spec.submodules
    attention, mlp = layer.self_attention, layer.mlp
    if config.window_rotary_base is not None:
        attention = replace(attention, module=rotary_by_window(attention.module))
    if config.has_post_layernorms:
        attention = _with_post_layernorm(attention, "linear_proj", norm)
        mlp = _with_post_layernorm(mlp, "linear_fc2", norm)
    return replace(spec, submodules=replace(layer, self_attention=attention, mlp=mlp))


def _with_post_layernorm(spec: Any, name: str, norm: Any) -> Any:
    """The linear layer of that name normalises its output."""
    is_partial = isinstance(spec, partial)
    submodules = spec.keywords["submodules"] if is_partial else spec.submodules
    linear = post_layernorm_linear(getattr(submodules, name), norm)
    submodules = replace(submodules, **{name: linear})
    return (
        partial(spec, submodules=submodules) if is_partial else replace(spec, submodules=submodules)
    )
