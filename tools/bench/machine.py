"""What a result was measured on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_pg.attention import AttentionInputs, select_backend
from tools.bench.attention_kinds import plain_layer
from tools.bench.registry import Options

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "flash-attn-3"),
    *("prefix-grouper", "numpy"),
)


def describe_machine(options: Options) -> dict[str, Any]:
    """Hardware, versions, commit and load, as every row of a result file carries them.

    ``attention_backend`` is what "auto" takes for the benchmarks' heads, ours and written out.
    """
    cuda, layer = torch.cuda.is_available(), plain_layer(options)
    heads = layer.head_dim, layer.num_heads, layer.num_kv_heads
    return {
        "hardware": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "attention_backend": select_backend(
            AttentionInputs(options.device, options.dtype, *heads)
        ).name,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": _commit(),
        "load_at_start": os.getloadavg(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def keep_freed_memory() -> None:
    """Let this process keep what it frees, so that tensors are timed more than page faults.

    glibc maps tensors from 32 MiB on anew every time. The written-out row has the larger tensors,
    so that would count as a gain of sharing, by up to a third of a step. The price is a fragmented
    heap, up to twice the peak. Other C libraries and CUDA, whose allocator keeps what it has, are
    left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_mmap_max, 0)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{names[0] if names else platform.machine()}{' AVX-512' * ('avx512f' in flags)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Commit of the working tree, marked where files differ from it; "unknown" outside of git.

    A copy without its history is told by the variable COMMIT.
    """
    if told := os.environ.get("COMMIT"):
        return told
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
