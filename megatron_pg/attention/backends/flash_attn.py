"""The flash-attn package's varlen kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from ..kinds import Scores
from .base import AttentionInputs
from .cuda_flash import CudaFlashBackend, VarlenArguments

_REMEDY = "install a flash-attn >= 2.7, < 3 that was built for this PyTorch, or use 'flash'"


class FlashAttnBackend(CudaFlashBackend):
    """``_flash_attn_varlen_forward`` and ``_flash_attn_varlen_backward`` of flash-attn >= 2.7."""

    name = "flash_attn"
    features = CudaFlashBackend.features | {"softcap"}

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """Why the backend cannot take the inputs here; None when it can."""
        return super().refusal(inputs) or package_refusal()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, arguments: VarlenArguments, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """See ``VarlenKernel``."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            *(q, k, v),
            *arguments.lengths,
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=arguments.causal,
            **_window(arguments),
            softcap=scores.softcap or 0.0,
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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            *(dout, q, k, v, out, lse.contiguous()),
            *grads,
            *arguments.lengths,
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=arguments.causal,
            **_window(arguments),
            softcap=scores.softcap or 0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


def _window(arguments: VarlenArguments) -> dict[str, int]:
    """Keys seen to the left and right of a query's own place; -1 is all, as far as causal."""
    if arguments.window is None:
        return {"window_size_left": -1, "window_size_right": -1}
    return {"window_size_left": arguments.window, "window_size_right": 0}


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
