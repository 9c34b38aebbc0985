"""Kernels of linear attention that Megatron-Core takes from FLA, and what stands in for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.ssm import gated_delta_net
from torch import Tensor
from torch.nn import functional


def stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Modules of Megatron-Core, names that they have from FLA, and the same in PyTorch.

    Megatron-Core builds no ``GatedDeltaNet`` where FLA is not installed, and FLA runs on no CPU.
    """
    made = {
        "HAVE_FLA": True,
        "l2norm": _l2norm,
        "chunk_gated_delta_rule": _chunk_gated_delta_rule,
        "causal_conv1d": _causal_conv1d,
    }
    # One module up to core 0.18, then a package whose modules each have names of their own.
    package = gated_delta_net.__name__
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for kernel, stand_in in made.items():
                if hasattr(module, kernel) or (name, kernel) == (package, "l2norm"):
                    yield module, kernel, stand_in


def _l2norm(x: Tensor, eps: float = 1e-6, **_: Any) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _chunk_gated_delta_rule(*args: Any, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
    if cu_seqlens is not None:
        raise NotImplementedError("rows of several sequences need FLA's kernels and a device")
    return gated_delta_net.torch_chunk_gated_delta_rule(*args, **kwargs)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``[batch, tokens, channels]``, causal and depthwise."""
    if cu_seqlens is not None:
        raise NotImplementedError("rows of several sequences need FLA's kernels and a device")
    columns, width = x.transpose(1, 2), weight.shape[-1]
    y = functional.conv1d(columns, weight[:, None], bias, padding=width - 1, groups=len(weight))
    y = y[..., : x.shape[1]].transpose(1, 2)
    return functional.silu(y) if activation in ("silu", "swish") else y, None
