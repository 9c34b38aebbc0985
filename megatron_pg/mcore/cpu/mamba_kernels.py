"""What Mamba-2 layers of Megatron-Core call of mamba_ssm, in PyTorch, for machines without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from ...linear import state_space_scan
from ..versions import HAS_HYBRID_MODEL


class GatedRMSNorm(torch.nn.Module):
    """``RMSNorm(x * silu(z))`` of every group of channels on its own, in fp32 or wider.

    Args:
        hidden_size: channels of this rank.
        eps: added to the mean square.
        group_size: channels of a group.
        norm_before_gate: must be False.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size or hidden_size
        self.tp_group: Any = None

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``[..., hidden_size]`` in the dtype of ``x``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        if z is not None:
            y = y * functional.silu(z.to(wide))
        groups = y.unflatten(-1, (-1, self.group_size))
        y = functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (y * self.weight.to(wide)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Divided by channels, as Megatron-Core divides that of mamba_ssm."""
        group = self.tp_group or parallel_state.get_tensor_model_parallel_group()
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    rates: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    headdim: int,
    ngroups: int,
    activation: str = "silu",
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
    state_dtype: Any = None,
) -> Tensor:
    """As ``mamba_split_conv1d_scan_combined`` of ordinary batches: ``[batch, tokens, channels]``.

    Args:
        zxbcdt: ``[batch, tokens, ...]`` gates, inputs, ``b``, ``c`` and steps side by side.
        conv1d_weight: ``[channels, width]``.
        conv1d_bias: ``[channels]``.
        dt_bias: ``[heads]``.
        rates: ``[heads]``.
        D: ``[heads]``.
        chunk_size: of the kernel.
        headdim: channels of a head.
        ngroups: of heads that share ``b`` and ``c``.
        activation: must be "silu".
        norm_before_gate: must be False.
        seq_idx: must be None.
        state_dtype: of the kernel.
    """
    assert activation == "silu" and not norm_before_gate and seq_idx is None
    inner, width = len(rates) * headdim, conv1d_weight.shape[1]
    z, xbc, dt = zxbcdt.split([inner, len(conv1d_weight), len(rates)], -1)
    columns = functional.conv1d(
        xbc.transpose(1, 2), conv1d_weight[:, None], conv1d_bias, 1, width - 1, 1, len(xbc[0, 0])
    )
    xbc = functional.silu(columns[..., : xbc.shape[1]]).transpose(1, 2)
    states = (xbc.shape[-1] - inner) // 2
    x, b, c = xbc.split([inner, states, states], -1)
    x = x.unflatten(-1, (-1, headdim))
    b, c = (y.unflatten(-1, (ngroups, -1)) for y in (b, c))
    out, _ = state_space_scan(x, functional.softplus(dt + dt_bias), rates, b, c, None)
    gated: Tensor = (out + D[:, None] * x).flatten(-2).to(zxbcdt.dtype) * functional.silu(z)
    return gated


def stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """Modules, names in them that layers read of mamba_ssm, and what takes their place."""
    if HAS_HYBRID_MODEL:
        from megatron.core.ssm import mamba_mixer

        yield mamba_mixer, "HAVE_MAMBA_SSM", True
        yield mamba_mixer, "ExtendedRMSNorm", GatedRMSNorm
        yield mamba_mixer, "mamba_split_conv1d_scan_combined", split_conv1d_scan
