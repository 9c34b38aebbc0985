"""Queries and keys that are normalised over all of their heads together."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class NormOverHeads(torch.nn.Module):
    """RMS norm of ``[..., heads, head_dim]`` over both, and over the heads of all ranks.

    Args:
        num_heads: of this tensor-parallel rank, which has the weights of its own.
        head_dim: width of one.
        config: of the model.
        group: the tensor-parallel ranks.
    """

    def __init__(self, num_heads: int, head_dim: int, config: Any, group: Any) -> None:
        super().__init__()
        self.shape, self.group, self.eps = (num_heads, head_dim), group, config.layernorm_epsilon
        self.weight = torch.nn.Parameter(
            torch.ones(num_heads * head_dim, dtype=config.params_dtype)
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            squares = _Sum.apply(squares, self.group)
        mean = squares / (self.weight.numel() * self.group.size())
        normed: Tensor = wide * (mean + self.eps).rsqrt() * self.weight.view(self.shape)
        return normed.to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Weights cut over ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class _Sum(torch.autograd.Function):
    """Sum over ranks, each of which computes with it: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dx = dtotal.clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _NormsOverHeads(torch.nn.Module):
    """Mixin over a ``SelfAttention`` class."""

    config: Any
    pg_collection: Any
    num_attention_heads_per_partition: int
    num_query_groups_per_partition: int

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        group = self.pg_collection.tp
        if config.num_query_groups % group.size():
            raise ValueError(
                f"has_norms_over_heads=True: num_query_groups={config.num_query_groups} must be a "
                f"multiple of tensor_model_parallel_size={group.size()}; choose a smaller one"
            )
        rest = config.kv_channels, config, group
        self.q_layernorm = NormOverHeads(self.num_attention_heads_per_partition, *rest)
        self.k_layernorm = NormOverHeads(self.num_query_groups_per_partition, *rest)


@cache
def norms_over_heads(cls: type) -> type:
    """Subclass of a ``SelfAttention`` class that normalises over all heads together."""
    return type(f"{cls.__name__}NormsOverHeads", (_NormsOverHeads, cls), {})
