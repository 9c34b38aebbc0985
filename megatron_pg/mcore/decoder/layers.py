"""Layers of a ``DecoderConfig``: a spec in, the same spec with what the configuration names out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from .config import DecoderConfig
from .linear import expert_output_linear, post_layernorm_linear
from .norm import norms_over_heads
from .rotary import rotary_by_window


def with_decoder_layers(
    spec: TransformerBlockSubmodules, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Block submodules whose layers have what a ``DecoderConfig`` names beyond their own.

    Equals the given spec for any other configuration, but for local experts with biases, which
    cannot be trained as they are given. Apply it before ``with_prefix_grouped_attention``, and
    ``fit_decoder`` to the model that is built.

    Args:
        spec: with the norm that its layers have as ``layer_norm``.
        config: of the model.
    """
    layers = spec.layer_specs or []
    if config.add_bias_linear and config.num_moe_experts:
        layers = [_with_expert_biases(layer) for layer in layers]
    if isinstance(config, DecoderConfig):
        layers = [_layer(layer, config, spec.layer_norm) for layer in layers]
    return replace(spec, layer_specs=layers)


def _layer(spec: ModuleSpec, config: DecoderConfig, norm: Any) -> ModuleSpec:
    def with_norm(linear: type) -> type:
        return post_layernorm_linear(linear, norm)

    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    if config.window_rotary_base is not None:
        attention = replace(attention, module=rotary_by_window(attention.module))
    if config.has_norms_over_heads:
        attention = replace(attention, module=norms_over_heads(attention.module))
    if config.has_post_layernorms:
        attention = _changed(attention, "linear_proj", with_norm)
        mlp = _changed(mlp, "linear_fc2", with_norm)
    norms: dict[str, Any] = {}
    if not config.has_pre_layernorms:
        norms = dict(input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
        attention = _changed(attention, "linear_qkv", _without_norm)
        mlp = _changed(mlp, "linear_fc1", _without_norm)
    parts = replace(spec.submodules, self_attention=attention, mlp=mlp, **norms)
    return replace(spec, submodules=parts)


def _without_norm(linear: Any) -> Any:
    """Transformer Engine's linear layer that normalises its input, without."""
    is_fused = linear is transformer_engine.TELayerNormColumnParallelLinear
    return transformer_engine.TEColumnParallelLinear if is_fused else linear


def _with_expert_biases(spec: ModuleSpec) -> ModuleSpec:
    def trainable(linear: type) -> type:
        return expert_output_linear(linear) if linear is RowParallelLinear else linear

    mlp = spec.submodules.mlp
    if isinstance(_submodules(mlp), MoESubmodules):
        mlp = _changed(mlp, "experts", lambda experts: _changed(experts, "linear_fc2", trainable))
    return replace(spec, submodules=replace(spec.submodules, mlp=mlp))


def _changed(spec: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """The same spec, one of its submodules changed."""
    parts = _submodules(spec)
    submodules = replace(parts, **{name: change(getattr(parts, name))})
    if isinstance(spec, ModuleSpec):
        return replace(spec, submodules=submodules)
    return partial(spec, submodules=submodules)


def _submodules(spec: Any) -> Any:
    """Of a module's spec, or of what Megatron-Core has in its place since 0.19."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
