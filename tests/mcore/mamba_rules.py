"""Mamba-2 as mamba_ssm defines it, token by token, in the place of its fused kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    headdim: int,
    ngroups: int,
    **rest: Any,
) -> Tensor:
    """Of ordinary batches ``[batch, tokens, channels]``."""
    assert rest["activation"] == "silu" and not rest["norm_before_gate"]
    assert rest["seq_idx"] is None
    heads, width = len(A), conv1d_weight.shape[1]
    channels = len(conv1d_weight)
    z, xbc, dt = zxbcdt.split([heads * headdim, channels, heads], -1)
    padded = functional.pad(xbc, (0, 0, width - 1, 0))
    windows = padded.unfold(1, width, 1)  # [batch, tokens, channels, width]
    xbc = functional.silu((windows * conv1d_weight).sum(-1) + conv1d_bias)
    state_dim = (channels - heads * headdim) // (2 * ngroups)
    x, b, c = xbc.split([heads * headdim, *[ngroups * state_dim] * 2], -1)
    state = x.new_zeros(len(x), heads, headdim, state_dim)
    outs = []
    for t in range(x.shape[1]):
        step = functional.softplus(dt[:, t] + dt_bias)[..., None, None]
        now = x[:, t].unflatten(-1, (heads, headdim))
        write, read = (
            y[:, t].unflatten(-1, (ngroups, state_dim)).repeat_interleave(heads // ngroups, 1)
            for y in (b, c)
        )
        state = (step * A[:, None, None]).exp() * state + step * now[..., None] * write[:, :, None]
        out = (state * read[:, :, None]).sum(-1) + D[:, None] * now
        outs.append(out.flatten(1))
    return torch.stack(outs, 1) * functional.silu(z)


@contextmanager
def step_by_step() -> Iterator[None]:
    """Stock Mamba-2 layers run ``split_conv1d_scan``, which shares no line with ours."""
    from megatron.core.ssm import mamba_mixer

    name = "mamba_split_conv1d_scan_combined"
    with mock.patch.object(mamba_mixer, name, split_conv1d_scan):
        yield
