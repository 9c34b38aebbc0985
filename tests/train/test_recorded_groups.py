"""Advantages and weights of groups with rollouts of several samples, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core")


from megatron_pg.data import Group, read_rollouts, without_aborted  # noqa: E402
from megatron_pg.grpo import GrpoConfig, StepShape, compute_advantages  # noqa: E402
from tests.data.samples import make_sample  # noqa: E402
from tests.data.slime import PLAIN, SLIME, P, Q, save_slime, slime_sample  # noqa: E402


def advantages(groups: list[Group], algorithm: GrpoConfig | None = None) -> torch.Tensor:
    shape = StepShape.of(groups)
    return compute_advantages(shape, torch.from_numpy(shape.rewards), algorithm or GrpoConfig())


@pytest.mark.parametrize("case", SLIME)
def test_advantages_of_slime_s_groups(tmp_path, case):
    samples, _ = SLIME[case]
    groups = read_rollouts(save_slime(tmp_path / "7.pt", samples))
    rewards = torch.cat([g.rewards for g in groups])
    got = advantages(groups)
    # Two rollouts with rewards 1 and 0: half a point from the mean, a deviation of sqrt(1 / 2).
    want = (2 * rewards - 1) * 0.5**0.5
    assert torch.allclose(got, want, atol=2e-6) and len(rewards) == len(samples)


def test_an_aborted_sample_does_not_count(tmp_path):
    aborted = {"status": "aborted", "rollout_log_probs": None, "loss_mask": None}
    samples = [*PLAIN[:1], slime_sample(0, 8, P, [], None, **aborted), *PLAIN[1:]]
    samples += [slime_sample(2, 9, Q, [4], 9.0, **aborted)]
    groups = read_rollouts(save_slime(tmp_path / "7.pt", samples))
    assert [len(g.samples) for g in groups] == [3, 2, 1]
    half, judged = 0.5**0.5, without_aborted(groups)
    assert [len(g.samples) for g in judged] == [2, 2]
    got = advantages(judged)
    assert torch.allclose(got, torch.tensor([half, -half, -half, half]).double(), atol=2e-6)
    assert StepShape.of(groups).statistics()["response_length/aborted"] == 2 / 6


def rollouts(*parts: tuple[float, list[int]]) -> list[Group]:
    """A group of rollouts: reward, and trained tokens of every part."""
    samples = [
        replace(make_sample([1, 2], [3] * n, reward=reward), rollout_id=str(i))
        for i, (reward, lens) in enumerate(parts)
        for n in lens
    ]
    return [Group("g", tuple(samples))]


ONE = [(1.0, [2]), (0.0, [5]), (0.5, [3])]
# The same rollouts in parts, with as many tokens each.
PARTS = [(1.0, [1, 1]), (0.0, [5]), (0.5, [1, 1, 1])]


@pytest.mark.parametrize(
    "estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_parts_take_the_advantage_of_the_whole(estimator):
    algorithm = GrpoConfig(adv_estimator=estimator)
    whole, parts = rollouts(*ONE), rollouts(*PARTS)
    want = advantages(whole, algorithm)
    got = advantages(parts, algorithm)
    assert torch.equal(got, want[[0, 0, 1, 2, 2, 2]]) and want.unique().numel() == 3
    # Counted by samples they would be others.
    alone = [Group("g", tuple(replace(s, rollout_id=None) for s in parts[0].samples))]
    if estimator in ("grpo", "rloo"):
        assert not torch.allclose(advantages(alone, algorithm), got)


def test_rollouts_are_counted_over_groups():
    groups = rollouts(*ONE) + rollouts(*PARTS)
    shape = StepShape.of(groups)
    assert shape.rollout_numbers.tolist() == [0, 1, 2, 3, 3, 4, 5, 5, 5]
    assert shape.rollout_counts.tolist() == [2, 5, 3] * 2
    assert shape.rollout_firsts.tolist() == [0, 1, 2, 3, 5, 6]


def test_parts_of_different_rewards_are_refused():
    groups = rollouts(*PARTS)
    shaped = groups[0].rewards - torch.arange(6)
    with pytest.raises(ValueError, match="one rollout of group 'g' have different rewards"):
        compute_advantages(StepShape.of(groups), shaped, GrpoConfig())
