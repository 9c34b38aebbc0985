"""Latent attention of models that are built here, without what the stock class gets wrong.

``with_prefix_grouped_attention`` leaves a given spec as it is: packed equals stock. A model of our
own computes the same on any number of ranks, and what its configuration says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from ...attention import accumulation_dtype
from ...parallel import ParallelSizes

# Of latents, and the linear layers into which Transformer Engine fuses them.
_NORMS = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")


def with_mended_latent_attention(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The block with every ``MLASelfAttention`` in it mended; state-dict keys stay the same."""

    def mend(layer: Any) -> Any:
        attention = layer.submodules.self_attention
        cls = get_module(attention)
        if not issubclass(cls, MLASelfAttention):
            return layer
        attention = replace(attention, module=mended_latent_attention(cls))
        return replace(layer, submodules=replace(layer.submodules, self_attention=attention))

    return replace(block, layer_specs=[mend(layer) for layer in block.layer_specs or []])


@cache
def mended_latent_attention(cls: type) -> type:
    """Subclass of an ``MLASelfAttention`` class."""
    return type(f"Mended{cls.__name__}", (_MendedLatentAttention, cls), {})


class _MendedLatentAttention(torch.nn.Module):
    config: Any
    tp_group: Any
    q_layernorm: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """As the given class; a norm of which every rank has the whole gradient says so.

        Megatron-Core takes ``q_layernorm`` by its name for a norm of this rank's heads, and sums
        its gradient over the ranks. Under sequence parallelism it must; elsewhere the mean is it.
        """
        super().__init__(config, *args, **kwargs)
        sizes = ParallelSizes.from_config(config)
        if sizes.tp > 1 and not sizes.sp and config.q_lora_rank is not None:
            for parameter in self.q_layernorm.parameters():
                parameter.average_gradients_across_tp_domain = True
        epsilon = getattr(config, "latent_layernorm_epsilon", None)
        for name in _NORMS if epsilon else ():
            norm: Any = getattr(self, name, None)
            if hasattr(norm, "eps"):
                norm.eps = epsilon

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As the given class; the gradient of the key's shared part is that of all heads.

        Every rank has all of the part that heads share, and its own heads. Megatron-Core gathers
        that part by an operation whose backward pass does not sum over ranks, unless it is gathered
        from slices of the sequence.
        """
        query, key, *latents = super().get_query_key_value_tensors(*args, **kwargs)  # type: ignore[misc]
        if self._sums_shared_key and torch.is_grad_enabled():
            key = _SumSharedKey.apply(key, self.config.qk_pos_emb_head_dim, self.tp_group)
        return (query, key, *latents)

    @property
    def _sums_shared_key(self) -> bool:
        sizes, c = ParallelSizes.from_config(self.config), self.config
        down: Any = getattr(self, "linear_qkv_down_proj", None)
        whole = c.kv_lora_rank + c.qk_pos_emb_head_dim
        if down is None:
            down = self.linear_kv_down_proj
        else:
            whole += c.q_lora_rank
        is_whole = down.weight.shape[0] == whole
        return sizes.tp > 1 and not (is_whole and sizes.sp)

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        """As the given class; without a latent of queries they have no norm.

        Core 0.19 has them normed before their projection then, which no model does that has norms
        on the latent of keys and values alone.
        """
        if self.config.q_lora_rank is not None or not self.config.qk_layernorm:
            return super()._resolve_qk_norm_config(submodules)  # type: ignore[misc]
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }


class _SumSharedKey(torch.autograd.Function):
    """Identity on keys ``[..., heads, head_dim]``, of which all heads share the last entries."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, shared_dim: int, group: Any) -> Tensor:
        ctx.shared_dim, ctx.group = shared_dim, group
        return key.view_as(key)

    @staticmethod
    def backward(ctx: Any, dkey: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        shared = dkey[..., -ctx.shared_dim :].sum(-2, dtype=accumulation_dtype(dkey.dtype))
        dist.all_reduce(shared, group=ctx.group)
        # What follows sums over this rank's heads.
        dkey = dkey.clone()
        dkey[..., -ctx.shared_dim :] = 0
        dkey[..., 0, -ctx.shared_dim :] = shared.to(dkey.dtype)
        return dkey, None, None
