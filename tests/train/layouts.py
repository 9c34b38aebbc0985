"""Parallel layouts by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch.distributed as dist

from megatron_pg.data import Group
from megatron_pg.grpo import Ranks
from megatron_pg.parallel import PipelineSplit
from megatron_pg.train import TrainConfig
from megatron_pg.train.config import ParallelConfig

LAYOUTS: dict[str, ParallelConfig] = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2_sp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    # Experts with biases are not cut.
    "tp2_ep2_etp1_sp": ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2_vpp2": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "pp2_first": ParallelConfig(pipeline_model_parallel_size=2),
    "pp2_vpp2_ends": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "cp2": ParallelConfig(context_parallel_size=2),
    "cp2_ep2": ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2),
    "cp2_overlap": ParallelConfig(
        context_parallel_size=2, use_distributed_optimizer=True, overlap_grad_reduce=True
    ),
    "cp2_distributed": ParallelConfig(context_parallel_size=2, use_distributed_optimizer=True),
    "dp2": ParallelConfig(),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
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
    "cp2_tp2_sp": ParallelConfig(
        context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "cp2_pp2": ParallelConfig(context_parallel_size=2, pipeline_model_parallel_size=2),
}
# How stages come by the layers of a model of four; evenly where nothing is said.
SPLITS: dict[str, dict[str, Any]] = {
    "pp2_first": {"num_layers_in_first_pipeline_stage": 1},
    # Chunks of the embedding and of the loss alone.
    "pp2_vpp2_ends": {"pipeline_model_parallel_layout": "E|ttt|t|L"},
}
FOUR = ("pp4", "pp2_dp2", "pp2_vpp2_dp2_overlap", "tp2_sp_dp2", "cp2_tp2_sp", "cp2_pp2")
_OF_SPLIT = {field.name for field in fields(PipelineSplit)}
NUM_RANKS = {name: 1 if name == "one" else 4 if name in FOUR else 2 for name in LAYOUTS}


def with_layout(config: TrainConfig, name: str) -> TrainConfig:
    kept = {n: v for n, v in config.model.transformer.items() if n not in _OF_SPLIT}
    model = replace(config.model, transformer=kept | SPLITS.get(name, {}))
    return replace(config, parallel=LAYOUTS[name], model=model)


def own_groups(groups: Sequence[Group], ranks: Ranks) -> dict[int, Group]:
    """Every replica brings some of the groups."""
    return {i: g for i, g in enumerate(groups) if i % ranks.dp_size == ranks.dp_rank}


def gather(mine: Any) -> list[Any]:
    """Every rank's object, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
