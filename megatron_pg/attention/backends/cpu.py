"""PyTorch's CPU flash kernels: any CPU, any floating-point type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kinds import Scores
from ..plan import AttentionPass
from ..resident import accumulation_dtype
from .base import MergingBackend
from .cpu_spans import (
    SpanBatch,
    span_batches,
    split_causal_pass,
    split_windowed_pass,
    window_mask,
)

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Where the masks of longer ones would no longer stay in a cache.
_MAX_WINDOW_BLOCK = 256

# ``Tensor.copy_`` or ``Tensor.add_``.
Put = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Call:
    """One kernel call: its views are ``[batch, heads, len, D]`` without a copy.

    The kernel wants as many key heads as query heads. With grouped heads, the batch dim walks
    either over spans (one key head) or over key heads (one span), and the key heads' stride is 0
    over the query heads of a group.
    """

    spans: SpanBatch
    span: int | None  # this span alone, or all
    kv_head: int | None  # this key head alone, or all
    grouping: int  # query heads per key head

    def queries(self, x: Tensor) -> Tensor:
        """View of ``[Tq, Hq, D]`` (or ``[Tq, Hq]``) rows."""
        s = self.spans
        return self._view(x, s.q_start, s.q_step, s.q_len, self.grouping, 1)

    def keys(self, x: Tensor) -> Tensor:
        """View of ``[Tkv, Hkv, D]`` rows, key heads repeated over their group by stride 0."""
        s = self.spans
        return self._view(x, s.kv_start, s.kv_step, s.kv_len, 1, 0)

    def _view(
        self, x: Tensor, start: int, step: int, length: int, heads: int, head_stride: int
    ) -> Tensor:
        row, head = x.stride(0), x.stride(1)
        offset = x.storage_offset() + (start + (self.span or 0) * step) * row
        offset += (self.kv_head or 0) * heads * head
        if self.grouping == 1:
            sizes = [self.spans.num_spans, x.shape[1]]
            strides = [step * row, head]
        elif self.span is not None:
            sizes = [x.shape[1] // heads, self.grouping]
            strides = [heads * head, head_stride * head]
        else:
            sizes = [self.spans.num_spans, self.grouping]
            strides = [step * row, head_stride * head]
        tail = list(x.shape[2:]), list(x.stride()[2:])
        return x.as_strided([*sizes, length, *tail[0]], [*strides, row, *tail[1]], offset)

    def rows_of(self, x: Tensor, num_rows: int) -> Tensor | None:
        """A result ``[batch, heads, len, ...]`` as rows, uncopied, if it holds all rows there are.

        Spans ascend and do not overlap, so as many rows are all of them in their order. The keys
        of several spans of a window may overlap.
        """
        overlaps = len(list(self.spans.pieces())) > 1
        if self.grouping > 1 or overlaps or x.shape[0] * x.shape[2] != num_rows:
            return None
        rows = x.transpose(1, 2)
        return rows.flatten(0, 1) if rows.is_contiguous() else None

    def put_key_grad(self, put: Put, total: Tensor, grad: Tensor) -> None:
        """Put a key gradient ``[batch, heads, len, D]`` into its rows, summed over groups."""
        rows = self.keys(total)
        if self.grouping > 1:
            rows, grad = rows[:, :1], grad.sum(dim=1, keepdim=True, dtype=total.dtype)
        for piece in self.spans.pieces():
            put(rows[:, :, piece], grad[:, :, piece])

    def mask(self, part: SpanPart, dtype: torch.dtype) -> Tensor | None:
        """What the kernel adds to the scores of a span."""
        if part.window is None or part.mask is None:
            return None
        n, m = self.spans.q_len, self.spans.kv_len
        # The kernel takes fp32 beside 16-bit types.
        return part.mask[:n, part.window + n - m : part.window + n].to(accumulation_dtype(dtype))


@dataclass(frozen=True, eq=False)
class SpanPart:
    """Batches that are all causal, all not, or blocks of a window.

    Attributes:
        causal: as in ``AttentionPass``.
        batches: of spans; those of a window share keys.
        window: as in ``AttentionPass``.
        mask: ``window_mask`` of the longest block of a window.
    """

    causal: bool
    batches: tuple[SpanBatch, ...]
    window: int | None = None
    mask: Tensor | None = None

    def calls(self, num_heads: int, num_kv_heads: int) -> Iterator[_Call]:
        """As few calls as the heads allow."""
        grouping = num_heads // num_kv_heads
        for spans in self.batches:
            if grouping == 1:
                yield _Call(spans, None, None, 1)
            elif spans.num_spans <= num_kv_heads:
                for span in range(spans.num_spans):
                    yield _Call(spans, span, None, grouping)
            else:
                for kv_head in range(num_kv_heads):
                    yield _Call(spans, None, kv_head, grouping)


def _ordered(
    parts: Sequence[SpanPart], num_heads: int, num_kv_heads: int
) -> Iterator[tuple[SpanPart, Put, _Call]]:
    """Calls in order: those of the first part write their rows, later ones add to them."""
    put: Put = Tensor.copy_
    for part in parts:
        for call in part.calls(num_heads, num_kv_heads):
            yield part, put, call
        put = Tensor.add_


def _first_rows(
    call: _Call, results: Sequence[Tensor], rows: Sequence[Tensor]
) -> tuple[list[Tensor], bool]:
    """What all calls write to, shaped like ``rows``; True if the first call's results are it."""
    dtype = accumulation_dtype(rows[0].dtype)
    made = [call.rows_of(x, len(like)) for x, like in zip(results, rows)]
    if all(x is not None and x.dtype == dtype for x in made):
        return [x for x in made if x is not None], True
    return [torch.zeros(like.shape, dtype=dtype) for like in rows], False


def _restore_nan(out: Tensor, lse: Tensor, queries: Tensor, keys: Tensor) -> None:
    """Undo what the kernel does to a query without finite scores: ``out = 0``, ``lse`` 0 or inf."""
    # Neither 0 nor inf among them, asked in the fewest operations.
    if math.isfinite(lse.reciprocal().add_(lse).sum().item()):
        return
    unsound = ~queries.isfinite().all(-1) | ~keys.isfinite().all(-1).all(-1, keepdim=True)
    lost = unsound & ((lse == 0) | lse.isinf())
    out.masked_fill_(lost.unsqueeze(-1), torch.nan)
    lse.masked_fill_(lost, torch.nan)


class CpuBackend(MergingBackend):
    """Tree attention on the CPU: batched calls of its flash kernel over strided views.

    The kernel computes 512 keys at a time and then masks what a causal span hides: half of the
    pairs of a span of up to 512 tokens, a quarter at 1,024. So causal passes are split, since
    rectangles have nothing to hide.

    Args:
        min_causal_block: shortest block that a causal span is split into. Below it, merging and
            calls cost more than the pairs that a split saves.
        min_window_block: shortest block of queries under a window, for the same reason.
    """

    name = "cpu"
    features = MergingBackend.features | {"window"}
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    device_type = "cpu"

    def __init__(self, min_causal_block: int = 128, min_window_block: int = 32) -> None:
        self._min_causal_block = min_causal_block
        self._min_window_block = min_window_block

    def arguments(
        self, attention_pass: AttentionPass, device: torch.device
    ) -> tuple[SpanPart, ...]:
        """See ``VarlenKernel``."""
        window = attention_pass.window
        if window is not None:
            # Of the keys of a block of a quarter of the window, four in five are seen.
            size = min(max(window // 4, self._min_window_block), _MAX_WINDOW_BLOCK)
            blocks = span_batches(split_windowed_pass(attention_pass, size))
            return (SpanPart(False, blocks, window, window_mask(size, window)),)
        parts: tuple[AttentionPass, ...] = (attention_pass,)
        if attention_pass.causal:
            parts = split_causal_pass(attention_pass, self._min_causal_block)
        return tuple(SpanPart(part.causal, span_batches(part)) for part in parts)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: Sequence[SpanPart], scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        out: Tensor | None = None
        for part, put, call in _ordered(arguments, q.shape[1], k.shape[1]):
            queries, keys, mask = call.queries(q), call.keys(k), call.mask(part, q.dtype)
            call_out, call_lse = _flash_forward(
                queries, keys, call.keys(v), 0.0, part.causal, attn_mask=mask, scale=scores.scale
            )
            _restore_nan(call_out, call_lse, queries, keys)
            if out is None:
                (out, lse), are_filled = _first_rows(call, (call_out, call_lse), (q, q[..., 0]))
                if are_filled:
                    continue
            rows, rows_lse = call.queries(out), call.queries(lse)
            if put is Tensor.add_:
                # As ``merge_out_lse``, on views of the rows.
                weight = torch.sigmoid(call_lse - rows_lse).unsqueeze(-1)
                rows.lerp_(call_out.to(rows.dtype), weight)
                torch.logaddexp(rows_lse, call_lse, out=rows_lse)
            else:
                rows.copy_(call_out)
                rows_lse.copy_(call_lse)
        assert out is not None, "a pass has at least one span"
        return out, lse.t()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        arguments: Sequence[SpanPart],
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        dq: Tensor | None = None
        for part, put, call in _ordered(arguments, q.shape[1], k.shape[1]):
            call_dq, call_dk, call_dv = _flash_backward(
                call.queries(dout),
                call.queries(q),
                call.keys(k),
                call.keys(v),
                call.queries(out),
                call.queries(lse.t()),
                0.0,
                part.causal,
                attn_mask=call.mask(part, q.dtype),
                scale=scores.scale,
            )
            if dq is None:
                grads = call_dq, call_dk, call_dv
                (dq, dk, dv), are_filled = _first_rows(call, grads, (q, k, v))
                if are_filled:
                    continue
            put(call.queries(dq), call_dq)
            # Blocks of a window share keys.
            put_keys = put if part.window is None else Tensor.add_
            call.put_key_grad(put_keys, dk, call_dk)
            call.put_key_grad(put_keys, dv, call_dv)
        assert dq is not None, "a pass has at least one span"
        return dq, dk, dv
