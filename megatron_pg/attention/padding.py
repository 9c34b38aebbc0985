"""A padding token sees itself alone: its output is its own value."""

from __future__ import annotations

from torch import Tensor


def padding_out(v: Tensor, num_heads: int) -> Tensor:
    """``[T, Hq, D]`` output of padding tokens with values ``v [T, Hkv, D]``."""
    return v.repeat_interleave(num_heads // v.shape[1], dim=1)


def padding_dv(dout: Tensor, num_kv_heads: int) -> Tensor:
    """``[T, Hkv, D]`` gradient of padding tokens' values; their queries and keys have none."""
    tokens, num_heads, head_dim = dout.shape
    return dout.reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).sum(2)
