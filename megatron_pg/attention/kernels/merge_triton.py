"""The merge as Triton kernels: one launch for several passes, in place, each element read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ...tree import IntArray
from .shares import PassGrads, PassOut

# The outputs of all that a launch merges are held at once.
MAX_PASSES = 4

# 16 for each thread of the default 4 warps: two vector loads of bf16.
_TILE_ELEMENTS = 2048


def select_rows(spans: IntArray, num_rows: int) -> NDArray[np.bool_] | None:
    """Whether each row lies in a span, ``[num_spans, 2]`` half-open; None where all do."""
    if np.diff(spans).sum() == num_rows:
        return None
    selected = np.zeros(num_rows, dtype=np.bool_)
    for start, end in spans:
        selected[start:end] = True
    return selected


def merge_out_lse(
    out: Tensor, lse: Tensor, passes: Sequence[PassOut], sink: Tensor | None = None
) -> None:
    """Merge passes, and then a sink, in place: equals ``merge_plain.merge_out_lse``.

    Rows of no pass are neither read nor written, unless there is a sink.

    Args:
        out: ``[T, H, D]`` running output, any floating-point dtype, last stride 1.
        lse: ``[H, T]`` its log-sum-exp, fp32 or fp64, any strides.
        passes: at most ``MAX_PASSES``, each row of a pass once.
        sink: ``[H]``, any floating-point dtype.
    """
    for rows, _, pass_out, pass_lse in passes:
        shape = (rows.stop - rows.start, *out.shape[1:])
        assert pass_out.shape == shape and rows.stop <= len(out), (pass_out.shape, rows, out.shape)
        assert pass_lse.shape == shape[1::-1], (pass_lse.shape, shape)
    if not passes and sink is None:
        return
    outs, pass_strides = _alike([p.out for p in passes], out)
    lses = tuple(p.lse.contiguous() for p in passes)
    tensors = (out, lse, None if sink is None else sink.contiguous(), outs, lses)
    strides = (*out.stride()[:2], *lse.stride(), *pass_strides)
    _launch(_merge_kernel, out, tensors, passes, strides, takes_all=sink is not None)


def add_grads(totals: Sequence[Tensor], passes: Sequence[PassGrads]) -> None:
    """``total[rows] += grad`` for each total and pass: equals ``merge_plain.add_grads``.

    One launch for totals of one shape, dtype and strides.

    Args:
        totals: ``[T, H, D]`` each, any floating-point dtype, last stride 1.
        passes: at most ``MAX_PASSES``, each row of a pass once.
    """
    for rows, _, grads in passes:
        for total, grad in zip(totals, grads, strict=True):
            shape = (rows.stop - rows.start, *total.shape[1:])
            assert grad.shape == shape and rows.stop <= len(total), (grad.shape, rows, total.shape)
    if not passes:
        return
    if len(passes) == 1 and passes[0].selected is None:
        # PyTorch's operator adds in fp32 and rounds once too, and costs the host less.
        for total, grad in zip(totals, passes[0].grads):
            total[passes[0].rows].add_(grad)
        return
    if len({(x.shape, x.dtype, x.stride()) for x in totals}) > 1:
        for number, total in enumerate(totals):
            add_grads([total], [p._replace(grads=p.grads[number : number + 1]) for p in passes])
        return
    # All of the first pass, then all of the second.
    given, strides = _alike([grad for p in passes for grad in p.grads], totals[0])
    strides = (*totals[0].stride()[:2], *strides)
    _launch(_add_kernel, totals[0], (tuple(totals), given), passes, strides)


def _alike(given: list[Tensor], like: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors with the strides of rows and heads that all of them have, copied if they differ.

    Of several one may be a slice of wider heads and another may not.
    """
    strides = {x.stride() for x in given}
    if len(strides) > 1 or any(s[2] != 1 for s in strides):
        given = [x.contiguous() for x in given]
    return tuple(given), (given[0].stride()[:2] if given else like.stride()[:2])


def _launch(
    kernel: Any,
    running: Tensor,
    tensors: tuple[Any, ...],
    passes: Sequence[PassOut] | Sequence[PassGrads],
    strides: tuple[int, ...],
    takes_all: bool = False,
) -> None:
    """One program per head and block of rows; heads of a block run side by side in memory."""
    num_tokens, num_heads, head_dim = running.shape
    assert running.stride(-1) == 1 and len(passes) <= MAX_PASSES, (running.stride(), len(passes))
    bounds = [p.rows.indices(num_tokens)[:2] for p in passes]
    begin = 0 if takes_all else min(start for start, _ in bounds)
    num_rows = (num_tokens if takes_all else max(end for _, end in bounds)) - begin
    if num_rows * num_heads * head_dim == 0:
        return
    block_d = 1 << (head_dim - 1).bit_length()
    block_t = max(1, _TILE_ELEMENTS // block_d)
    grid = (num_heads * -(-num_rows // block_t),)
    bounds += [(0, 0)] * (MAX_PASSES - len(bounds))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(running):
        kernel[grid](
            *tensors,
            tuple(p.selected for p in passes),
            *(number for pair in bounds for number in pair),
            begin,
            num_rows,
            num_heads,
            *strides,
            HEAD_DIM=head_dim,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )


@triton.jit
def _tile(
    begin: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The program's rows, which of them exist, dims, which exist, head; all int64 for offsets."""
    program = tl.program_id(0).to(tl.int64)
    index = program // num_heads * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    return begin + index, index < num_rows, dim, dim < HEAD_DIM, program % num_heads


@triton.jit
def _own_rows(
    row: tl.tensor, exists: tl.tensor, start: tl.tensor, end: tl.tensor, selected_ptr: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The rows as the pass counts them, and which of them took part in it."""
    takes_part = exists & (row >= start) & (row < end)
    if selected_ptr is not None:
        selected = tl.load(selected_ptr + (row - start), mask=takes_part, other=0)
        takes_part = takes_part & (selected != 0)
    return row - start, takes_part


# Lengths, and strides that follow from them, change with every row: one binary takes them all.
_LENGTHS = (
    *(f"{bound}_{i}" for i in range(MAX_PASSES) for bound in ("start", "end")),
    *("begin", "num_rows"),
)


@triton.jit(
    do_not_specialize=[*_LENGTHS, "lse_stride_h"],
    do_not_specialize_on_alignment=["lse_ptr", "sink_ptr", "pass_lses", "selections"],
)
def _merge_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    sink_ptr: tl.tensor,
    pass_outs: tl.tuple,
    pass_lses: tl.tuple,
    selections: tl.tuple,
    start_0: tl.tensor,
    end_0: tl.tensor,
    start_1: tl.tensor,
    end_1: tl.tensor,
    start_2: tl.tensor,
    end_2: tl.tensor,
    start_3: tl.tensor,
    end_3: tl.tensor,
    begin: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    lse_stride_h: tl.tensor,
    lse_stride_t: tl.tensor,
    pass_stride_t: tl.tensor,
    pass_stride_h: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    starts = (start_0, start_1, start_2, start_3)
    ends = (end_0, end_1, end_2, end_3)
    row, exists, dim, fits, head = _tile(begin, num_rows, num_heads, HEAD_DIM, BLOCK_T, BLOCK_D)
    changes = exists
    if sink_ptr is None:
        changes = row < 0
        for i in tl.static_range(len(pass_outs)):
            _, takes_part = _own_rows(row, exists, starts[i], ends[i], selections[i])
            changes = changes | takes_part
    lse_ptrs = lse_ptr + head * lse_stride_h + row * lse_stride_t
    out_ptrs = out_ptr + head * out_stride_h + row[:, None] * out_stride_t + dim[None, :]
    inside = changes[:, None] & fits[None, :]
    lse = tl.load(lse_ptrs, mask=changes, other=0.0)
    out = tl.load(out_ptrs, mask=inside, other=0.0).to(lse.dtype)
    for i in tl.static_range(len(pass_outs)):
        own, takes_part = _own_rows(row, exists, starts[i], ends[i], selections[i])
        pass_lse_ptrs = pass_lses[i] + head * (ends[i] - starts[i]) + own
        pass_out_ptrs = pass_outs[i] + head * pass_stride_h
        pass_out_ptrs += own[:, None] * pass_stride_t + dim[None, :]
        pass_lse = tl.load(pass_lse_ptrs, mask=takes_part, other=0.0)
        pass_inside = takes_part[:, None] & fits[None, :]
        pass_out = tl.load(pass_out_ptrs, mask=pass_inside, other=0.0).to(lse.dtype)

        difference = pass_lse - lse
        weight = (1.0 / (1.0 + tl.exp(-difference)))[:, None]
        # As ``Tensor.lerp_``: exact at both ends.
        step = pass_out - out
        merged = tl.where(weight < 0.5, out + weight * step, pass_out - step * (1.0 - weight))
        out = tl.where(takes_part[:, None], merged, out)
        lse = tl.where(takes_part, _logaddexp(lse, pass_lse), lse)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head).to(lse.dtype)
        total = _logaddexp(lse, sink)
        out = out * tl.exp(lse - total)[:, None]
        lse = total
    # Several warps may hold the same lse: all must have read it before one writes it.
    tl.debug_barrier()
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptrs, lse, mask=changes)


@triton.jit
def _logaddexp(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    # Equal infinities have no difference, but count as equal.
    gap = tl.where(a == b, 0.0, tl.abs(b - a))
    return tl.where(b > a, b, a) + tl.log(1.0 + tl.exp(-gap))


@triton.jit(do_not_specialize=_LENGTHS, do_not_specialize_on_alignment=["selections"])
def _add_kernel(
    totals: tl.tuple,
    grads: tl.tuple,
    selections: tl.tuple,
    start_0: tl.tensor,
    end_0: tl.tensor,
    start_1: tl.tensor,
    end_1: tl.tensor,
    start_2: tl.tensor,
    end_2: tl.tensor,
    start_3: tl.tensor,
    end_3: tl.tensor,
    begin: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    total_stride_t: tl.tensor,
    total_stride_h: tl.tensor,
    pass_stride_t: tl.tensor,
    pass_stride_h: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    starts = (start_0, start_1, start_2, start_3)
    ends = (end_0, end_1, end_2, end_3)
    row, exists, dim, fits, head = _tile(begin, num_rows, num_heads, HEAD_DIM, BLOCK_T, BLOCK_D)
    narrow: tl.constexpr = totals[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    changes = row < 0
    for i in tl.static_range(len(grads) // len(totals)):
        _, takes_part = _own_rows(row, exists, starts[i], ends[i], selections[i])
        changes = changes | takes_part
    inside = changes[:, None] & fits[None, :]
    for n in tl.static_range(len(totals)):
        total_ptrs = totals[n] + head * total_stride_h
        total_ptrs += row[:, None] * total_stride_t + dim[None, :]
        total = tl.load(total_ptrs, mask=inside, other=0.0).to(wide)
        for i in tl.static_range(len(grads) // len(totals)):
            own, takes_part = _own_rows(row, exists, starts[i], ends[i], selections[i])
            grad_ptrs = grads[i * len(totals) + n] + head * pass_stride_h
            grad_ptrs += own[:, None] * pass_stride_t + dim[None, :]
            pass_inside = takes_part[:, None] & fits[None, :]
            total += tl.load(grad_ptrs, mask=pass_inside, other=0.0).to(wide)
        tl.store(total_ptrs, total.to(narrow), mask=inside)
