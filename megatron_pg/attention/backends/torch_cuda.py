"""PyTorch's own CUDA varlen kernel: FlashAttention, no extra package."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import Scores
from .base import AttentionInputs
from .cuda_flash import CudaFlashBackend, VarlenArguments


class TorchFlashBackend(CudaFlashBackend):
    """``aten::_flash_attention_forward`` and its backward, varlen form."""

    name = "flash"

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is None and not torch.backends.cuda.is_flash_attention_available():
            return "needs FlashAttention, which this PyTorch was built without"
        return refusal

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: VarlenArguments, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v),
            *arguments.lengths,
            0.0,
            arguments.causal,
            False,
            scale=scores.scale,
            **_window(arguments),
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        arguments: VarlenArguments,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        tensors = (dout, q, k, v, out, lse.contiguous())
        # Only read under dropout, but the operator wants the tensors.
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *tensors,
            *arguments.lengths,
            0.0,
            arguments.causal,
            *rng,
            scale=scores.scale,
            **_window(arguments),
        )
        return dq, dk, dv


def _window(arguments: VarlenArguments) -> dict[str, int]:
    """Keys seen to the left and right of a query's own place; nothing said is all."""
    if arguments.window is None:
        return {}
    return {"window_size_left": arguments.window, "window_size_right": 0}
