from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg.loss import ADVANTAGE_ESTIMATORS, group_advantages, overlong_penalty
from tests.utils import assert_close


def by_group(rewards: list[float], ids: list[int]) -> list[list[float]]:
    """For every sample the rewards of its whole group."""
    return [[r for r, i in zip(rewards, ids) if i == own] for own in ids]


def grpo(reward: float, group: list[float], floor: float, normalise: bool, eps: float) -> float:
    if len(group) == 1:
        return reward / (max(1.0, floor) + eps) if normalise else reward
    if min(group) == max(group):
        return 0.0
    centred = reward - statistics.fmean(group)
    return centred / (max(statistics.stdev(group), floor) + eps) if normalise else centred


def whitened(values: list[float], counts: list[int]) -> list[float]:
    tokens = [v for v, n in zip(values, counts) for _ in range(n)]
    mean, variance = statistics.fmean(tokens), statistics.variance(tokens)
    return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


def case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([7, 2, 2, 9, 7, 7, 2, 4, 9, 5, 5, 5])
    rewards = torch.randn(len(ids), generator=generator, dtype=torch.float64)
    rewards[ids == 5] = 0.1
    return rewards, ids


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0, -2.5]), st.integers(-2, 3)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0.0, 0.4]),
    st.booleans(),
)
def test_grpo(samples, std_floor, normalise):
    rewards, ids = (list(column) for column in zip(*samples))
    got = group_advantages(
        torch.tensor(rewards),
        torch.tensor(ids),
        norm_adv_by_std=normalise,
        std_floor=std_floor if normalise else 0.0,
        epsilon=1e-6,
    )
    assert got.advantages.dtype == torch.float64
    rewards = torch.tensor(rewards).double().tolist()
    groups = by_group(rewards, ids)
    want = [grpo(r, g, std_floor, normalise, 1e-6) for r, g in zip(rewards, groups)]
    torch.testing.assert_close(
        got.advantages, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    spread = [min(g) < max(g) for g in groups]
    assert got.has_spread[got.group_numbers].tolist() == spread
    assert len(got.has_spread) == len(set(ids))


def test_flat_group_is_exactly_zero_and_group_of_one_is_its_reward():
    rewards, ids = case(0)
    got = group_advantages(rewards, ids)
    assert (got.advantages[ids == 5] == 0).all()
    assert rewards[ids == 5].mean() != 0.1
    assert_close("one", got.advantages[ids == 4], rewards[ids == 4] / (1 + 1e-6), 1e-15)
    assert got.has_spread.tolist() == [True, False, False, True, True]


def test_std_floor_keeps_noise_small():
    rewards, ids = torch.tensor([1.0, 1.0, 1.0 + 1e-5]).double(), torch.zeros(3).long()
    assert group_advantages(rewards, ids).advantages.max() > 0.9
    assert group_advantages(rewards, ids, std_floor=0.1).advantages.abs().max() < 1e-4


def test_rloo():
    rewards, ids = case(1)
    want = []
    for i, reward in enumerate(rewards.tolist()):
        others = [r for j, r in enumerate(rewards.tolist()) if ids[j] == ids[i] and j != i]
        want.append(reward - (statistics.fmean(others) if others else 0.0))
    got = group_advantages(rewards, ids, estimator="rloo").advantages
    assert_close("rloo", got, torch.tensor(want, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("with_counts", [False, True])
def test_reinforce_plus_plus(with_counts):
    rewards, ids = case(2)
    counts = list(range(len(rewards))) if with_counts else None
    weights = counts or [1] * len(rewards)
    counts = None if counts is None else torch.tensor(counts)
    got = group_advantages(
        rewards, ids, estimator="reinforce_plus_plus", trained_counts=counts
    ).advantages
    want = whitened(rewards.tolist(), weights)
    assert_close("reinforce_plus_plus", got, torch.tensor(want, dtype=torch.float64), 1e-13)
    got = group_advantages(
        rewards, ids, estimator="reinforce_plus_plus_baseline", trained_counts=counts
    ).advantages
    groups = by_group(rewards.tolist(), ids.tolist())
    centred = [
        r - (statistics.fmean(g) if len(g) > 1 else 0.0) for r, g in zip(rewards.tolist(), groups)
    ]
    want = whitened(centred, weights)
    assert_close(
        "reinforce_plus_plus_baseline", got, torch.tensor(want, dtype=torch.float64), 1e-13
    )


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_order_of_samples_does_not_matter(estimator):
    rewards, ids = case(3)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    straight = group_advantages(rewards, ids, estimator=estimator).advantages
    shuffled = group_advantages(rewards[order], ids[order], estimator=estimator).advantages
    assert_close(estimator, shuffled, straight[order], 1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "rlo"}, "did you mean 'rloo'"),
        ({"estimator": "dr_grpo"}, "did you mean 'grpo'"),
        ({"group_ids": torch.zeros(2).long()}, "group_ids has shape"),
        ({"rewards": torch.zeros(3, 1)}, "rewards has shape"),
        ({"trained_counts": torch.zeros(2).long()}, "trained_counts has shape"),
        ({"rewards": torch.tensor([0.0, math.nan, 1.0])}, r"rewards\[1\]=nan"),
        ({"std_floor": -1.0}, "std_floor=-1.0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"std_floor": 0.1, "norm_adv_by_std": False}, "std_floor=0.1 needs"),
        ({"std_floor": 0.1, "estimator": "rloo"}, "std_floor=0.1 needs"),
        ({"norm_adv_by_std": False, "estimator": "rloo"}, "norm_adv_by_std=False needs"),
        (
            {"estimator": "reinforce_plus_plus", "trained_counts": torch.tensor([1, 0, 0])},
            "at least 2 trained tokens",
        ),
    ],
)
def test_refusals(options, message):
    arguments = {"rewards": torch.arange(3.0), "group_ids": torch.zeros(3).long()} | options
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)


def test_an_estimator_of_one_s_own_gives_one_advantage_a_sample(monkeypatch):
    monkeypatch.setitem(ADVANTAGE_ESTIMATORS, "mean", lambda groups: groups.rewards.mean())
    with pytest.raises(ValueError, match=r"advantages has shape \(\), .* length of rewards"):
        group_advantages(torch.arange(3.0), torch.zeros(3).long(), estimator="mean")


def test_overlong_penalty():
    lens = torch.tensor([1, 80, 81, 90, 100, 130])
    got = overlong_penalty(lens, 100, 20, penalty_factor=0.5)
    want = [0, 0, -0.025, -0.25, -0.5, -0.5]
    assert_close("penalty", got, torch.tensor(want, dtype=torch.float64), 1e-15)
    verl = [min(-(n - 80) / 20 * 0.5, 0) for n in lens.tolist()]
    assert_close(
        "verl up to the limit", got[:5], torch.tensor(verl, dtype=torch.float64)[:5], 1e-15
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0), "overlong_buffer_len=0"),
        ((100, 101), "overlong_buffer_len=101"),
        ((100, 20, -1.0), "penalty_factor=-1.0"),
    ],
)
def test_overlong_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([3]), *arguments)
