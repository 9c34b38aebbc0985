"""Logits as Triton kernels: statistics read them once, the gradient is written in their place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_WARPS = 4
# Vector loads of a thread that are under way at once.
_LOADS = 2
_VECTOR_BYTES = 16
# Lengths of rows that Triton knows to hold whole vectors, for every dtype.
_MULTIPLE = 16


def product(rows: Tensor, weight: Tensor, columns: slice) -> Tensor:
    """A new ``[E, V]`` tensor of logits of V rows of ``weight``, in the dtype of ``rows``.

    Its rows are aligned for vectors. Products of odd sizes take several times as long, so rows of
    ``weight`` that follow take part where there are some: the padding of a vocabulary.
    """
    num_columns = columns.stop - columns.start
    logits = rows.new_empty(len(rows), _round_up(num_columns))
    weight = weight[columns.start : columns.start + logits.shape[1]]
    torch.mm(rows, weight.t(), out=logits[:, : len(weight)])
    return logits[:, :num_columns]


def statistics(
    logits: Tensor, temperature: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Equals ``logits_plain.statistics``; the logits stay as they are.

    Args:
        logits: ``[E, V]`` from ``product``.
        temperature: ``[E]`` in the dtype of the results, fp32 or fp64.
        targets: ``[E]`` int64 columns; the logit of one outside ``[0, V)`` counts as 0.
        with_entropy: whether to return the third result.
    """
    num_rows, num_columns = logits.shape
    maxima, sums, at_target, weighted = temperature.new_empty(4, num_rows)
    with torch.cuda.device_of(logits):
        _statistics_kernel[(num_rows,)](
            logits,
            temperature,
            targets,
            maxima,
            sums,
            weighted if with_entropy else None,
            at_target,
            num_columns,
            _round_up(num_columns),
            _row_stride(logits),
            LOWEST=torch.finfo(temperature.dtype).min,
            LANES=32 * _NUM_WARPS * _LOADS,
            VECTOR=_VECTOR_BYTES // logits.itemsize,
            num_warps=_NUM_WARPS,
        )
    return maxima, sums, weighted if with_entropy else None, at_target


def gradient(
    logits: Tensor,
    temperature: Tensor,
    targets: Tensor,
    maxima: Tensor,
    log_sums: Tensor,
    grad_logprobs: Tensor,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Equals ``logits_plain.gradient`` with zeros as columns that fill its last vectors.

    It is written over the logits.

    Args:
        logits: ``[E, V]`` from ``product``.
        temperature: ``[E]`` fp32 or fp64, as all that follow but the targets.
        targets: ``[E]`` int64 columns; one outside ``[0, V)`` belongs to others.
        maxima: ``[E]`` of the whole vocabulary, as ``log_sums``.
        log_sums: ``[E]`` logarithm of the sum of ``exp((logits - maximum) / temperature)``.
        grad_logprobs: ``[E]``.
        entropy: ``[E]``, with ``grad_entropy``.
        grad_entropy: ``[E]`` or None.
    """
    num_rows, num_columns = logits.shape
    block = 32 * _NUM_WARPS * _LOADS * (_VECTOR_BYTES // logits.itemsize)
    per_row = temperature, targets, maxima, log_sums, grad_logprobs.contiguous()
    has_entropy = grad_entropy is not None
    with torch.cuda.device_of(logits):
        _gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            logits,
            *per_row,
            entropy if has_entropy else None,
            grad_entropy.contiguous() if grad_entropy is not None else None,
            num_columns,
            _round_up(num_columns),
            _row_stride(logits),
            BLOCK=block,
            num_warps=_NUM_WARPS,
        )
    return logits.as_strided((num_rows, _round_up(num_columns)), logits.stride())


def _round_up(num_columns: int) -> int:
    return -(-num_columns // _MULTIPLE) * _MULTIPLE


def _row_stride(logits: Tensor) -> int:
    """Elements from row to row, which must leave room for whole vectors at a row's end."""
    stride = _round_up(logits.shape[1])
    assert logits.stride() == (stride, 1), (logits.shape, logits.stride())
    return stride


# Numbers of a row lie at any place of their tensors: one binary takes them all.
_PER_ROW = [
    f"{name}_ptr"
    for name in (
        *("temperature", "targets", "maxima", "sums", "weighted", "at_target"),
        *("log_sums", "grad_logprobs", "entropy", "grad_entropy"),
    )
]


@triton.jit(do_not_specialize=["num_columns"], do_not_specialize_on_alignment=_PER_ROW)
def _statistics_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    weighted_ptr: tl.tensor,
    at_target_ptr: tl.tensor,
    num_columns: tl.tensor,
    padded_columns: tl.tensor,
    row_stride: tl.tensor,
    LOWEST: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """One program per row; each lane keeps a maximum and sums of its own until the end."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    # Of two: exp(x / temperature) is exp2(x * to_power).
    to_power = 1.4426950408889634 / tl.load(temperature_ptr + row)
    maximum = tl.full([LANES], LOWEST, dtype)
    total = tl.full([LANES], 0.0, dtype)
    weighted = tl.full([LANES], 0.0, dtype)
    # A thread owns whole vectors, so what reduces over them stays within it.
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    whole = num_columns // (LANES * VECTOR) * (LANES * VECTOR)
    has_entropy: tl.constexpr = weighted_ptr is not None
    for first in range(0, whole, LANES * VECTOR):
        logit = tl.load(logits_ptr + first + column).to(dtype)
        maximum, total, weighted = _add_tile(logit, to_power, maximum, total, weighted, has_entropy)
    if whole < num_columns:
        # Whole vectors are read; what lies past the last column may hold anything.
        logit = tl.load(
            logits_ptr + whole + column, mask=whole + column < padded_columns, other=0.0
        )
        logit = tl.where(whole + column < num_columns, logit.to(dtype), float("-inf"))
        maximum, total, weighted = _add_tile(logit, to_power, maximum, total, weighted, has_entropy)
    largest = tl.max(maximum, axis=0)
    shift = _power(maximum - largest, to_power)
    decay = tl.exp2(shift)
    tl.store(maxima_ptr + row, largest)
    tl.store(sums_ptr + row, tl.sum(total * decay, axis=0))
    if has_entropy:
        moved = tl.sum((weighted + shift * total) * decay, axis=0)
        tl.store(weighted_ptr + row, moved * 0.6931471805599453)
    target = tl.load(targets_ptr + row)
    is_owned = (target >= 0) & (target < num_columns)
    at_target = tl.load(logits_ptr + target, mask=is_owned, other=0.0)
    tl.store(at_target_ptr + row, at_target.to(dtype))


@triton.jit
def _add_tile(
    logit: tl.tensor,
    to_power: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    HAS_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The lanes' maximum, sum of powers and sum of powers times exponents, a tile further."""
    larger = tl.maximum(maximum, tl.max(logit, axis=1))
    shift = _power(maximum - larger, to_power)
    decay = tl.exp2(shift)
    exponent = _power(logit - larger[:, None], to_power)
    exp = tl.exp2(exponent)
    if HAS_ENTROPY:
        weighted = (weighted + shift * total) * decay + tl.sum(exponent * exp, axis=1)
    total = total * decay + tl.sum(exp, axis=1)
    return larger, total, weighted


@triton.jit
def _power(difference: tl.tensor, to_power: tl.tensor) -> tl.tensor:
    """Exponent of two. No less than one whose power is 0: infinity times 0 would be NaN.

    NaN stays NaN: it would count as nothing otherwise, and the row's sum look like one.
    """
    return tl.maximum(difference * to_power, -2000.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["num_columns"], do_not_specialize_on_alignment=_PER_ROW)
def _gradient_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    log_sums_ptr: tl.tensor,
    grad_logprobs_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    grad_entropy_ptr: tl.tensor,
    num_columns: tl.tensor,
    padded_columns: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < padded_columns
    logit_ptrs = logits_ptr + row * row_stride + column
    dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    scale = 1.0 / tl.load(temperature_ptr + row)
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    logit = tl.load(logit_ptrs, mask=is_there, other=0.0).to(dtype)
    logprob = (logit - tl.load(maxima_ptr + row)) * scale - tl.load(log_sums_ptr + row)
    p = tl.exp(logprob)
    if grad_entropy_ptr is None:
        grad = -grad_logprob * p
    else:
        rise = (logprob + tl.load(entropy_ptr + row)) * tl.load(grad_entropy_ptr + row)
        grad = -p * (rise + grad_logprob)
    grad = tl.where(column == tl.load(targets_ptr + row), grad + grad_logprob, grad)
    grad = tl.where(column < num_columns, grad, 0.0)
    tl.store(logit_ptrs, (grad * scale).to(logits_ptr.dtype.element_ty), mask=is_there)
