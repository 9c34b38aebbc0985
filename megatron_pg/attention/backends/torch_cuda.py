"""PyTorch's own CUDA varlen kernels: FlashAttention and cuDNN, no extra package."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import AttentionPass
from .base import AttentionInputs, MergingBackend


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
            args.max_seqlen_q,
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
            args.max_seqlen_q,
            args.max_seqlen_kv,
            0.0,
            attention_pass.causal,
            no_rng,
            torch.empty(0, device=q.device),
            scale=softmax_scale,
        )
        return dq, dk, dv


class TorchFlashBackend(MergingBackend):
    """Tree attention on PyTorch's CUDA FlashAttention."""

    name = "flash"
    kernel = TorchFlashKernel()
    dtypes = (torch.bfloat16, torch.float16)
    device_type = "cuda"
    max_head_dim = 256


class TorchCudnnKernel:
    """``aten::_cudnn_attention_forward`` and its backward, varlen form."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_pass: AttentionPass, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        args = attention_pass.varlen
        out, stats, *_ = torch.ops.aten._cudnn_attention_forward(
            q,
            k,
            v,
            None,
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.max_seqlen_q,
            args.max_seqlen_kv,
            True,
            0.0,
            attention_pass.causal,
            False,
            scale=softmax_scale,
        )
        # cuDNN keeps its statistics token-major, [Tq, Hq, 1].
        return out, stats.reshape(q.shape[:2]).t()

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
        no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = torch.ops.aten._cudnn_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.t().contiguous().unsqueeze(-1),
            no_rng,
            no_rng,
            None,
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.max_seqlen_q,
            args.max_seqlen_kv,
            0.0,
            attention_pass.causal,
            scale=softmax_scale,
        )
        return dq, dk, dv


class TorchCudnnBackend(MergingBackend):
    """Tree attention on cuDNN through PyTorch."""

    name = "cudnn"
    kernel = TorchCudnnKernel()
    dtypes = (torch.bfloat16, torch.float16)
    device_type = "cuda"
    max_head_dim = 128

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        if inputs.num_heads != inputs.num_kv_heads:
            return (
                "PyTorch's cuDNN varlen operator takes as many key heads as query heads, "
                f"got {inputs.num_heads} and {inputs.num_kv_heads}"
            )
        return super().refusal(inputs)
