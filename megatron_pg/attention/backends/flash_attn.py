"""The flash-attn package's varlen kernels."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..plan import AttentionPass
from .base import AttentionInputs, MergingBackend


class FlashAttnKernel:
    """``_flash_attn_varlen_forward`` and ``_flash_attn_varlen_backward`` of flash-attn >= 2.7."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attention_pass: AttentionPass, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        args = attention_pass.varlen
        out, lse, *_ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.max_seqlen_q,
            args.max_seqlen_kv,
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=attention_pass.causal,
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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        args = attention_pass.varlen
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            dq,
            dk,
            dv,
            args.cu_seqlens_q,
            args.cu_seqlens_kv,
            args.max_seqlen_q,
            args.max_seqlen_kv,
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=attention_pass.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class FlashAttnBackend(MergingBackend):
    """Tree attention on the flash-attn package."""

    name = "flash_attn"
    kernel = FlashAttnKernel()
    dtypes = (torch.bfloat16, torch.float16)
    device_type = "cuda"
    max_head_dim = 256

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        if importlib.util.find_spec("flash_attn") is None:
            return "the flash-attn package is not installed"
        return super().refusal(inputs)
