"""Queries and keys turned by a row's own table: the bits of Megatron's kernels, made once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import Attention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.mcore import PrefixGroupedGPTModel, PrefixGroupedSeqParams
from megatron_pg.mcore.layers.rotary import turn_heads, turns_by_row
from tests.mcore import cases, harness

pytestmark = pytest.mark.megatron
CONFIG = dict(
    apply_rope_fusion=False,
    rotary_interleaved=False,
    no_rope_freq=None,
    kv_channels=8,
    multi_latent_attention=False,
)


def a_row() -> PrefixGroupedSeqParams:
    return PrefixGroupedSeqParams.from_layout(pack_trees([PrefixTree.from_group(5, [3, 4])]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_megatron_s(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    row = a_row()
    half = torch.randn(row.max_seqlen_q, 1, 1, 4)
    table = torch.cat([half, half], -1)
    # As the projection of queries, keys and values is split.
    mixed = torch.randn(12, 1, 3, 24, dtype=dtype, requires_grad=True)
    x, cotangent = mixed.split(8, -1)[1], torch.randn(12, 1, 3, 8, dtype=dtype)
    got = turn_heads(x, *row.rotary.cos_and_sin(table, dtype))
    config: Any = SimpleNamespace(**CONFIG)
    want = apply_rotary_pos_emb(x, table[row.position_ids], config, cp_group=config)
    assert torch.equal(got, want) and not torch.equal(got, x)
    gradients = [torch.autograd.grad(out, mixed, cotangent)[0] for out in (got, want)]
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.mark.parametrize(
    ("changes", "width", "expected"),
    [
        ({}, 8, True),
        ({}, 4, False),
        (dict(apply_rope_fusion=True), 8, False),
        (dict(rotary_interleaved=True), 8, False),
        (dict(no_rope_freq=[0, 1]), 8, False),
        (dict(no_rope_freq=[1, 0]), 8, True),
        (dict(yarn_rotary_scaling_factor=4.0), 8, False),
    ],
)
def test_layers_whose_heads_are_turned_so(
    changes: dict[str, Any], width: int, expected: bool
) -> None:
    layer = SimpleNamespace(config=SimpleNamespace(**CONFIG | changes), layer_number=2)
    forward = SimpleNamespace(__func__=Attention.forward)
    assert turns_by_row(layer, forward, torch.zeros(9, 1, 1, width)) is expected
    assert not turns_by_row(layer, lambda: None, torch.zeros(9, 1, 1, width))
    assert not turns_by_row(layer, forward, None)


class _Cosines(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func in (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [{}, cases.FULL_RECOMPUTE, cases.SELECTIVE_RECOMPUTE])
def test_one_table_for_all_layers(one_rank: None, recompute: dict[str, Any]) -> None:
    case = harness.Case(config=recompute, predictions=False)
    (model,) = harness.build(case, harness.make_config(case), packed=True)
    assert isinstance(model, PrefixGroupedGPTModel) and len(model.decoder.layers) > 1
    row = a_row()
    tokens = torch.arange(12)[None]
    with _Cosines() as made:
        model(tokens, row.position_ids[None], None, packed_seq_params=row).sum().backward()
    assert made.count == 2
