from __future__ import annotations

import pytest
import torch

from megatron_pg.loss import IMPORTANCE_BOUNDS, importance_weights
from tests.loss.dense import Ragged, random_logprobs
from tests.utils import assert_close

RAGGED = Ragged.from_lens([3, 8, 0, 2, 1, 5, 4])
BOUNDS = {
    "token_truncate": (0.6, 1.4),
    "token_mask": (0.6, 1.4),
    "sequence_truncate": (0.75, 1.44),
    "sequence_mask": (0.75, 1.44),
    "geometric_mask": (0.95, 1.1),
}


@pytest.mark.parametrize("mode", sorted(IMPORTANCE_BOUNDS))
def test_equals_dense_formula(mode):
    old, rollout = random_logprobs(RAGGED, 6)
    low, high = BOUNDS[mode]
    got = importance_weights(
        old, rollout, RAGGED.sample_ids, RAGGED.num_samples, mode, low=low, high=high
    )
    ratio = RAGGED.pad((old - rollout).exp().detach())
    mask = RAGGED.mask.bool()
    if mode.startswith("sequence"):
        ratio = torch.where(mask, ratio, 1.0).prod(1, keepdim=True).expand_as(ratio)
    if mode == "geometric_mask":
        product = torch.where(mask, ratio, 1.0).prod(1, keepdim=True)
        mean = product ** (1 / mask.sum(1, keepdim=True).clamp(min=1))
        want = ((mean >= low) & (mean <= high)).double().expand_as(ratio)
    elif mode.endswith("truncate"):
        want = torch.where(ratio > high, high, torch.where(ratio < low, low, ratio))
    else:
        want = ratio * ((ratio >= low) & (ratio <= high))
    assert_close(mode, got, RAGGED.flatten(want), 1e-13)
    assert not got.requires_grad and got.dtype == torch.float64
    statistic = RAGGED.flatten((mean if mode == "geometric_mask" else ratio).expand_as(ratio))
    assert (statistic < low).any() and (statistic > high).any()
    assert ((statistic > low) & (statistic < high)).any()


def test_equal_policies_have_weight_one():
    old, _ = random_logprobs(RAGGED, 7)
    for mode in IMPORTANCE_BOUNDS:
        got = importance_weights(old, old, RAGGED.sample_ids, RAGGED.num_samples, mode)
        assert torch.equal(got, torch.ones_like(got))


def test_default_upper_bound_and_no_overflow():
    old = torch.tensor([0.0, 0.0])
    rollout = torch.tensor([-1e3, -(2.0**0.5)])
    ids = torch.tensor([0, 1])
    assert importance_weights(old, rollout, ids, 2, "token_truncate").tolist() == [2.0, 2.0]
    masked = importance_weights(old, rollout, ids, 2, "token_mask")
    assert masked[0] == 0 and masked[1] > 4
    loose = importance_weights(old, rollout, ids, 2, "sequence_truncate", high=1e30)
    assert torch.isfinite(loose).all()


def test_refusals():
    x, ids = torch.zeros(3), torch.zeros(3).long()
    with pytest.raises(ValueError, match="did you mean 'token_mask'"):
        importance_weights(x, x, ids, 1, "token-mask")
    with pytest.raises(ValueError, match="rollout_logprobs has shape"):
        importance_weights(x, x[:2], ids, 1, "token_mask")
    with pytest.raises(ValueError, match="must not exceed"):
        importance_weights(x, x, ids, 1, "token_mask", low=3.0, high=2.0)
