"""Parallel layouts by name, and how several of them follow each other in one set of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_pg.data import Group
from megatron_pg.grpo import Ranks
from megatron_pg.mcore import cpu
from megatron_pg.train import TrainConfig
from megatron_pg.train.config import ParallelConfig
from megatron_pg.train.ranks import _initialize_model_parallel

LAYOUTS: dict[str, ParallelConfig] = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2_sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2_vpp2": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "dp2": ParallelConfig(),
    "dp2_distributed": ParallelConfig(use_distributed_optimizer=True),
    "tp2_sp_distributed": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True
    ),
    "dp2_overlap": ParallelConfig(overlap_grad_reduce=True),
    "pp4": ParallelConfig(pipeline_model_parallel_size=4),
    "pp2_dp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2_vpp2_dp2_overlap": ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        overlap_grad_reduce=True,
    ),
    "tp2_sp_dp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}


def with_layout(config: TrainConfig, name: str) -> TrainConfig:
    return replace(config, parallel=LAYOUTS[name])


@contextmanager
def cpu_ranks() -> Iterator[None]:
    """One thread, Megatron's CPU stand-ins."""
    torch.set_num_threads(1)
    with cpu.emulate_cuda():
        yield


def each_layout(names: Sequence[str], seed: int = 1234) -> Iterator[tuple[str, Ranks]]:
    """Lay every layout's groups anew over the ranks of ``run_ranks``; they end with each."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, size, rank == 0)
    for number, name in enumerate(names):
        own = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        yield name, _initialize_model_parallel(LAYOUTS[name], seed)
        dist.barrier()
        dist.destroy_process_group()
    # The store's host leaves last.
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < size:
        time.sleep(0.01)


def own_groups(groups: Sequence[Group], ranks: Ranks) -> dict[int, Group]:
    """Every replica brings some of the groups."""
    return {i: g for i, g in enumerate(groups) if i % ranks.dp_size == ranks.dp_rank}


def gather(mine: Any) -> list[Any]:
    """Every rank's object, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
