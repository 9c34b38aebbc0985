"""What several test modules need: written-out truths, error yardsticks, processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_pg.attention import AttentionInputs, available_backends

ROOT = Path(__file__).parent.parent

needs_cpu_fused = pytest.mark.skipif(
    "cpu_fused"
    not in available_backends(AttentionInputs(torch.device("cpu"), torch.float32, 64, 1, 1)),
    reason="cpu_fused needs AVX-512 and GCC",
)
CPU_BACKENDS = ["reference", "cpu", pytest.param("cpu_fused", marks=needs_cpu_fused)]


def assert_close(
    name: str, got: Tensor, want: Tensor, bound: float, least_scale: float = 1e-30
) -> None:
    """Largest absolute difference, relative to the largest wanted value, stays within bound.

    Where all wanted values may cancel, ``least_scale`` is a size to measure rounding by.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    scale = max(want.abs().max().item(), least_scale) if want.numel() else 1.0
    error = (got - want).abs().max().item() / scale if want.numel() else 0.0
    assert error <= bound, f"{name}: relative error {error:.3e} > {bound:.1e}"


def assert_close_to_control(
    name: str, got: Tensor, control: Tensor, truth: Tensor, factor: float = 2.0
) -> None:
    """Error against the truth stays within ``factor`` times an ordinary implementation's."""
    truth = truth.detach().double()
    error = (got.detach().double() - truth).abs().max().item()
    yardstick = (control.detach().double() - truth).abs().max().item()
    assert yardstick > 0, f"{name}: the control is exact, so it measures nothing"
    assert error <= factor * yardstick, f"{name}: error {error:.3e}, control {yardstick:.3e}"
