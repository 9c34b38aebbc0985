"""The process group of a run and where this rank stands in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ..grpo import Ranks
from ..mcore import cpu
from .config import ParallelConfig
from .launcher import launched_world_size


@contextmanager
def parallel_run(config: ParallelConfig, seed: int) -> Iterator[Ranks]:
    """Initialise torch.distributed and Megatron's groups for the body of the ``with`` block.

    On machines without CUDA the group is gloo and Megatron-Core runs on its CPU stand-ins. Without
    a launcher's environment the job is one rank.

    Raises:
        ValueError: if the ranks hold no whole replica, or the launcher's environment is incomplete.
    """
    has_cuda = torch.cuda.is_available()
    with nullcontext() if has_cuda else cpu.emulate_cuda():
        _initialize_process_group(config, has_cuda)
        try:
            yield _initialize_model_parallel(config, seed)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _initialize_process_group(config: ParallelConfig, has_cuda: bool) -> None:
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    settings: dict[str, Any] = {
        "backend": "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
        "timeout": timedelta(minutes=config.distributed_timeout_minutes),
    }
    if "MASTER_ADDR" not in os.environ:
        if launched_world_size() > 1:
            raise ValueError(
                f"WORLD_SIZE={launched_world_size()} without MASTER_ADDR; start the ranks with "
                "torchrun"
            )
        settings |= {"store": torch._C._distributed_c10d.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**settings)


def _initialize_model_parallel(config: ParallelConfig, seed: int) -> Ranks:
    config.sizes.check(world_size=dist.get_world_size())
    parallel_state.initialize_model_parallel(
        **config.sizes.group_arguments(),
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    seed_everything(seed)
    return Ranks.from_megatron()


def seed_everything(seed: int) -> None:
    """Make the next model that is built depend on ``seed`` alone."""
    # Stages hold different layers, so they must not draw the same numbers.
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    # Without CUDA there is no generator to fork: dropout is off, weights are made on the CPU.
    model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=not torch.cuda.is_available(), force_reset_rng=True
    )
