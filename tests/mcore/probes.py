"""Routers and MLPs that write down what they are handed, in place of a layer's own."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_pg import PackedLayout
from tests.mcore import harness

# (tokens of the hidden states, mask as it was handed)
Records = list[tuple[int, Tensor | None]]


def probing_mlp(records: Records) -> type:
    class ProbingMLP(MLP):
        reads_row_mask = True

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.pop("padding_mask", None)
            records.append((len(hidden_states), mask))
            return super().forward(hidden_states, *args, **kwargs)

    return ProbingMLP


def probing_router(records: Records) -> type:
    class ProbingRouter(TopKRouter):
        reads_row_mask = True

        def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **more: Any) -> Any:
            # MoELayer has put tokens first.
            mask = None if padding_mask is None else padding_mask.transpose(0, 1)
            records.append((logits.numel() // self.config.num_moe_experts, mask))
            return super().routing(logits, **more)

    return ProbingRouter


def with_probe(layer: ModuleSpec, records: Records) -> ModuleSpec:
    """The layer's spec with its router replaced, or its MLP where it has no router."""
    mlp = layer.submodules.mlp
    parts = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    is_moe = hasattr(parts, "router")
    if is_moe:
        parts = replace(parts, router=probing_router(records))
    if isinstance(mlp, ModuleSpec):  # before core 0.19
        probed: Any = replace(mlp, submodules=parts)
        probed = probed if is_moe else replace(probed, module=probing_mlp(records))
    else:
        function = mlp.func if is_moe else probing_mlp(records).as_mlp_submodule
        probed = partial(function, *mlp.args, **(mlp.keywords | {"submodules": parts}))
    return replace(layer, submodules=replace(layer.submodules, mlp=probed))


@contextmanager
def probed_layers(records: Records):
    """Within, the harness builds models of probed layers."""
    stock = harness.get_gpt_layer_local_spec
    with mock.patch.object(
        harness, "get_gpt_layer_local_spec", lambda **kw: with_probe(stock(**kw), records)
    ):
        yield


def membership(layout: PackedLayout) -> Tensor:
    """``[samples, tokens, 1]``, sample by sample."""
    members = torch.zeros(layout.num_samples, layout.total_tokens, 1, dtype=torch.bool)
    for sample in range(layout.num_samples):
        members[sample, layout.sample_indices(sample)] = True
    assert torch.equal(members.sum(0)[:, 0], layout.multiplicity)
    return members


def check_records(records: Records, rows: list[harness.Rows], calls_per_row: int) -> None:
    """Every call was handed the mask of the row whose hidden states it got."""
    by_length = {row.layout.total_tokens: membership(row.layout) for row in rows}
    assert len(by_length) == len(rows) > 1, "rows are told apart by their lengths"
    assert Counter(length for length, _ in records) == dict.fromkeys(by_length, calls_per_row)
    for length, mask in records:
        assert mask is not None and mask.dtype == torch.bool
        assert torch.equal(mask, by_length[length]), f"another row's mask at {length} tokens"
