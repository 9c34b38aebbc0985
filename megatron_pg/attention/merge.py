"""Tree attention out of any varlen kernel: merge of the passes and their exact backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, Protocol

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
from .kernels import merge_plain
from .kinds import Scores
from .padding import pad_heads, padding_dv, padding_out
from .resident import ResidentKV, accumulation_dtype
from .sink import add_sink, sink_gradient


class MergeFunctions(Protocol):
    """What ``merge_plain``, the definition, and ``merge_triton`` both offer."""

    def merge_out_lse(
        self, out: Tensor, lse: Tensor, pass_out: Tensor, pass_lse: Tensor, rows: Tensor | None
    ) -> None:
        """Add one pass's ``(out, lse)`` to a running one, in place."""

    def add_rows(self, total: Tensor, share: Tensor, rows: Tensor | None) -> None:
        """``total[rows] += share[rows]``, in place."""


def merge_implementation(device: torch.device | str) -> Literal["triton", "plain"]:
    """What merges passes on the device: its type and what is installed decide, nothing else.

    "triton" on CUDA where Triton is installed: one kernel per pass, without temporaries. Triton
    needs a C compiler for its first launch; an error in it is raised. Else "plain": PyTorch's
    operators, 5 per pass of whole slices, 11 where the slice has gaps.
    """
    if torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is None:
        return "plain"
    return "triton"


def _merge_functions(device: torch.device) -> MergeFunctions:
    if merge_implementation(device) == "triton":
        from .kernels import merge_triton

        return merge_triton
    return merge_plain


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
        first, *others = row.passes
        merge = _merge_functions(q.device)

        def attend(p: KernelPass) -> tuple[Tensor, Tensor]:
            pass_k, pass_v = keys_and_values(k, v, p, resident)
            qkv = q[p.queries], pass_k[p.keys], pass_v[p.keys]
            return _run_forward(kernel, *qkv, p.arguments, scores)

        out, lse = attend(first)
        if others or sink is not None:
            out = out.to(accumulation_dtype(q.dtype))
        for p in others:
            pass_out, pass_lse = attend(p)
            merge.merge_out_lse(out[p.queries], lse[:, p.queries], pass_out, pass_lse, p.q_rows)
        if sink is not None:
            lse = add_sink(out, lse, sink)
        out = out.to(q.dtype)
        if tokens < len(q):
            out = torch.cat([out, padding_out(v[tokens:], q.shape[1])])
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.row, ctx.kernel, ctx.scores = row, kernel, scores
        ctx.resident = resident
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        row: KernelPasses = ctx.row
        tokens, dtype = row.unique_tokens, accumulation_dtype(q.dtype)
        merge = _merge_functions(q.device)
        if dout.stride(-1) != 1:
            dout = dout.contiguous()

        def shares(p: KernelPass) -> list[Tensor]:
            rows = p.queries
            pass_k, pass_v = keys_and_values(k, v, p, ctx.resident)
            return _run_backward(
                ctx.kernel, dout[rows], q[rows], pass_k[p.keys], pass_v[p.keys], out[rows],
                lse[:, rows], p.arguments, ctx.scores,
            )  # fmt: skip

        first, *others = row.passes
        dq, dk, dv = (grad.to(dtype) for grad in shares(first))
        if first.gathers:
            dk, dv = scatter_gradients(dk, dv, tokens, first, ctx.resident)
        for p in others:
            pass_dq, pass_dk, pass_dv = shares(p)
            merge.add_rows(dq[p.queries], pass_dq, p.q_rows)
            total_dk, total_dv = (
                (dk, dv) if p.prefix_row is None else ctx.resident[p.prefix_row].grads()
            )
            merge.add_rows(total_dk[p.keys], pass_dk, p.kv_rows)
            merge.add_rows(total_dv[p.keys], pass_dv, p.kv_rows)
        grads = [grad.to(q.dtype) for grad in (dq, dk, dv)]
        if tokens < len(q):
            dvalue = padding_dv(dout[tokens:], v.shape[1])
            tails = [torch.zeros_like(q[tokens:]), torch.zeros_like(k[tokens:]), dvalue]
            grads = [torch.cat([grad, tail]) for grad, tail in zip(grads, tails)]
        dsink = None
        if ctx.needs_input_grad[3]:
            dsink = sink_gradient(dout[:tokens], out[:tokens], lse, sink)
        return (*grads, dsink, None, None, None, None)


def _run_forward(
    kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, arguments: Any, scores: Scores
) -> tuple[Tensor, Tensor]:
    """A kernel's forward where ``v [Tkv, Hkv, Dv]`` may be of another size."""
    value_dim = v.shape[2]
    q, k, v = pad_heads(q, k, v)
    out, lse = kernel.forward(q, k, v, arguments, scores)
    return (out if out.shape[2] == value_dim else out[..., :value_dim].contiguous()), lse


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
) -> list[Tensor]:
    """A kernel's backward where ``v``, ``out`` and ``dout`` may be of another size."""
    sizes = q.shape[2], k.shape[2], v.shape[2]
    dout, q, k, v, out = pad_heads(dout, q, k, v, out)
    grads = kernel.backward(dout, q, k, v, out, lse, arguments, scores)
    return [grad[..., :size] for grad, size in zip(grads, sizes)]
