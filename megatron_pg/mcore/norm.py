"""Norms that know sequence parallelism, for machines without Apex and Transformer Engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose gradient Megatron sums over the sequence-parallel ranks.

    Takes the arguments with which Megatron-Core builds norms. Under
    ``layernorm_zero_centered_gamma`` it multiplies by one plus the weight, in fp32 or wider.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        if self.is_zero_centered:
            torch.nn.init.zeros_(self.weight)
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` over its root mean square, weighted."""
        if not self.is_zero_centered:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + self.weight.to(wide)
        return functional.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose gradients Megatron sums over the sequence-parallel ranks.

    Takes the arguments with which Megatron-Core builds norms. Under
    ``layernorm_zero_centered_gamma`` it multiplies by one plus the weight, in fp32 or wider.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        if self.is_zero_centered:
            torch.nn.init.zeros_(self.weight)
        mark_sequence_parallel(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of mean 0 and variance 1, weighted and moved."""
        if not self.is_zero_centered:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = 1.0 + self.weight.to(wide), self.bias.to(wide)
        normed = functional.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)
        return normed.to(x.dtype)


def norm_class(config: TransformerConfig) -> type[torch.nn.Module]:
    """The norm of these that ``config.normalization`` names.

    Raises:
        ValueError: if it is neither "RMSNorm" nor "LayerNorm".
    """
    norms = {"RMSNorm": SequenceParallelRMSNorm, "LayerNorm": SequenceParallelLayerNorm}
    if config.normalization not in norms:
        raise ValueError(f"normalization={config.normalization!r}: use 'RMSNorm' or 'LayerNorm'")
    return norms[config.normalization]


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Mark parameters that see a slice of the sequence on each tensor-parallel rank."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def with_sequence_parallel_norms(
    spec: ModuleSpec | TransformerBlockSubmodules,
    config: TransformerConfig,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Block submodules of a local spec with norms that allow sequence parallelism.

    Without Apex or Transformer Engine, Megatron-Core's own norm refuses sequence parallelism.
    State-dict keys stay the same.

    Args:
        spec: of the layer that all are alike, as ``get_gpt_layer_local_spec`` returns it, or of
            this stage's block, as ``get_gpt_decoder_block_spec`` does.
        config: decides RMSNorm or LayerNorm, and the number of layers alike.
        vp_stage: the virtual pipeline stage of an interleaved schedule.

    Raises:
        ValueError: if ``config.normalization`` is neither "RMSNorm" nor "LayerNorm".
    """
    norm = norm_class(config)
    if isinstance(spec, ModuleSpec):
        layers = [spec] * get_num_layers_to_build(config, vp_stage=vp_stage)
    else:
        layers = spec.layer_specs or []
    return TransformerBlockSubmodules(
        layer_specs=[_with_norms(layer, norm, config.qk_layernorm) for layer in layers],
        layer_norm=norm,
    )


def _with_norms(spec: ModuleSpec, norm: type, has_qk_norms: bool) -> ModuleSpec:
    layer = spec.submodules
    attention = layer.self_attention
    qk_norms = ("q_layernorm", "k_layernorm", "kv_layernorm") if has_qk_norms else ()
    own_norms = {
        name: norm
        for name in (*qk_norms, "out_norm")
        if getattr(attention.submodules, name, None) not in (None, IdentityOp)
    }
    attention = replace(attention, submodules=replace(attention.submodules, **own_norms))
    layer = replace(layer, input_layernorm=norm, pre_mlp_layernorm=norm, self_attention=attention)
    return replace(spec, submodules=layer)
