"""What several test modules need: written-out truths, error yardsticks, processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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


def run_ranks(module: str, num_ranks: int, *args: str, timeout: float = 300) -> str:
    """Run ``python -m module args`` on gloo ranks and return the joined output.

    Every rank must exit with 0. The port is free when chosen, so tests may run side by side.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    joined = "\n".join(f"[rank {i}]\n{out}" for i, out in enumerate(outputs))
    assert all(rank.returncode == 0 for rank in ranks), joined[-6000:]
    return joined
