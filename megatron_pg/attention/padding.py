"""Padding: tokens that see themselves alone, and zeros that make heads equally large."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def pad_heads(*tensors: Tensor) -> list[Tensor]:
    """``[T, H, D]`` tensors with zeros up to their largest D, for kernels that know one head size.

    Zeros of queries and keys add nothing to a score, and those of values come out as zeros.
    """
    head_dim = max(x.shape[2] for x in tensors)
    return [x if x.shape[2] == head_dim else pad(x, (0, head_dim - x.shape[2])) for x in tensors]


def padding_out(v: Tensor, num_heads: int) -> Tensor:
    """``[T, Hq, Dv]``: the output of padding tokens is their values ``v [T, Hkv, Dv]``."""
    return v.repeat_interleave(num_heads // v.shape[1], dim=1)


def padding_dv(dout: Tensor, num_kv_heads: int) -> Tensor:
    """``[T, Hkv, Dv]`` gradient of padding tokens' values; their queries and keys have none."""
    tokens, num_heads, head_dim = dout.shape
    return dout.reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).sum(2)
