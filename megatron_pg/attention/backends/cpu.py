"""PyTorch's CPU flash kernels: the path of tests, CI and machines without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import AttentionPass, SpanBatch
from ..resident import accumulation_dtype
from .base import MergingBackend

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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

    def sum_groups(self, grad: Tensor, key_rows: Tensor) -> None:
        """Write a key gradient ``[batch, heads, len, D]`` into its rows, summed over groups."""
        view = self.keys(key_rows)
        if self.grouping == 1:
            view.copy_(grad)
        else:
            torch.sum(grad, dim=1, dtype=key_rows.dtype, out=view[:, 0])


def _calls(attention_pass: AttentionPass, num_heads: int, num_kv_heads: int) -> Iterator[_Call]:
    grouping = num_heads // num_kv_heads
    for spans in attention_pass.span_batches:
        if grouping == 1:
            yield _Call(spans, None, None, 1)
        elif spans.num_spans <= num_kv_heads:
            for span in range(spans.num_spans):
                yield _Call(spans, span, None, grouping)
        else:
            for kv_head in range(num_kv_heads):
                yield _Call(spans, None, kv_head, grouping)


class CpuFlashKernel:
    """Batched calls of the CPU flash kernel over strided views."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_pass: AttentionPass, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
        for call in _calls(attention_pass, q.shape[1], k.shape[1]):
            call_out, call_lse = _flash_forward(
                call.queries(q),
                call.keys(k),
                call.keys(v),
                0.0,
                attention_pass.causal,
                scale=softmax_scale,
            )
            call.queries(out).copy_(call_out)
            call.queries(lse).copy_(call_lse)
        return out, lse.t()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        attention_pass: AttentionPass,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        dq = torch.empty(q.shape, dtype=q.dtype)
        dk, dv = (torch.empty(k.shape, dtype=accumulation_dtype(k.dtype)) for _ in range(2))
        for call in _calls(attention_pass, q.shape[1], k.shape[1]):
            call_dq, call_dk, call_dv = _flash_backward(
                call.queries(dout),
                call.queries(q),
                call.keys(k),
                call.keys(v),
                call.queries(out),
                call.queries(lse.t()),
                0.0,
                attention_pass.causal,
                scale=softmax_scale,
            )
            call.queries(dq).copy_(call_dq)
            call.sum_groups(call_dk, dk)
            call.sum_groups(call_dv, dv)
        return dq, dk, dv


class CpuBackend(MergingBackend):
    """Tree attention on the CPU."""

    name = "cpu"
    kernel = CpuFlashKernel()
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    device_type = "cpu"
