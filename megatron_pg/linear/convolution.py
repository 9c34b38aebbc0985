"""The causal convolution of recurrent layers along every path of a row, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forks import Forks


def forked_convolution(
    x: Tensor,
    forks: Forks,
    convolve: Callable[[Tensor], Tensor],
    history: Tensor | None = None,
) -> Tensor:
    """Equals the convolution of every written-out sample, each shared token convolved once.

    All inputs exist beforehand, so no depth waits for another: every segment stands behind the
    ``width - 1`` inputs before it on its path, and what comes out for those is dropped.

    Args:
        x: ``[total_tokens, channels]`` of the row.
        forks: of the row, made for the width of the convolution.
        convolve: causal, of ``width`` inputs: ``[n, channels] -> [n, channels]``. What stands
            before the first is not read from its output.
        history: ``[roots, width - 1, channels]`` inputs before every root, oldest first, in the
            roots' depth-major order; None for zeros.

    Returns:
        ``[unique_tokens, channels]`` in depth-major order. Gradients of an input sum over all
        segments that read it, in fp32 or wider.
    """
    past = None if history is None else history.flatten(0, 1)
    return convolve(_WithHalos.apply(x, past, forks)).index_select(0, forks.places)


class _WithHalos(torch.autograd.Function):
    """Rows of a convolution's input; their gradients are summed as ``Copies.sums`` does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor | None, forks: Forks) -> Tensor:
        ctx.forks, ctx.past = forks, None if past is None else (past.shape, past.dtype)
        out = x.index_select(0, forks.inputs)
        if past is None:
            return out.index_fill_(0, forks.missing, 0)
        before = past.index_select(0, forks.history).to(x.dtype)
        return out.index_copy_(0, forks.missing, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        forks: Forks = ctx.forks
        dx = grad.new_zeros(forks.total_tokens, grad.shape[1])
        dx.index_copy_(0, forks.tokens, grad.index_select(0, forks.places))
        sums = forks.halos.sums(grad.index_select(0, forks.halo_places))
        n = forks.num_shared_tokens
        shared = forks.halos.sources[:n]
        dx.index_copy_(0, shared, (dx.index_select(0, shared) + sums[:n]).to(grad.dtype))
        if ctx.past is None:
            return dx, None, None
        shape, dtype = ctx.past
        before = forks.halos.sources[n:] - forks.total_tokens
        return dx, sums.new_zeros(shape).index_copy_(0, before, sums[n:]).to(dtype), None
