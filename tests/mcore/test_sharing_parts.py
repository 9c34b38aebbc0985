"""Ordinary rows of which every context-parallel rank is fed a part."""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from megatron_pg.mcore import count_attention_calls, count_shared_tokens
from tests.mcore import harness
from tests.mcore.harness import Case
from tests.mcore.sharing_rows import Row, ThdAttention, Variant, build, call, make_row
from tests.ranks import Pool

pytestmark = pytest.mark.megatron


class GatheringAttention(ThdAttention):
    """Stands for an attention that knows context parallelism: of the whole row, then of a part."""

    def forward(self, *qkv: Tensor, packed_seq_params: Any = None, **more: Any) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        places = torch.cat([part_places(bounds, r, group.size()) for r in range(group.size())])
        whole = [torch.cat(all_gather(x.contiguous(), group))[places.argsort()] for x in qkv[:3]]
        out = super().forward(*whole, None, packed_seq_params=packed_seq_params, **more)
        return out[part_places(bounds, group.rank(), group.size())]


GATHER = torch.distributed.all_gather_into_tensor


def part_places(bounds: list[int], rank: int, size: int) -> Tensor:
    found = []
    for start, end in pairwise(bounds):
        chunks = torch.arange(start, end).chunk(2 * size) if end > start else None
        found += [chunks[rank], chunks[2 * size - 1 - rank]] if chunks else []
    return torch.cat(found)


def small_model(case: Case, variant: Variant | None = None) -> Any:
    harness.initialize(case)
    variant = variant or Variant(case=case)
    (model,) = build(variant, harness.make_config(case), ours=True)
    return model


def own_row(variant: Variant) -> Row:
    rank = parallel_state.get_context_parallel_rank()
    return make_row(variant, 0, 5, rank, variant.case.cp)


def unshared(takes_parts: bool) -> dict[str, Any]:
    """Logits and gradients of a row whose sequences share nothing, with learned positions."""
    case = Case(cp=2, position_embedding_type="learned_absolute")
    variant = Variant(case=case, shares=False, takes_thd=True, core=GatheringAttention)
    with harness.on_cpu():
        model, row = small_model(case, variant), own_row(variant)
        for layer in model.decoder.layers if takes_parts else ():
            layer.self_attention.core_attention.splits_rows = False
        logits = call(model, row, variant)
        logits.backward(row.cotangent[row.part][None])
        return dict(
            logits=logits.detach(),
            gradients={n: p.grad for n, p in model.named_parameters()},
            calls=tuple(count_attention_calls(model)),
        )


def test_rows_that_share_nothing_run_as_they_came(ranks: Pool) -> None:
    """Where the given attention runs parts of rows; packed where it does not."""
    came, packed = (ranks.run(2, unshared, takes) for takes in (True, False))
    for one, other in zip(came, packed):
        assert one["calls"] == (0, 2) and other["calls"] == (2, 0)
        torch.testing.assert_close(one["logits"], other["logits"], rtol=1e-9, atol=1e-9)
    for name in came[0]["gradients"]:
        both = [sum(found["gradients"][name] for found in parts) for parts in (came, packed)]
        assert both[0].norm() > 0
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


def divided(mode: str) -> dict[str, Any]:
    """Places and logits of this rank's part, and the tokens that its output layer ran."""
    case, seen = Case(cp=2), []
    variant = Variant(case=case)
    with harness.on_cpu():
        model, row = small_model(case), own_row(variant)
        model.output_layer.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
        part, params = row.part, copy(row.params)
        if mode == "contiguous":
            part = torch.arange(len(row.tokens)).chunk(2)[
                parallel_state.get_context_parallel_rank()
            ]
            params.cp_partition_mode = mode
        if mode == "own_group":
            params.cp_group = parallel_state.get_context_parallel_group()
            params.local_cp_size = 2
        with patch.object(torch.distributed, "all_gather_into_tensor", wraps=GATHER) as gather:
            logits = model(row.tokens[part][None], packed_seq_params=params)
        counted = count_shared_tokens(model)
        prefixes = [tuple(s[: i + 1].tolist()) for s in row.sequences for i in range(len(s))]
        return dict(
            part=part,
            logits=logits[0].detach(),
            seen=seen,
            needed=len({prefixes[i] for i in part.tolist()}),
            counted=tuple(counted),
            gathered=[call.args[0].numel() for call in gather.call_args_list],
        )


@pytest.mark.parametrize("mode", ["zigzag", "contiguous", "own_group"])
def test_a_rank_gets_the_logits_of_the_tokens_that_it_was_fed(ranks: Pool, mode: str) -> None:
    (want,) = ranks.run(1, whole)
    parts = ranks.run(2, divided, mode)
    places = torch.cat([found["part"] for found in parts])
    assert sorted(places.tolist()) == list(range(len(want)))
    assert (places.tolist() == sorted(places.tolist())) == (mode == "contiguous")
    for found in parts:
        torch.testing.assert_close(found["logits"], want[found["part"]], rtol=1e-9, atol=1e-9)
        # Runs of fewer than 4 tokens are not shared: a few more than are needed.
        (seen,) = found["seen"]
        assert found["needed"] <= seen < 0.9 * len(found["part"])
        unique, logical = found["counted"]
        assert logical == len(want) > 1.3 * unique
        assert found["gathered"] == [logical, unique * 32], "ids, and hidden states of 32"


def whole() -> Tensor:
    """Logits of the row on one rank."""
    case = Case()
    with harness.on_cpu():
        model = small_model(case)
        row = make_row(Variant(case=case), 0, 5, 0, 2)
        return model(row.tokens[None], packed_seq_params=row.params)[0].detach()


def said_of(kind: str) -> str:
    case = Case(cp=2, dp=2, position_embedding_type="learned_absolute")
    variant = Variant(case=case)
    with harness.on_cpu():
        model, row = small_model(case), own_row(variant)
        params, more = copy(row.params), {}
        lens = params.cu_seqlens_q
        tokens = row.tokens[row.part]
        if kind == "bounds of a part":
            params = thd(lens // 2)
        elif kind == "odd lengths":
            params = thd(torch.tensor([0, 6, int(lens[-1])]))
        elif kind == "dynamic":
            params.local_cp_size = 1
        elif kind == "other ranks":
            params.cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        elif kind == "mode":
            params.cp_partition_mode = "striped"
        elif kind == "positions":
            more = dict(position_ids=row.position_ids[None])
        try:
            model(tokens[None], packed_seq_params=params, **more)
        except (ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        return ""


def thd(bounds: Tensor) -> PackedSeqParams:
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


SAID = {
    "bounds of a part": "ValueError: cu_seqlens_q ends at",
    "odd lengths": "each must be a multiple of 4, since a rank has two of its chunks",
    "dynamic": "NotImplementedError: local_cp_size=1",
    "other ranks": "NotImplementedError: cp_group of 4 ranks that are not the model's own",
    "mode": "NotImplementedError: cp_partition_mode='striped'",
    "positions": "ValueError: position_ids has shape",
}


@pytest.mark.parametrize("kind", SAID)
def test_what_no_rank_can_divide_is_refused_on_all(ranks: Pool, kind: str) -> None:
    for said in ranks.run(4, said_of, kind):
        assert SAID[kind] in said
