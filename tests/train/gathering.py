"""What each rank holds of the optimizer's state while a checkpoint is written."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_pg.train import TrainConfig
from tests.train import forked


def train_and_weigh(config: TrainConfig) -> None:
    """A whole run that says what each rank hands over for a checkpoint."""
    save = dist_checkpointing.save

    def weigh(state: dict, *args: object, **settings: object) -> object:
        kinds = ShardedTensor | ShardedTensorFactory
        parts = [part for part in nested_values(state["optimizer"]) if isinstance(part, kinds)]
        size = sum(part.data.nbytes for part in parts)
        print(f"rank {dist.get_rank()} saves {size} bytes of optimizer state", flush=True)
        return save(state, *args, **settings)

    with mock.patch.object(dist_checkpointing, "save", weigh):
        forked.train(config)


def assert_gathered_once(
    log: Path, num_parameters: int, num_ranks: int, is_distributed: bool
) -> None:
    """The optimizer's whole state is with the first data-parallel rank, and with no other."""
    sizes = re.findall(r"rank (\d) saves (\d+) bytes of optimizer state", log.read_text())
    # Two moments, and of a distributed optimizer the parameters once more, of four bytes each.
    whole = (3 if is_distributed else 2) * 4 * num_parameters
    held = {int(rank): int(size) for rank, size in sizes}
    assert held == {rank: 0 if rank else whole for rank in range(num_ranks)}, held
