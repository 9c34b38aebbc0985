"""Log-probabilities of chosen tokens from hidden states, the vocabulary split over tp ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_indices
from .head_memory import default_chunk_tokens
from .kernels import LogitsKernels, logits_kernels

# Columns of a block are a multiple of it, so that products run in whole tiles.
_TILE = 128


def vocab_parallel_logprobs(
    rows: Tensor,
    weight: Tensor,
    target_tokens: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    with_entropy: bool = False,
    weight_grad: Tensor | None = None,
    device_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every target token and, on request, the entropy of its distribution.

    Equals ``log_softmax(rows @ full_weight.T / temperature)`` at ``target_tokens``, where
    ``full_weight`` joins the shards of all tp ranks. As many logits as ``chunk_tokens`` rows have
    exist at a time: of a chunk of rows in the forward and, recomputed, of all rows and a block of
    the vocabulary in the backward, so that no gradient of the whole weight is summed over chunks.
    What is kept between the two is a few numbers per row. Matrix products run in the dtype of
    ``rows``, under ``torch.autocast`` too, everything after them in fp32 (fp64 for fp64 input).

    Both results are differentiable in ``rows`` and ``weight``. The gradient of ``rows`` is this
    rank's part (``gather_predictors`` sums it over tp), the gradient of ``weight`` is complete
    for this rank's shard and rounded once; without rows ``weight`` has none.

    Args:
        rows: ``[E, H]`` hidden states, the same on every tp rank.
        weight: ``[V_padded / tp_size, H]`` this rank's rows of the output projection.
        target_tokens: ``[E]`` int64 vocabulary ids on the CPU.
        tp_group: tensor-parallel process group; None means one rank.
        temperature: positive number, or ``[E]`` CPU tensor with one per row; a constant.
        vocab_size: number of real vocabulary entries; later columns are padding and take no part
            in the softmax. None means that there is no padding.
        chunk_tokens: rows whose logits exist at one time; None for ``default_chunk_tokens``.
        with_entropy: whether to return the entropy of the softmax over the vocabulary, in nats.
        weight_grad: shaped as ``weight``; the backward adds the gradient of ``weight`` to it, in
            its dtype, and returns none.
        device_targets: ``target_tokens`` on the device of ``rows``; copied there when None.

    Returns:
        ``(logprobs [E], entropy [E] or None)`` in fp32 (fp64 for fp64 input); E may be 0.

    Raises:
        ValueError: on shapes or dtypes that do not fit, targets outside the vocabulary, or a
            temperature, ``vocab_size`` or ``chunk_tokens`` out of range.
    """
    if rows.ndim != 2 or weight.ndim != 2 or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"rows {tuple(rows.shape)} and weight {tuple(weight.shape)} must be [E, H] and [V, H]"
        )
    if rows.dtype != weight.dtype or not rows.dtype.is_floating_point:
        raise ValueError(
            f"rows ({rows.dtype}) and weight ({weight.dtype}) must have one floating dtype"
        )
    if weight_grad is not None and weight_grad.shape != weight.shape:
        raise ValueError(
            f"weight_grad {tuple(weight_grad.shape)} must be shaped as weight {tuple(weight.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    padded_vocab = len(weight) * tp_size
    vocab_size = padded_vocab if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= padded_vocab:
        raise ValueError(
            f"vocab_size={vocab_size} must lie in [1, {padded_vocab}], the rows of all shards"
        )
    check_indices("target_tokens", target_tokens, vocab_size)
    if len(target_tokens) != len(rows):
        raise ValueError(f"{len(target_tokens)} target_tokens for {len(rows)} rows")
    dtype = torch.promote_types(rows.dtype, torch.float32)
    first = len(weight) * (0 if tp_group is None else dist.get_rank(tp_group))
    temperatures = _as_temperature(temperature, len(rows), dtype, rows.device)
    if device_targets is None:
        device_targets = target_tokens.to(rows.device, non_blocking=True)
    num_columns = min(max(vocab_size - first, 0), len(weight))
    shard = _Shard(
        num_columns=num_columns,
        targets=device_targets - first,
        temperature=temperatures,
        chunk_tokens=chunk_tokens or default_chunk_tokens(num_columns, rows.dtype, rows.device),
        weight_grad=weight_grad,
        group=tp_group if tp_size > 1 else None,
        kernels=logits_kernels(rows.device),
    )
    # The backward makes the logits again, and autocast may be off there: both make the same ones.
    with torch.autocast("cuda" if rows.is_cuda else "cpu", enabled=False):
        logprobs, entropy = _VocabParallelLogprobs.apply(rows, weight, shard, with_entropy)
    return logprobs, entropy


def _as_temperature(
    temperature: float | Tensor, num_rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``[num_rows]`` tensor of temperatures on the device, checked on the host."""
    if not isinstance(temperature, Tensor):
        if not math.isfinite(temperature) or temperature <= 0:
            raise ValueError(f"temperature={temperature} must be finite and above 0")
        return torch.full((num_rows,), temperature, dtype=dtype, device=device)
    if temperature.shape != (num_rows,) or temperature.device.type != "cpu":
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}, it must "
            f"be a number or a CPU tensor of shape {(num_rows,)}"
        )
    if not bool((torch.isfinite(temperature) & (temperature > 0)).all()):
        raise ValueError("every temperature must be finite and above 0")
    return temperature.detach().to(dtype).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Shard:
    """This rank's part of the vocabulary and what is constant for every row.

    Attributes:
        num_columns: real vocabulary entries of the shard; 0 when it holds padding only.
        targets: ``[E]`` column of the target in this shard, outside of it when another rank's.
        temperature: ``[E]``, its dtype that of everything after the matrix product.
        chunk_tokens: rows whose logits exist at one time.
        weight_grad: what the weight's gradient is added to; None returns it.
        group: tp process group, None for one rank.
        kernels: of the logits' device.
    """

    num_columns: int
    targets: Tensor
    temperature: Tensor
    chunk_tokens: int
    weight_grad: Tensor | None
    group: dist.ProcessGroup | None
    kernels: LogitsKernels

    def row_chunks(self) -> Iterator[slice]:
        """Rows whose logits over the whole shard exist at one time."""
        if self.num_columns:
            for start in range(0, len(self.targets), self.chunk_tokens):
                yield slice(start, start + self.chunk_tokens)

    def column_blocks(self) -> Iterator[slice]:
        """Columns whose logits of all rows exist at one time: no more than those of a chunk."""
        if self.num_columns and len(self.targets):
            width = self.chunk_tokens * self.num_columns // len(self.targets)
            if width >= _TILE:
                width = width // _TILE * _TILE
            for start in range(0, self.num_columns, max(width, 1)):
                yield slice(start, min(start + max(width, 1), self.num_columns))

    def statistics(
        self, rows: Tensor, weight: Tensor, chunk: slice, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Of a chunk of rows, over the columns of this shard."""
        logits = self.kernels.product(rows[chunk], weight, slice(0, self.num_columns))
        return self.kernels.statistics(
            logits, self.temperature[chunk], self.targets[chunk], with_entropy
        )

    def add_gradients(
        self,
        rows: Tensor,
        weight: Tensor,
        columns: slice,
        of_rows: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        grad_rows: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Add what a block of columns gives to ``grad_rows``, and the block's ``grad_weight``."""
        logits = self.kernels.product(rows, weight, columns)
        targets = self.targets - columns.start
        grad = self.kernels.gradient(logits, self.temperature, targets, *of_rows)
        # Columns of zeros meet the padding of the vocabulary, as far as there is some.
        stop = min(columns.start + grad.shape[1], len(weight))
        columns, grad = slice(columns.start, stop), grad[:, : stop - columns.start]
        if grad_rows is not None:
            _add_product(grad_rows, grad, weight[columns])
        if self.weight_grad is not None:
            _add_product(self.weight_grad[columns], grad.t(), rows)
        elif grad_weight is not None:
            torch.mm(grad.t(), rows, out=grad_weight[columns])


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, shard: _Shard, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # Of the columns of this shard: the largest logit, sum of exp((logit - largest) / T), sum of
        # that times its exponent.
        dtype = shard.temperature.dtype
        maxima = rows.new_full((len(rows),), torch.finfo(dtype).min, dtype=dtype)
        sums, weighted, target_logits = rows.new_zeros(3, len(rows), dtype=dtype)
        for chunk in shard.row_chunks():
            found = shard.statistics(rows, weight, chunk, with_entropy)
            maxima[chunk], sums[chunk], target_logits[chunk] = found[0], found[1], found[3]
            if found[2] is not None:
                weighted[chunk] = found[2]
        if shard.group is not None and len(rows) > 0:
            local_maxima = maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=shard.group)
            # No less than one whose exponential is 0: a shard of padding is infinitely far.
            shift = ((local_maxima - maxima) / shard.temperature).clamp(min=-1e4)
            weighted = (weighted + shift * sums) * shift.exp()
            reduced = torch.stack([sums * shift.exp(), weighted, target_logits])
            dist.all_reduce(reduced, group=shard.group)
            sums, weighted, target_logits = reduced
        log_sums = sums.log()
        logprobs = (target_logits - maxima) / shard.temperature - log_sums
        entropy = log_sums - weighted / sums if with_entropy else None
        ctx.shard = shard
        ctx.save_for_backward(rows, weight, maxima, log_sums, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, maxima, log_sums, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.zeros_like(rows, dtype=maxima.dtype) if needs_rows else None
        grad_weight = None
        if needs_weight and shard.weight_grad is None and len(rows):
            grad_weight = torch.empty_like(weight)
            grad_weight[shard.num_columns :] = 0
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(maxima)
        of_rows = maxima, log_sums, grad_logprobs, entropy, grad_entropy
        with torch.autocast("cuda" if rows.is_cuda else "cpu", enabled=False):
            for columns in shard.column_blocks():
                shard.add_gradients(rows, weight, columns, of_rows, grad_rows, grad_weight)
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in place, summed in the dtype of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total += a @ b
    elif torch.__version__ >= "2.10":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # Which adds to a total of the products' dtype only.
        total += torch.mm(a, b, out_dtype=total.dtype)
