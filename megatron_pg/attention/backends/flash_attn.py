"""The flash-attn package's varlen kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from ..plan import AttentionPass
from .base import AttentionInputs, CudaFlashBackend

_REMEDY = "install a flash-attn >= 2.7, < 3 that was built for this PyTorch, or use 'flash'"


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
            args.bound_q,
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
            args.bound_q,
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


class FlashAttnBackend(CudaFlashBackend):
    """Tree attention on the flash-attn package."""

    name = "flash_attn"
    kernel = FlashAttnKernel()

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        return super().refusal(inputs) or package_refusal()


@functools.cache
def package_refusal() -> str | None:
    """Why the installed flash-attn, if any, cannot be called; imports it once."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    try:
        version = str(getattr(importlib.import_module("flash_attn"), "__version__", "unknown"))
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    except Exception as error:  # whatever a wheel for another PyTorch or CUDA fails with
        if getattr(error, "name", None) == "flash_attn.flash_attn_interface":
            return f"finds a flash_attn without kernels, as flash-attn-4 alone brings; {_REMEDY}"
        return f"cannot import flash-attn ({type(error).__name__}: {error}); {_REMEDY}"
    parts = version.split(".")
    if not (parts[0] == "2" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= 7):
        return f"finds flash-attn {version}; {_REMEDY}"
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        if not hasattr(interface, name):
            return f"finds flash-attn {version} without {name}; {_REMEDY}"
    return None
