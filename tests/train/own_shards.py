"""On two data-parallel ranks: a distributed optimizer's state saved by parts, and gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_pg.checkpoint import TorchDistReader
from megatron_pg.train import TrainConfig
from megatron_pg.train.checkpoints import checkpoints
from megatron_pg.train.checkpoints.checkpoints import sharded_state
from megatron_pg.train.checkpoints.own_shards import with_own_shards
from megatron_pg.train.checkpoints.torch_adam import loading_torch_adam
from megatron_pg.train.checkpoints.write import CheckpointWrite, SaveStrategy
from megatron_pg.train.model import TrainedModel, build_trained_model
from megatron_pg.train.model.plan import plan_model
from tests.train import tiny

STATE = "optimizer.state."


@contextmanager
def gathered() -> Iterator[None]:
    """Megatron's own way inside the block, which gathers in host memory."""
    metadata = checkpoints._METADATA | {"distrib_optim_fully_reshardable_mem_efficient": True}
    with (
        mock.patch.object(checkpoints, "with_own_shards", lambda optimizer: nullcontext()),
        mock.patch.object(checkpoints, "_METADATA", metadata),
    ):
        yield


def save(model: TrainedModel, folder: Path) -> int:
    """Bytes of the optimizer's state that this rank hands over."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    state = sharded_state(model, is_loading=False)
    kinds = ShardedTensor | ShardedTensorFactory
    parts = [part for part in nested_values(state["optimizer"]) if isinstance(part, kinds)]
    size = sum(part.data.nbytes for part in parts)
    write = CheckpointWrite(
        state, folder, SaveStrategy(), in_background=False, publish=lambda own: None
    )
    write.finish()
    return size


def state_of(model: TrainedModel) -> list[torch.Tensor]:
    return [
        value.detach().clone()
        for part in model.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for value in (parameter, *part.optimizer.state[parameter].values())
    ]


def save_both(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """A step, a checkpoint of each kind, and what comes of loading them."""
    with tiny.opened(config) as trainer:
        trainer.train_step()
        model = trainer.model
        sizes = {"ours": save(model, folder / "ours")}
        with gathered():
            sizes["theirs"] = save(model, folder / "theirs")
        readers = [TorchDistReader(folder / name) for name in ("ours", "theirs")]
        names = sorted(readers[0].tensors)
        rank, chunks = f"__{dist.get_rank()}_", readers[0].tensors.items()
        written = [
            prod(chunk.sizes) * tensor.dtype.itemsize
            for _, tensor in chunks
            for chunk in tensor.chunks
            if chunk.file.startswith(rank)
        ]
        want, equal = state_of(model), {}
        for name in sizes:
            fresh = build_trained_model(config, plan_model(config.model, config.parallel), 1)
            ways = with_own_shards(fresh.optimizer) if name == "theirs" else gathered()
            with loading_torch_adam(fresh.optimizer), ways:
                loaded = dist_checkpointing.load(
                    sharded_state(fresh, is_loading=True), str(folder / name)
                )
                fresh.optimizer.load_state_dict(loaded["optimizer"])
            got = state_of(fresh)
            equal[name] = len(got) == len(want) and all(map(torch.equal, got, want))
        return {
            "sizes": sizes,
            "written": sum(written),
            "same_names": names == sorted(readers[1].tensors),
            "tensors": sum(STATE in name for name in names),
            "parts": max(len(readers[0].tensors[name].chunks) for name in names),
            "differ": [n for n in names if not torch.equal(*(r.read(n) for r in readers))],
            "loaded": equal,
            "whole": 12 * sum(p.numel() for p in model.chunks[0].parameters()),
        }
