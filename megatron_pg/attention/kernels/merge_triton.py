"""The merge as Triton kernels: one launch, in place, every element read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 for each thread of the default 4 warps: four vector loads of fp32.
_TILE_ELEMENTS = 2048


def merge_out_lse(
    out: Tensor, lse: Tensor, pass_out: Tensor, pass_lse: Tensor, rows: Tensor | None
) -> None:
    """Add one pass to a running result, in place: equals ``merge_plain.merge_out_lse``.

    Args:
        out: ``[Tq, H, D]`` running output, fp32 or fp64, any strides.
        lse: ``[H, Tq]`` its log-sum-exp, fp32 or fp64, any strides.
        pass_out: ``[Tq, H, D]`` the pass's output, any floating-point dtype and strides.
        pass_lse: ``[H, Tq]`` its log-sum-exp, fp32 or fp64, any strides.
        rows: int64, queries that took part, each once; None for all. Others are not read.
    """
    assert pass_out.shape == out.shape, (pass_out.shape, out.shape)
    assert lse.shape == pass_lse.shape == (out.shape[1], out.shape[0]), (lse.shape, pass_lse.shape)
    strides = (*out.stride(), *lse.stride(), *pass_out.stride(), *pass_lse.stride())
    _launch(_merge_kernel, (out, lse, pass_out, pass_lse), rows, strides)


def add_rows(total: Tensor, share: Tensor, rows: Tensor | None) -> None:
    """``total[rows] += share[rows]``, in place: equals ``merge_plain.add_rows``.

    Args:
        total: ``[T, H, D]`` in the accumulation dtype, any strides.
        share: ``[T, H, D]`` what a pass adds, any floating-point dtype and strides.
        rows: int64, rows that took part, each once; None for all. Others are not read.
    """
    assert share.shape == total.shape, (share.shape, total.shape)
    _launch(_add_kernel, (total, share), rows, (*total.stride(), *share.stride()))


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], rows: Tensor | None, strides: tuple[int, ...]
) -> None:
    """One program per head and block of rows; heads of a block run side by side in memory."""
    num_rows, num_heads, head_dim = tensors[0].shape
    if rows is not None:
        rows, num_rows = rows.contiguous(), len(rows)
    if num_rows * num_heads * head_dim == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    block_t = max(1, _TILE_ELEMENTS // block_d)
    grid = (num_heads * triton.cdiv(num_rows, block_t),)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](
            *tensors,
            rows,
            num_rows,
            num_heads,
            *strides,
            HEAD_DIM=head_dim,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )


@triton.jit
def _rows_and_head(
    rows_ptr: tl.tensor, num_rows: tl.tensor, num_heads: tl.tensor, BLOCK_T: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The program's rows, which of them exist, and its head; int64, so that offsets are too."""
    program = tl.program_id(0).to(tl.int64)
    index = program // num_heads * BLOCK_T + tl.arange(0, BLOCK_T)
    takes_part = index < num_rows
    if rows_ptr is None:
        row = index
    else:
        row = tl.load(rows_ptr + index, mask=takes_part, other=0)
    return row, takes_part, program % num_heads


# Lengths, and strides that follow from them, change with every row: one binary takes them all.
@triton.jit(
    do_not_specialize=["num_rows", "lse_stride_h", "pass_lse_stride_h"],
    do_not_specialize_on_alignment=["lse_ptr", "pass_lse_ptr", "rows_ptr"],
)
def _merge_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    pass_out_ptr: tl.tensor,
    pass_lse_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    out_stride_d: tl.tensor,
    lse_stride_h: tl.tensor,
    lse_stride_t: tl.tensor,
    pass_out_stride_t: tl.tensor,
    pass_out_stride_h: tl.tensor,
    pass_out_stride_d: tl.tensor,
    pass_lse_stride_h: tl.tensor,
    pass_lse_stride_t: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row, takes_part, head = _rows_and_head(rows_ptr, num_rows, num_heads, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = takes_part[:, None] & (dim < HEAD_DIM)[None, :]
    lse_ptrs = lse_ptr + head * lse_stride_h + row * lse_stride_t
    pass_lse_ptrs = pass_lse_ptr + head * pass_lse_stride_h + row * pass_lse_stride_t
    out_ptrs = out_ptr + head * out_stride_h
    out_ptrs += row[:, None] * out_stride_t + dim[None, :] * out_stride_d
    pass_out_ptrs = pass_out_ptr + head * pass_out_stride_h
    pass_out_ptrs += row[:, None] * pass_out_stride_t + dim[None, :] * pass_out_stride_d

    lse = tl.load(lse_ptrs, mask=takes_part, other=0.0)
    pass_lse = tl.load(pass_lse_ptrs, mask=takes_part, other=0.0)
    out = tl.load(out_ptrs, mask=inside, other=0.0)
    pass_out = tl.load(pass_out_ptrs, mask=inside, other=0.0).to(out.dtype)
    # Several warps may hold the same lse: all must have read it before one writes it.
    tl.debug_barrier()

    difference = pass_lse - lse
    weight = (1.0 / (1.0 + tl.exp(-difference))).to(out.dtype)[:, None]
    # As ``Tensor.lerp_``: exact at both ends.
    step = pass_out - out
    merged = tl.where(weight < 0.5, out + weight * step, pass_out - step * (1.0 - weight))
    # Equal infinities have no difference, but count as equal.
    gap = tl.where(lse == pass_lse, 0.0, tl.abs(difference))
    merged_lse = tl.where(difference > 0, pass_lse, lse) + tl.log(1.0 + tl.exp(-gap))
    tl.store(out_ptrs, merged, mask=inside)
    tl.store(lse_ptrs, merged_lse, mask=takes_part)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows_ptr"])
def _add_kernel(
    total_ptr: tl.tensor,
    share_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    total_stride_t: tl.tensor,
    total_stride_h: tl.tensor,
    total_stride_d: tl.tensor,
    share_stride_t: tl.tensor,
    share_stride_h: tl.tensor,
    share_stride_d: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row, takes_part, head = _rows_and_head(rows_ptr, num_rows, num_heads, BLOCK_T)
    dim = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = takes_part[:, None] & (dim < HEAD_DIM)[None, :]
    total_ptrs = total_ptr + head * total_stride_h
    total_ptrs += row[:, None] * total_stride_t + dim[None, :] * total_stride_d
    share_ptrs = share_ptr + head * share_stride_h
    share_ptrs += row[:, None] * share_stride_t + dim[None, :] * share_stride_d
    total = tl.load(total_ptrs, mask=inside, other=0.0)
    share = tl.load(share_ptrs, mask=inside, other=0.0).to(total.dtype)
    tl.store(total_ptrs, total + share, mask=inside)
