"""Tree attention out of any varlen kernel: merge of the passes and their exact backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_passes import (
    KernelPass,
    KernelPasses,
    VarlenKernel,
    keys_and_values,
    scatter_gradients,
)
from .kernels import MergeFunctions, PassGrads, PassOut, merge_functions
from .kinds import Scores
from .padding import pad_heads, padding_dv, padding_out
from .resident import ResidentKV, accumulation_dtype
from .sink import sink_gradient


class LseMergeAttention(torch.autograd.Function):
    """``out = attention of every sample over its own path``, by the passes of a plan."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        row: KernelPasses,
        kernel: VarlenKernel,
        scores: Scores,
        resident: Sequence[ResidentKV],
    ) -> Tensor:
        # Kernels read a head's numbers side by side.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        tokens = row.unique_tokens

        def attend(p: KernelPass) -> tuple[Tensor, Tensor]:
            pass_k, pass_v = keys_and_values(k, v, p, resident)
            qkv = q[p.queries], pass_k[p.keys], pass_v[p.keys]
            return _run_forward(kernel, *qkv, p.arguments, scores)

        out, lse = _merged(attend, row.passes, sink, merge_functions(q.device))
        out = out.to(q.dtype)
        if tokens < len(q):
            out[tokens:] = padding_out(v[tokens:], q.shape[1])
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.row, ctx.kernel, ctx.scores = row, kernel, scores
        ctx.resident = resident
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        row: KernelPasses = ctx.row
        tokens = row.unique_tokens
        if dout.stride(-1) != 1:
            dout = dout.contiguous()

        def shares(p: KernelPass) -> tuple[Tensor, Tensor, Tensor]:
            rows = p.queries
            pass_k, pass_v = keys_and_values(k, v, p, ctx.resident)
            return _run_backward(
                ctx.kernel, dout[rows], q[rows], pass_k[p.keys], pass_v[p.keys], out[rows],
                lse[:, rows], p.arguments, ctx.scores,
            )  # fmt: skip

        dq, dk, dv = _summed(shares, row, ctx.resident, merge_functions(q.device))
        grads = [grad.to(q.dtype) for grad in (dq, dk, dv)]
        if tokens < len(q):
            grads[0][tokens:], grads[1][tokens:] = 0, 0
            grads[2][tokens:] = padding_dv(dout[tokens:], v.shape[1])
        dsink = None
        if ctx.needs_input_grad[3]:
            dsink = sink_gradient(dout[:tokens], out[:tokens], lse[:, :tokens], sink)
        return (*grads, dsink, None, None, None, None)


def _batches(passes: Sequence[KernelPass], size: int) -> list[Sequence[KernelPass]]:
    return [passes[i : i + size] for i in range(0, len(passes), size)]


def _merged(
    attend: Callable[[KernelPass], tuple[Tensor, Tensor]],
    passes: Sequence[KernelPass],
    sink: Tensor | None,
    merge: MergeFunctions,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over all passes and the sink; in the first pass's memory where that will do.

    What is written more than once is kept in the accumulation dtype meanwhile.
    """
    out, lse = attend(passes[0])
    batches = _batches(passes[1:], merge.MAX_PASSES)
    if sink is not None and not batches:
        batches = [()]
    if len(batches) > 1:
        out = out.to(accumulation_dtype(out.dtype))
    for number, batch in enumerate(batches, 1):
        outs = [PassOut(p.queries, p.q_rows, *attend(p)) for p in batch]
        merge.merge_out_lse(out, lse, outs, sink if number == len(batches) else None)
    return out, lse


def _summed(
    shares: Callable[[KernelPass], tuple[Tensor, Tensor, Tensor]],
    row: KernelPasses,
    resident: Sequence[ResidentKV],
    merge: MergeFunctions,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of the row, summed over passes as ``_merged`` does; adds to ``resident``."""
    first, *others = row.passes
    dq, dk, dv = shares(first)
    if first.gathers:
        wide = dk.to(accumulation_dtype(dk.dtype)), dv.to(accumulation_dtype(dv.dtype))
        dk, dv = scatter_gradients(*wide, len(dq), first, resident)
    batches = _batches(others, merge.MAX_PASSES)
    if len(batches) > 1:
        dq = dq.to(accumulation_dtype(dq.dtype))
    for batch in batches:
        grads = [(p, shares(p)) for p in batch]
        merge.add_grads([dq], [PassGrads(p.queries, p.q_rows, grad[:1]) for p, grad in grads])
        for prefix_row in dict.fromkeys(p.prefix_row for p in batch):
            # The row's own keys stand in one of these passes at most, so they are rounded once.
            totals = (dk, dv) if prefix_row is None else resident[prefix_row].grads()
            into = [(p, grad) for p, grad in grads if p.prefix_row == prefix_row]
            merge.add_grads(totals, [PassGrads(p.keys, p.kv_rows, grad[1:]) for p, grad in into])
    return dq, dk, dv


def _run_forward(
    kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, arguments: Any, scores: Scores
) -> tuple[Tensor, Tensor]:
    """A kernel's forward where ``v [Tkv, Hkv, Dv]`` may be of another size."""
    value_dim = v.shape[2]
    if q.shape[2] == value_dim or kernel.takes_value_dim(q.shape[2], value_dim):
        return kernel.forward(q, k, v, arguments, scores)
    q, k, v = pad_heads(q, k, v)
    out, lse = kernel.forward(q, k, v, arguments, scores)
    return out[..., :value_dim].contiguous(), lse


def _run_backward(
    kernel: VarlenKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: Any,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's backward where ``v``, ``out`` and ``dout`` may be of another size."""
    head_dim, value_dim = q.shape[2], v.shape[2]
    if head_dim == value_dim or kernel.takes_value_dim(head_dim, value_dim):
        return kernel.backward(dout, q, k, v, out, lse, arguments, scores)
    dout, q, k, v, out = pad_heads(dout, q, k, v, out)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, arguments, scores)
    return dq[..., :head_dim], dk[..., :head_dim], dv[..., :value_dim]
