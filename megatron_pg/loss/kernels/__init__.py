"""What reads logits and makes their gradient, as PyTorch operators and as Triton kernels."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from . import logits_plain


class LogitsKernels(Protocol):
    """What ``logits_plain``, the definition, and ``logits_triton`` both offer."""

    def product(self, rows: Tensor, weight: Tensor, columns: slice) -> Tensor:
        """A new ``[E, V]`` tensor of logits of V rows of ``weight``, in the dtype of ``rows``."""

    def statistics(
        self, logits: Tensor, temperature: Tensor, targets: Tensor, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Largest logit, sum of exponentials, their weighted sum or None, logit at the target."""

    def gradient(
        self,
        logits: Tensor,
        temperature: Tensor,
        targets: Tensor,
        maxima: Tensor,
        log_sums: Tensor,
        grad_logprobs: Tensor,
        entropy: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """Gradient of the logits, which it may be written over; columns of zeros may follow."""


def logits_kernels(device: torch.device) -> LogitsKernels:
    """Triton's on CUDA where Triton is installed, PyTorch's operators else."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from . import logits_triton

        return logits_triton
    return logits_plain
