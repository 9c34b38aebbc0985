"""Logits in PyTorch operators: the definition, and what runs where Triton does not."""

from __future__ import annotations

import torch
from torch import Tensor


def product(rows: Tensor, weight: Tensor, columns: slice) -> Tensor:
    """A new ``[E, V]`` tensor of logits of V rows of ``weight``, in the dtype of ``rows``."""
    return rows @ weight[columns].t()


def statistics(
    logits: Tensor, temperature: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What the logprob of a target and the entropy of a row are made of; consumes the logits.

    Args:
        logits: ``[E, V]``.
        temperature: ``[E]`` in the dtype of the results; logits are divided by it.
        targets: ``[E]`` columns; the logit of one outside ``[0, V)`` counts as 0.
        with_entropy: whether to return the third result.

    Returns:
        ``[E]`` each: the largest logit, of ``x = (logits - largest) / temperature`` the sum of
        ``exp(x)`` and that of ``x exp(x)`` or None, and the logit at the target.
    """
    logits = logits.to(temperature.dtype)
    column, is_inside = _columns(targets, logits.shape[1])
    at_target = torch.where(is_inside, logits.gather(1, column[:, None]).squeeze(1), 0)
    maximum = logits.amax(1)
    # First the difference, which is exact for logits near the largest.
    logits.sub_(maximum[:, None]).div_(temperature[:, None])
    if not with_entropy:
        return maximum, logits.exp_().sum(1), None, at_target
    exp = logits.exp()
    return maximum, exp.sum(1), logits.mul_(exp).sum(1), at_target


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
    """Gradient of the logits, in their shape and dtype; consumes the logits.

    Equals ``d logprob = onehot(target) - p`` and ``d entropy = -p (log p + entropy)`` with
    ``p = exp((logits - maxima) / temperature - log_sums)``, over temperature.

    Args:
        logits: ``[E, V]``.
        temperature: ``[E]``, its dtype that of the computation.
        targets: ``[E]`` columns; one outside ``[0, V)`` belongs to others.
        maxima: ``[E]`` of the whole vocabulary, as ``log_sums``.
        log_sums: ``[E]`` logarithm of the sum of ``exp((logits - maximum) / temperature)``.
        grad_logprobs: ``[E]``.
        entropy: ``[E]``, with ``grad_entropy``.
        grad_entropy: ``[E]`` or None.
    """
    grad = logits.to(temperature.dtype).sub_(maxima[:, None])
    grad.div_(temperature[:, None]).sub_(log_sums[:, None])
    if grad_entropy is None or entropy is None:
        grad.exp_().mul_(-grad_logprobs[:, None])
    else:
        factor = (grad + entropy[:, None]).mul_(-grad_entropy[:, None])
        grad.exp_().mul_(factor.sub_(grad_logprobs[:, None]))
        del factor
    column, is_inside = _columns(targets, grad.shape[1])
    index = torch.arange(len(grad), device=grad.device), column
    grad.index_put_(index, torch.where(is_inside, grad_logprobs, 0), accumulate=True)
    return grad.div_(temperature[:, None]).to(logits.dtype)


def _columns(targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Targets, 0 for those outside, and which are inside."""
    is_inside = (targets >= 0) & (targets < num_columns)
    return torch.where(is_inside, targets, 0), is_inside
