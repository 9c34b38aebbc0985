"""Benchmarks on two processes of this machine, one thread each."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tools.bench.machine import keep_freed_memory
from tools.bench.registry import BenchmarkRow, Options

Measure = Callable[[Options], list[BenchmarkRow]]


def on_two_ranks(measure: Measure, options: Options) -> list[BenchmarkRow]:
    """What ``measure``, called on both ranks, returns on the first; it must be picklable."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (Path(folder), measure, options), nprocs=2)
        rows: list[BenchmarkRow] = torch.load(Path(folder) / "rows.pt", weights_only=False)
    return rows


def _run_rank(rank: int, folder: Path, measure: Measure, options: Options) -> None:
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), 2)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=30)
    )
    rows = measure(options)
    if rank == 0:
        torch.save(rows, folder / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()
