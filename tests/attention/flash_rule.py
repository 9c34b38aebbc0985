"""FlashAttention's varlen functions written out: their arguments, their mask rule, their lse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
        num_unused: query rows that sequences of forward calls left out.
    """

    def __init__(self) -> None:
        self.num_pairs = self.num_calls = self.num_lone = self.num_unused = 0

    def forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap,
        used_q=None, used_k=None,
    ):  # fmt: skip
        """``(out [Tq, Hq, Dv], lse [Hq, Tq])``, lse in fp32 for 16-bit types."""
        if q.dtype.itemsize < 4:
            lengths = cu_q, cu_k, max_q, max_k
            given = *lengths, scale, causal, left, right, softcap, used_q, used_k
            out, lse = self.forward(q.float(), k.float(), v.float(), *given)
            return out.to(q.dtype), lse
        self.num_calls += 1
        out = v.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full((q.shape[1], len(q)), torch.inf)
        lengths = cu_q, cu_k, max_q, max_k, used_q, used_k
        for a, b, c, d, seen in _sequences(q, k, v, *lengths, causal, left, right):
            self.num_pairs += int(seen.sum())
            self.num_lone += int((~seen.any(1)).sum())
            scores, _ = _scores(q[a:b], k[c:d], scale, softcap, seen)
            weights = scores.softmax(-1).nan_to_num(0.0)
            out[a:b] = torch.einsum("hnm,mhd->nhd", weights, _repeated(v[c:d], q))
            found = scores.logsumexp(-1) if d > c else lse.new_full((q.shape[1], b - a), -torch.inf)
            lse[:, a:b] = found.masked_fill(found == -torch.inf, torch.inf)
        return out, lse

    def backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right,
        softcap, used_q=None, used_k=None,
    ):  # fmt: skip
        """``(dq, dk, dv)`` by the out and lse that are given."""
        if q.dtype.itemsize < 4:
            lengths = cu_q, cu_k, max_q, max_k
            given = lse, *lengths, scale, causal, left, right, softcap, used_q, used_k
            wide = (x.float() for x in (dout, q, k, v, out))
            return tuple(x.to(q.dtype) for x in self.backward(*wide, *given))
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (dout * out).sum(-1).t()
        lengths = cu_q, cu_k, max_q, max_k, used_q, used_k
        for a, b, c, d, seen in _sequences(q, k, v, *lengths, causal, left, right):
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
        window_size_left=None, window_size_right=None, num_splits=None,
    ):  # fmt: skip
        """``aten::_flash_attention_forward``."""
        assert dropout == 0 and not debug and num_splits == (1 if TAKES_NUM_SPLITS else None)
        _check_flash2(q, k, v, max_q)
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
        _check_flash2(q, k, v, max_seqlen_q)
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

    def flash3_forward(self, q, k, v, *others):
        """``flash_attn_3::fwd``; what it leaves unwritten is NaN."""
        given = _flash3_given("fwd", 3, others)
        lengths, used, scores = _flash3_arguments(given)
        assert given.pop("num_splits") == 1 and not any(given.values()), given
        _check_flash3_sizes(q, k, v)
        out, lse = self.forward(q, k, v, *lengths, *scores, *used)
        unused = _unused_rows(len(q), lengths[0], used[0])
        self.num_unused += int(unused.sum())
        out[unused], lse[:, unused] = torch.nan, torch.nan
        return out, lse, q.new_empty(0), q.new_empty(0)

    def flash3_backward(self, dout, q, k, v, out, softmax_lse, dq, dk, dv, *others):
        """``flash_attn_3::bwd``."""
        given = _flash3_given("bwd", 9, others)
        lengths, used, scores = _flash3_arguments(given)
        assert given.pop("deterministic") is torch.are_deterministic_algorithms_enabled()
        assert not any(given.values()) and softmax_lse.is_contiguous()
        _check_flash3_sizes(q, k, v)
        grads = self.backward(dout, q, k, v, out, softmax_lse, *lengths, *scores, *used)
        unused = [_unused_rows(len(x), cu, n) for x, cu, n in zip((q, k), lengths, used)]
        for total, grad, rows in zip((dq, dk, dv), grads, (unused[0], unused[1], unused[1])):
            total.copy_(grad)
            total[rows] = torch.nan
        return tuple(q.new_empty(0) for _ in range(5))


TAKES_NUM_SPLITS = "num_splits" in str(torch.ops.aten._flash_attention_forward.default._schema)

FLASH3_SCHEMAS = {
    "fwd": """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None,
        Tensor(v_new!)? v_new = None, Tensor? q_v = None, Tensor(out!)? out = None,
        Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None,
        Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
        int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None,
        Tensor? leftpad_k = None, Tensor? rotary_cos = None, Tensor? rotary_sin = None,
        Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None,
        Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
        int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0,
        float softcap = 0.0, bool is_rotary_interleaved = False,
        Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None,
        int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)""",
    "bwd": """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
        Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None,
        Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? seqused_q = None,
        Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None,
        float? softmax_scale = None, bool is_causal = False, int window_size_left = -1,
        int window_size_right = -1, float softcap = 0.0, bool deterministic = False,
        int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)""",
}


def _flash3_given(name: str, first: int, values: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by name; the dispatcher drops defaults at the end."""
    arguments = torch._C.parse_schema(FLASH3_SCHEMAS[name]).arguments[first:]
    defaults = {argument.name: argument.default_value for argument in arguments}
    return defaults | dict(zip(defaults, values))


def _flash3_arguments(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Lengths, used lengths and scores, taken out of what was given."""
    lengths = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    scores = "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap"
    used = "seqused_q", "seqused_k"
    return tuple([given.pop(name) for name in names] for names in (lengths, used, scores))


def _unused_rows(num_rows: int, cu: Tensor, used: Tensor | None) -> Tensor:
    """Rows that no sequence uses."""
    unused = torch.ones(num_rows, dtype=torch.bool)
    starts = cu.tolist()
    for i, start in enumerate(starts[:-1]):
        unused[start : starts[i + 1] if used is None else start + int(used[i])] = False
    return unused


def _check_flash2(q: Tensor, k: Tensor, v: Tensor, max_q: int) -> None:
    _check_one_size(q, k, v)
    # 1 means decoding: a query in every sequence.
    assert max_q > 1


def _check_one_size(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0, "one head size"


def _check_flash3_sizes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[2] == v.shape[2]:
        return _check_one_size(q, k, v)
    assert q.shape[2] == k.shape[2] and q.shape[2] % 8 == v.shape[2] % 8 == 0
    assert 128 < q.shape[2] <= 192 and 96 < v.shape[2] <= 128


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    used_q: Tensor | None,
    used_k: Tensor | None,
    causal: bool,
    left: int,
    right: int,
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Queries, keys and the mask of every sequence that has queries."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    lens = [cu.diff() if n is None else n for cu, n in ((cu_q, used_q), (cu_k, used_k))]
    assert all((n <= cu.diff()).all() for cu, n in ((cu_q, lens[0]), (cu_k, lens[1])))
    assert all(n.dtype == torch.int32 and n.is_contiguous() for n in lens)
    assert int(lens[0].max()) <= max_q and int(lens[1].max()) <= max_k
    starts_and_lens = (cu_q.tolist(), lens[0].tolist(), cu_k.tolist(), lens[1].tolist())
    for a, num_q, c, num_k in zip(*starts_and_lens):
        b, d = a + num_q, c + num_k
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
