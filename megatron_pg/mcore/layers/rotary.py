"""Rotary positions of packed rows, by a table that is made once for all layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from torch import Tensor
from torch.autograd.function import once_differentiable


def turns_by_row(layer: Any, forward: Any, table: Any) -> bool:
    """Whether a layer's queries and keys are turned by its core attention, not by ``forward``.

    Megatron's unfused kernels make cosine and sine of the whole table in every layer, twice. Where
    nothing but they would read the table, the row's own (``RowRotary.cos_and_sin``) takes
    its place: whole heads, turned by halves, not scaled. On the CPU to the same bits.

    Args:
        layer: a self-attention layer.
        forward: of the class that was given.
        table: that it would turn by.
    """
    config = layer.config
    if not isinstance(table, Tensor) or getattr(forward, "__func__", None) is not Attention.forward:
        return False
    is_plain = not (config.apply_rope_fusion or config.rotary_interleaved)
    is_scaled = getattr(config, "yarn_rotary_scaling_factor", None) is not None
    skips = config.no_rope_freq and config.no_rope_freq[layer.layer_number - 1]
    return is_plain and not (is_scaled or skips) and table.shape[-1] == config.kv_channels


def turn_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + (-x2, x1) * sin``, where x1 and x2 are the halves of every head.

    Args:
        x: ``[T, 1, heads, D]`` queries or keys.
        cos: ``[T, 1, 1, D]`` in the dtype of x.
        sin: ``[T, 1, 1, D / 2]``.
    """
    turned: Tensor = _TurnHeads.apply(x, cos, sin)
    return turned


class _TurnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Of the row, which outlives the pass: nothing of a layer is kept.
        ctx.cos_and_sin = cos, sin
        out = x * cos
        (x1, x2), (out1, out2) = x.chunk(2, -1), out.chunk(2, -1)
        _add_product(out1, x2, sin, -1)
        _add_product(out2, x1, sin, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.cos_and_sin
        out = grad * cos
        (grad1, grad2), (out1, out2) = grad.chunk(2, -1), out.chunk(2, -1)
        _add_product(out1, grad2, sin, 1)
        _add_product(out2, grad1, sin, -1)
        return out, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor, sign: int) -> None:
    """``total += sign * a * b``, on CUDA in one kernel, which rounds once."""
    if total.device.type == "cuda":
        total.addcmul_(a, b, value=sign)
    else:
        total.add_(a * b, alpha=sign)
