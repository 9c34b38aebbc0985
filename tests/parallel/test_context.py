"""Tokens exchanged for heads and back, against the whole row on one rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pg.parallel import ContextPart, exchanged_values, kv_head_copies
from tests.ranks import Pool, process_group

TOTAL, DIM, VALUE_DIM = 12, 3, 2


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 8, 12, 32])
def test_every_rank_gets_the_key_heads_of_its_queries_and_no_other(num_heads: int) -> None:
    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    for num_kv_heads in divisors(num_heads):
        per_kv_head = num_heads // num_kv_heads
        for size in divisors(num_heads):
            copies = kv_head_copies(num_heads, num_kv_heads, size)
            sent = [kv for kv in range(num_kv_heads) for _ in range(copies)]
            queries = num_heads // len(sent)
            assert len(sent) % size == 0
            for head in range(num_heads):
                assert sent[head // queries] == head // per_kv_head
            # As few as can be: whole groups of queries are sent their head once.
            assert (copies == 1) == (num_heads // size % per_kv_head == 0)


def exchange(num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    """One rank's heads, their way back, gradients and the bytes that it sent."""
    with process_group():
        group: Any = dist.group.WORLD
        part = ContextPart(group, TOTAL)
        g = torch.Generator().manual_seed(0)
        whole = [
            torch.randn(TOTAL, heads, dim, generator=g, dtype=torch.float64)
            for heads, dim in (
                *((num_heads, DIM), (num_kv_heads, DIM), (num_kv_heads, VALUE_DIM)),
                (num_heads, VALUE_DIM),
            )
        ]
        *tensors, dout = whole
        own = [x[part.tokens].clone().requires_grad_() for x in tensors]
        sent = 0
        given = dist.all_to_all_single

        def counted(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += (x.numel() - x[0].numel()) * x.element_size()
            return given(out, x, *args, **kwargs)

        with mock.patch.object(dist, "all_to_all_single", counted):
            q, k, v = part.heads_from_tokens(
                own[0], part.spread(own[1], num_heads), part.spread(own[2], num_heads)
            )
            per_kv = q.shape[1] // k.shape[1]
            # A product that tells which key and value every query head got.
            made = q.sum(2, keepdim=True) * k.repeat_interleave(per_kv, 1).sum(2, keepdim=True)
            out = part.tokens_from_heads(made * v.repeat_interleave(per_kv, 1))
        sent_forward, sent = sent, 0
        with mock.patch.object(dist, "all_to_all_single", counted):
            out.backward(dout[part.tokens])
        leaves = [x.clone().requires_grad_() for x in tensors]
        copies = num_heads // num_kv_heads
        made = leaves[0].sum(2, keepdim=True)
        made = made * leaves[1].repeat_interleave(copies, 1).sum(2, keepdim=True)
        want = made * leaves[2].repeat_interleave(copies, 1)
        want.backward(dout)
        return dict(
            out=bool(torch.allclose(out, want[part.tokens], rtol=1e-12, atol=1e-12)),
            grads=[
                torch.allclose(mine.grad, leaf.grad[part.tokens], rtol=1e-12, atol=1e-12)  # type: ignore[index, arg-type]
                for mine, leaf in zip(own, leaves)
            ],
            sent=(sent_forward, sent),
        )


@pytest.mark.parametrize(
    ("size", "num_heads", "num_kv_heads"),
    [(2, 4, 4), (2, 4, 2), (2, 4, 1), (4, 4, 2), (4, 8, 1), (2, 6, 3), (3, 6, 2)],
)
def test_tokens_and_heads_are_exchanged_both_ways(
    ranks: Pool, size: int, num_heads: int, num_kv_heads: int
) -> None:
    """Values, gradients and the bytes that the README's formula has."""
    copies = kv_head_copies(num_heads, num_kv_heads, size)
    per_token = num_heads * (DIM + VALUE_DIM) + copies * num_kv_heads * (DIM + VALUE_DIM)
    expected = TOTAL // size * per_token * (size - 1) // size * 8
    said = exchanged_values(num_heads, num_kv_heads, DIM + VALUE_DIM, size)
    assert TOTAL * said * 8 == pytest.approx(expected)
    for found in ranks.run(size, exchange, num_heads, num_kv_heads):
        assert found["out"] and all(found["grads"])
        assert found["sent"] == (expected, expected)


def join() -> tuple[list[float], list[float]]:
    """Values of two ranks on both, and one rank's gradient of what both make of them."""
    with process_group():
        rank = dist.get_rank()
        part = ContextPart(dist.group.WORLD, TOTAL)  # type: ignore[arg-type]
        places = torch.tensor([[0, 3], [1, 2, 4]][rank])
        own = (places.double() + 1).requires_grad_()
        joined = part.join(own, places, 5)
        joined.square().sum().backward()
        assert own.grad is not None
        return joined.tolist(), own.grad.tolist()


def test_values_of_all_ranks_stand_on_each_and_count_once(ranks: Pool) -> None:
    first, second = ranks.run(2, join)
    assert first[0] == second[0] == [1, 2, 3, 4, 5]
    assert (first[1], second[1]) == ([2, 8], [4, 6, 10])
