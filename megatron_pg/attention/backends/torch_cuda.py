"""PyTorch's own CUDA varlen kernel: FlashAttention, no extra package."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import AttentionPass
from .base import AttentionInputs, CudaFlashBackend


class TorchFlashKernel:
    """``aten::_flash_attention_forward`` and its backward, varlen form."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_pass: AttentionPass, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        args = attention_pass.varlen
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.bound_q,
            args.max_seqlen_kv,
            0.0,
            attention_pass.causal,
            False,
            scale=softmax_scale,
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
        attention_pass: AttentionPass,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``VarlenKernel``."""
        args = attention_pass.varlen
        # Only read under dropout, but the operator wants the tensors.
        no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.bound_q,
            args.max_seqlen_kv,
            0.0,
            attention_pass.causal,
            no_rng,
            torch.empty(0, device=q.device),
            scale=softmax_scale,
        )
        return dq, dk, dv


class TorchFlashBackend(CudaFlashBackend):
    """Tree attention on PyTorch's CUDA FlashAttention."""

    name = "flash"
    kernel = TorchFlashKernel()

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        refusal = super().refusal(inputs)
        if refusal is None and not torch.backends.cuda.is_flash_attention_available():
            return "needs FlashAttention, which this PyTorch was built without"
        return refusal
