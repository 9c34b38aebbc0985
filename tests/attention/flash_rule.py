"""FlashAttention's varlen functions written out: their arguments, their mask rule, their lse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class DenseFlashAttention:
    """The functions that the CUDA backends call, dense and on any device and dtype.

    Of n queries and m keys of a sequence, query j sees keys ``j + m - n - left`` to
    ``j + m - n + right``, the bound at the right being 0 where causal and each unbounded where
    negative. A query without keys has out 0 and lse +inf.

    Attributes:
        num_pairs: (q, kv) pairs that forward calls let through, for one head.
        num_calls: of the forward function.
        num_lone: queries of forward calls that saw no key.
    """

    def __init__(self) -> None:
        self.num_pairs = self.num_calls = self.num_lone = 0

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
        """``(out [Tq, Hq, D], lse [Hq, Tq])``."""
        self.num_calls += 1
        out = torch.zeros_like(q)
        lse = q.new_full((q.shape[1], len(q)), torch.inf)
        for a, b, c, d, seen in _sequences(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right):
            self.num_pairs += int(seen.sum())
            self.num_lone += int((~seen.any(1)).sum())
            scores, _ = _scores(q[a:b], k[c:d], scale, softcap, seen)
            weights = scores.softmax(-1).nan_to_num(0.0)
            out[a:b] = torch.einsum("hnm,mhd->nhd", weights, _repeated(v[c:d], q))
            found = scores.logsumexp(-1) if d > c else lse.new_full((q.shape[1], b - a), -torch.inf)
            lse[:, a:b] = found.masked_fill(found == -torch.inf, torch.inf)
        return out, lse

    def backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap
    ):
        """``(dq, dk, dv)`` by the out and lse that are given."""
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (dout * out).sum(-1).t()
        for a, b, c, d, seen in _sequences(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right):
            scores, slope = _scores(q[a:b], k[c:d], scale, softcap, seen)
            weights = (scores - lse[:, a:b, None]).exp()
            dp = torch.einsum("nhd,mhd->hnm", dout[a:b], _repeated(v[c:d], q))
            ds = weights * (dp - delta[:, a:b, None]) * slope * scale
            dq[a:b] = torch.einsum("hnm,mhd->nhd", ds, _repeated(k[c:d], q))
            for total, share in ((dk, (ds, q[a:b])), (dv, (weights, dout[a:b]))):
                grad = torch.einsum("hnm,nhd->mhd", *share)
                total[c:d] = grad.unflatten(1, (k.shape[1], -1)).sum(2)
        return dq, dk, dv

    def aten_forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        """``aten::_flash_attention_forward``."""
        assert dropout == 0 and not debug
        left, right = (-1 if x is None else x for x in (window_size_left, window_size_right))
        lengths = cu_q, cu_k, max_q, max_k
        return *self.forward(q, k, v, *lengths, scale, causal, left, right, 0.0), None, None, None

    def aten_backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *,
        scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        """``aten::_flash_attention_backward``."""
        assert dropout == 0 and lse.is_contiguous()
        left, right = (-1 if x is None else x for x in (window_size_left, window_size_right))
        lengths = cu_q, cu_k, max_q, max_k
        return self.backward(dout, q, k, v, out, lse, *lengths, scale, causal, left, right, 0.0)

    def package_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
    ):  # fmt: skip
        """``flash_attn.flash_attn_interface._flash_attn_varlen_forward`` of 2.7."""
        assert dropout_p == 0
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        left, right = window_size_left, window_size_right
        result = self.forward(q, k, v, *lengths, softmax_scale, causal, left, right, softcap)
        return *result, None, None

    def package_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic,
    ):  # fmt: skip
        """``flash_attn.flash_attn_interface._flash_attn_varlen_backward`` of 2.7."""
        assert dropout_p == 0 and alibi_slopes is None and softmax_lse.is_contiguous()
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        grads = self.backward(
            dout, q, k, v, out, softmax_lse, *lengths, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )  # fmt: skip
        for total, grad in zip((dq, dk, dv), grads):
            total.copy_(grad)


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    left: int,
    right: int,
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Queries, keys and the mask of every sequence that has queries."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0, "one head size"
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    assert int(cu_q.diff().max()) <= max_q and int(cu_k.diff().max()) <= max_k and max_q > 1
    bounds = [cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]]
    for a, b, c, d in zip(*bounds):
        if b > a:
            place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            keys = torch.arange(d - c)[None, :]
            seen = torch.ones(b - a, d - c, dtype=torch.bool)
            if causal or right >= 0:
                seen &= keys <= place + (0 if causal else right)
            if left >= 0:
                seen &= keys >= place - left
            yield a, b, c, d, seen


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(
    q: Tensor, k: Tensor, scale: float, softcap: float, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Masked scores, and their slopes over the products."""
    scores = torch.einsum("nhd,mhd->hnm", q, _repeated(k, q)) * scale
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap).square()
    return scores.masked_fill(~seen, -torch.inf), slope
