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


def vocab_parallel_logprobs(
    rows: Tensor,
    weight: Tensor,
    target_tokens: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every target token and, on request, the entropy of its distribution.

    Equals ``log_softmax(rows @ full_weight.T / temperature)`` at ``target_tokens``, where
    ``full_weight`` joins the shards of all tp ranks. Logits exist for ``chunk_tokens`` rows at a
    time, in the forward and again in the backward, which recomputes them; what is kept between
    the two is a few numbers per row. Matrix products run in the dtype of ``rows``, everything
    after them in fp32 (fp64 for fp64 input).

    Both results are differentiable in ``rows`` and ``weight``. The gradient of ``rows`` is this
    rank's part (``gather_predictors`` sums it over tp), the gradient of ``weight`` is complete
    for this rank's shard and accumulated over chunks in fp32 (fp64).

    Args:
        rows: ``[E, H]`` hidden states, the same on every tp rank.
        weight: ``[V_padded / tp_size, H]`` this rank's rows of the output projection.
        target_tokens: ``[E]`` int64 vocabulary ids on the CPU.
        tp_group: tensor-parallel process group; None means one rank.
        temperature: positive number, or ``[E]`` CPU tensor with one per row; a constant.
        vocab_size: number of real vocabulary entries; later columns are padding and take no part
            in the softmax. None means that there is no padding.
        chunk_tokens: rows whose logits exist at one time.
        with_entropy: whether to return the entropy of the softmax over the vocabulary, in nats.

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
    if chunk_tokens < 1:
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
    temperatures = _as_temperature(temperature, len(rows), dtype)
    local_targets = target_tokens - first
    num_columns = min(max(vocab_size - first, 0), len(weight))
    is_owned = (local_targets >= 0) & (local_targets < num_columns)
    shard = _Shard(
        num_columns=num_columns,
        targets=torch.where(is_owned, local_targets, 0).to(rows.device, non_blocking=True),
        is_owned=is_owned.to(rows.device, non_blocking=True),
        temperature=temperatures.to(rows.device, non_blocking=True),
        chunk_tokens=chunk_tokens,
        dtype=dtype,
        group=tp_group if tp_size > 1 else None,
    )
    logprobs, entropy = _VocabParallelLogprobs.apply(rows, weight, shard, with_entropy)
    return logprobs, entropy


def _as_temperature(temperature: float | Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """``[num_rows]`` tensor of temperatures, checked on the host."""
    if not isinstance(temperature, Tensor):
        if not math.isfinite(temperature) or temperature <= 0:
            raise ValueError(f"temperature={temperature} must be finite and above 0")
        return torch.full((num_rows,), temperature, dtype=dtype)
    if temperature.shape != (num_rows,) or temperature.device.type != "cpu":
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}, it must "
            f"be a number or a CPU tensor of shape {(num_rows,)}"
        )
    if not bool((torch.isfinite(temperature) & (temperature > 0)).all()):
        raise ValueError("every temperature must be finite and above 0")
    return temperature.detach().to(dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Shard:
    """This rank's part of the vocabulary and what is constant for every row.

    Attributes:
        num_columns: real vocabulary entries of the shard; 0 when it holds padding only.
        targets: ``[E]`` column of the target in this shard, 0 when another rank owns it.
        is_owned: ``[E]`` whether this shard holds the target.
        temperature: ``[E]``.
        chunk_tokens: rows whose logits exist at one time.
        dtype: dtype of everything after the matrix product.
        group: tp process group, None for one rank.
    """

    num_columns: int
    targets: Tensor
    is_owned: Tensor
    temperature: Tensor
    chunk_tokens: int
    dtype: torch.dtype
    group: dist.ProcessGroup | None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        if self.num_columns:
            for start in range(0, num_rows, self.chunk_tokens):
                yield slice(start, start + self.chunk_tokens)

    def logits(self, rows: Tensor, weight: Tensor, chunk: slice) -> Tensor:
        """A new ``[chunk_tokens, num_columns]`` tensor: logits over temperature."""
        logits = (rows[chunk] @ weight[: self.num_columns].t()).to(self.dtype)
        return logits.div_(self.temperature[chunk, None])


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, shard: _Shard, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # Of the columns of this shard: max, sum of exp(logit - max), sum of exp times logit - max.
        maxima = rows.new_full((len(rows),), torch.finfo(shard.dtype).min, dtype=shard.dtype)
        sums, weighted, target_logits = rows.new_zeros(3, len(rows), dtype=shard.dtype)
        for chunk in shard.chunks(len(rows)):
            logits = shard.logits(rows, weight, chunk)
            at_target = logits.gather(1, shard.targets[chunk, None]).squeeze(1)
            target_logits[chunk] = torch.where(shard.is_owned[chunk], at_target, 0)
            maxima[chunk] = logits.amax(1)
            logits.sub_(maxima[chunk, None])
            if with_entropy:
                exp = logits.exp()
                weighted[chunk] = logits.mul_(exp).sum(1)
            else:
                exp = logits.exp_()
            sums[chunk] = exp.sum(1)
        if shard.group is not None and len(rows) > 0:
            local_maxima = maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=shard.group)
            shift = local_maxima - maxima
            weighted = (weighted + shift * sums) * shift.exp()
            reduced = torch.stack([sums * shift.exp(), weighted, target_logits])
            dist.all_reduce(reduced, group=shard.group)
            sums, weighted, target_logits = reduced
        log_sums = sums.log()
        logprobs = (target_logits - maxima) - log_sums
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
        grad_rows = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=shard.dtype)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(maxima)
        for chunk in shard.chunks(len(rows)):
            grad = shard.logits(rows, weight, chunk)
            grad.sub_(maxima[chunk, None]).sub_(log_sums[chunk, None])
            grad_target = grad_logprobs[chunk]
            # d logprob = onehot - p;  d entropy = -p (log p + entropy)
            if grad_entropy is None:
                grad.exp_().mul_(-grad_target[:, None])
            else:
                factor = (grad + entropy[chunk, None]).mul_(-grad_entropy[chunk, None])
                grad.exp_().mul_(factor.sub_(grad_target[:, None]))
            index = torch.arange(len(grad), device=grad.device), shard.targets[chunk]
            at_target = torch.where(shard.is_owned[chunk], grad_target, 0)
            grad.index_put_(index, at_target, accumulate=True)
            grad = grad.div_(shard.temperature[chunk, None]).to(rows.dtype)
            if grad_rows is not None:
                grad_rows[chunk] = grad @ weight[: shard.num_columns]
            if grad_weight is not None:
                grad_weight[: shard.num_columns] += grad.t() @ rows[chunk]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_rows, grad_weight, None, None
