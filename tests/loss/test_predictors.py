from __future__ import annotations

import pytest
import torch

from megatron_pg.loss import gather_predictors
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
