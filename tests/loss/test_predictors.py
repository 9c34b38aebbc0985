from __future__ import annotations

import pytest
import torch

from megatron_pg.loss import gather_predictors, plan_predictors
from megatron_pg.tree import PrefixTree, pack_trees
from tests.utils import assert_close


def test_last_prefix_token_collects_the_gradient_of_every_child():
    torch.manual_seed(0)
    tree = PrefixTree.from_group(prefix_len=3, suffix_lens=[2, 1, 4])
    layout = pack_trees([tree], pad_to_multiple=4)
    hidden = torch.randn(layout.total_tokens, 1, 6, dtype=torch.float64, requires_grad=True)
    rows = gather_predictors(hidden, layout.predictor_ids)
    assert torch.equal(rows, hidden[layout.predictor_ids, 0])
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    want = torch.zeros(layout.total_tokens, 6, dtype=torch.float64)
    for place, predictor in enumerate(layout.predictor_ids.tolist()):
        want[predictor] += cotangent[place]
    assert_close("dhidden", hidden.grad[:, 0], want, 1e-14)
    assert (layout.predictor_ids == 2).sum() == 3
    assert (hidden.grad[layout.unique_tokens :] == 0).all()


def test_two_dimensional_hidden_and_no_predictors():
    hidden = torch.randn(5, 4, requires_grad=True)
    rows = gather_predictors(hidden, torch.empty(0, dtype=torch.int64), sequence_parallel=True)
    assert rows.shape == (0, 4)
    rows.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(5, 4))


def test_repeated_rows_are_summed_in_fp32():
    torch.manual_seed(0)
    ids = torch.zeros(600, dtype=torch.int64)
    ids[300:] = torch.arange(1, 301)
    hidden = torch.zeros(301, 8, dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.rand(600, 8).to(torch.bfloat16)
    gather_predictors(hidden, ids).backward(cotangent)
    truth = torch.zeros(301, 8, dtype=torch.float64).index_add(0, ids, cotangent.double())
    assert torch.equal(hidden.grad, truth.to(torch.bfloat16))
    running = torch.zeros(8, dtype=torch.bfloat16)
    for row in cotangent[ids == 0]:
        running += row
    assert not torch.equal(hidden.grad[0], running)


@pytest.mark.parametrize(
    ("hidden_shape", "ids", "message"),
    [
        ((4, 2, 3), torch.tensor([0]), "one packed row"),
        ((4,), torch.tensor([0]), "one packed row"),
        ((4, 1, 3), torch.tensor([4]), r"must lie in \[0, 4\)"),
        ((4, 1, 3), torch.tensor([-1]), r"must lie in \[0, 4\)"),
        ((4, 1, 3), torch.tensor([0], dtype=torch.int32), "int64"),
        ((4, 1, 3), torch.tensor([[0]]), "one-dimensional"),
        ((4, 1, 3), torch.zeros(2, dtype=torch.int64, device="meta"), "on the CPU"),
    ],
)
def test_refusals(hidden_shape, ids, message):
    with pytest.raises(ValueError, match=message):
        gather_predictors(torch.zeros(hidden_shape), ids)


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("cp_size", [2, 3, 8])
@pytest.mark.parametrize("where", ["late", "early", "anywhere", "even", "few", "none"])
def test_context_ranks_make_equally_many_predictions(where, cp_size, sp_size):
    """Rows travel as the plans of all ranks say: every prediction is made once, from its row."""
    total = 12 * cp_size * sp_size
    run = total // cp_size
    torch.manual_seed(cp_size)
    ids = {
        "late": torch.randint(total - run, total, (41,)),
        "early": torch.randint(0, run, (41,)),
        "anywhere": torch.randint(0, total, (41,)),
        "even": torch.arange(total),
        "few": torch.tensor([0] * (cp_size - 1)),
        "none": torch.empty(0, dtype=torch.int64),
    }[where]
    plans = [
        plan_predictors(
            ids,
            total // cp_size // sp_size,
            tp_size=sp_size,
            sequence_parallel=sp_size > 1,
            cp_rank=rank,
            cp_size=cp_size,
        )
        for rank in range(cp_size)
    ]
    hidden = torch.randn(total, 3)
    own = []
    for rank, plan in enumerate(plans):
        slots = [hidden[rank * run : (rank + 1) * run][plan.local_ids]]
        if sp_size > 1:  # what both ranks of sequence parallelism send
            parts = [
                plan_predictors(
                    ids,
                    total // cp_size // sp_size,
                    tp_rank=tp_rank,
                    tp_size=sp_size,
                    sequence_parallel=True,
                    cp_rank=rank,
                    cp_size=cp_size,
                )
                for tp_rank in range(sp_size)
            ]
            slots = []
            for tp_rank, part in enumerate(parts):
                start = rank * run + tp_rank * part.num_tokens
                rows = hidden[start : start + part.num_tokens][part.local_ids]
                slots.append(torch.cat([rows, rows.new_zeros(part.num_slots - len(rows), 3)]))
        joined = torch.cat(slots)
        own.append(joined if sp_size == 1 else joined[plan.order])
    assert len({plan.sent is None for plan in plans}) == 1
    assert (plans[0].sent is None) == (where in ("even", "none"))
    for rank, plan in enumerate(plans):
        got = own[rank]
        if plan.sent is not None:
            assert plan.received == tuple(other.sent[rank] for other in plans)
            starts = [sum(other.sent[:rank]) for other in plans]
            got = torch.cat([rows[at : at + n] for rows, at, n in zip(own, starts, plan.received)])
        assert torch.equal(got, hidden[ids[plan.share]])
        assert len(plan.share) in (len(ids) // cp_size, -(-len(ids) // cp_size))
    shares = torch.cat([plan.share for plan in plans])
    assert shares.sort().values.tolist() == list(range(len(ids)))


def test_a_plan_is_of_as_many_context_ranks_as_the_group():
    plan = plan_predictors(torch.tensor([1, 5]), 4, cp_rank=1, cp_size=2)
    with pytest.raises(ValueError, match="for several context-parallel ranks, cp_group has 1"):
        gather_predictors(torch.zeros(4, 3), plan)
