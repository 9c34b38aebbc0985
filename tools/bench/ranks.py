"""Comparisons in processes of their own: one rank, or two with one thread each."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

from tools.bench.gpt import Dims, make_dims, megatron
from tools.bench.machine import keep_freed_memory
from tools.bench.registry import BenchmarkMismatch, BenchmarkRow, Options
from tools.bench.room import has_room

Measure = Callable[[Options], list[BenchmarkRow]]


@dataclass(frozen=True)
class Comparison:
    """One row to be measured on the ranks that hold its model.

    Attributes:
        what: benchmark and shape.
        dims: of the model, and over how many ranks it is spread.
        tokens: of the longest path's row (see ``needed_bytes``).
        measure: called on all ranks under ``megatron(dims)``; picklable.
    """

    what: str
    dims: Dims
    tokens: int
    measure: Callable[[Options], BenchmarkRow]


def parallel_dims(benchmark: str, options: Options) -> Iterator[Dims]:
    """The model on one rank, then on two: tp=2 and pp=2; on ``options.cp`` ranks where it is set.

    Several ranks would need as many GPUs.
    """
    several = [dict(tp=2), dict(pp=2)] if 2 in options.ranks else []
    if options.cp > 1:
        several = [dict(cp=options.cp)]
    elif 1 in options.ranks:
        yield make_dims(options)
    if several and options.device.type == "cuda":
        print(f"{benchmark}: several ranks need a GPU each, they are left out", file=sys.stderr)
        return
    yield from (make_dims(options, **sizes) for sizes in several)


def run_comparisons(comparisons: Iterable[Comparison], options: Options) -> Iterator[BenchmarkRow]:
    """Rows, each from fresh processes; ``quick`` ones of as many ranks share theirs."""
    if options.quick:
        by_ranks: dict[int, list[Comparison]] = {}
        for one in comparisons:
            by_ranks.setdefault(one.dims.num_ranks, []).append(one)
        for num_ranks, some in by_ranks.items():
            yield from on_ranks(num_ranks, partial(_measure, some), options)
        return
    for one in comparisons:
        if has_room(one.what, one.dims, one.tokens, options):
            yield from on_ranks(one.dims.num_ranks, partial(_measure, [one]), options)


def _measure(comparisons: Sequence[Comparison], options: Options) -> list[BenchmarkRow]:
    rows = []
    for one in comparisons:
        with megatron(one.dims):
            rows.append(one.measure(options))
    return rows


def on_ranks(num_ranks: int, measure: Measure, options: Options) -> list[BenchmarkRow]:
    """What ``measure``, called on all ranks, returns on the first; both must be picklable.

    A call has fresh processes, so that it does not meet what another one's heap has kept. One rank
    stays in this process under ``quick``, which measures nothing, and on a GPU, whose allocator
    gives back what is free.

    Raises:
        BenchmarkMismatch: if a rank raised it.
    """
    if num_ranks == 1 and (options.quick or options.device.type == "cuda"):
        rows = measure(options)
        gc.collect()
        torch.cuda.empty_cache()
        return rows
    threads = torch.get_num_threads() if num_ranks == 1 else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = num_ranks, threads, Path(folder), measure, options
        try:
            spawn(_run_rank, arguments, nprocs=num_ranks)
        except ProcessException:
            # The other rank may have failed of it first, by waiting for one that had ended.
            for file in Path(folder).glob("mismatch*"):
                raise BenchmarkMismatch(file.read_text()) from None
            raise
        found: list[BenchmarkRow] = torch.load(Path(folder) / "rows.pt", weights_only=False)
    return found


def _run_rank(
    rank: int, num_ranks: int, threads: int, folder: Path, measure: Measure, options: Options
) -> None:
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=30)
    )
    try:
        rows = measure(options)
    except BenchmarkMismatch as mismatch:
        (folder / f"mismatch{rank}").write_text(str(mismatch))
        raise
    if rank == 0:
        torch.save(rows, folder / "rows.pt")
    dist.barrier()
    dist.destroy_process_group()
