"""A sink: a logit for each head that takes weight and has no value."""

from __future__ import annotations

import torch
from torch import Tensor

from .resident import accumulation_dtype


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> None:
    """Add a sink to a running result, in place.

    Equals one more key with score ``sink`` and value 0. Once, after all keys have been met:
    passes whose backward reads the new out and lse are exact as they are.

    Args:
        out: ``[T, H, D]`` in the accumulation dtype.
        lse: ``[H, T]`` natural.
        sink: ``[H]``.
    """
    total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    out *= (lse - total).exp().t().unsqueeze(-1)
    lse.copy_(total)


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """``[H]``: ``-sum_q exp(sink - lse_q) * (dout_q . out_q)``, summed in fp32 or wider.

    Args:
        dout: ``[T, H, D]`` gradient of the output, without padding tokens.
        out: ``[T, H, D]`` the output with the sink in it.
        lse: ``[H, T]`` with the sink in it.
        sink: ``[H]``.
    """
    dtype = accumulation_dtype(out.dtype)
    weights = (sink.to(lse.dtype)[:, None] - lse).exp().to(dtype)
    deltas = (dout.to(dtype) * out).sum(-1)
    return -(weights * deltas.t()).sum(1).to(sink.dtype)
