"""Experts as one module on the CPU: Megatron's for Transformer Engine over a plain linear layer."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any

import torch
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class GroupedLinear(torch.nn.Module):
    """``TEGroupedLinear`` by its signature: a weight for each expert, tokens in their order."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        bias: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        assert not bias and pg_collection.expt_tp.size() == 1
        super().__init__()
        for number in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(output_size, input_size, dtype=config.params_dtype)
            )
            init_method(weight)
            weight.allreduce = pg_collection.ep.size() == 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: Tensor, splits: list[int]) -> tuple[Tensor, None]:
        """Each expert's tokens by its weight."""
        parts = x.split(splits)
        return torch.cat([p @ w.t() for p, w in zip(parts, self.parameters())]), None


def with_grouped_experts(block: Any) -> Any:
    """Block submodules whose layers with experts have ``TEGroupedMLP``; for a rank of its own."""
    # By default it asks Transformer Engine for the state of fp8.
    given = CheckpointWithoutOutput.__init__
    CheckpointWithoutOutput.__init__ = partialmethod(given, fp8=None)  # type: ignore
    return replace(block, layer_specs=[_grouped(layer) for layer in block.layer_specs])


def _grouped(layer: Any) -> Any:
    mlp = layer.submodules.mlp
    parts = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    if not hasattr(parts, "experts"):
        return layer
    parts = copy(parts)
    if hasattr(experts, "GroupedMLPSubmodules"):
        own = experts.GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
        parts.experts = partial(TEGroupedMLP, submodules=own)
    else:
        own = experts.MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
        parts.experts = ModuleSpec(module=TEGroupedMLP, submodules=own)
    if hasattr(mlp, "submodules"):
        mlp = replace(mlp, submodules=parts)
    else:
        mlp = partial(mlp.func, *mlp.args, **mlp.keywords | dict(submodules=parts))
    return replace(layer, submodules=replace(layer.submodules, mlp=mlp))
