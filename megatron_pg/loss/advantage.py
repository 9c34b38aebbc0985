"""Advantages from the rewards of groups, and rewards shaped by length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_at_least, check_name, check_same_length


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupAdvantages:
    """Advantages of N samples and the groups that teach nothing.

    Attributes:
        advantages: ``[N]`` float64, one per sample; every trained token of the sample takes it.
        group_numbers: ``[N]`` int64 in [0, num_groups): the sample's group, groups numbered by
            ascending ``group_id``.
        has_spread: ``[num_groups]`` bool, False where all rewards of the group are equal (a group
            of one included). ``has_spread[group_numbers]`` is the same per sample.
    """

    advantages: Tensor
    group_numbers: Tensor
    has_spread: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RewardGroups:
    """What an estimator reads of N samples in groups.

    Attributes:
        rewards: ``[N]`` float64.
        numbers: ``[N]`` group of every sample.
        sizes: ``[num_groups]`` samples.
        means: ``[num_groups]`` mean reward; 0 for a group of one, as in verl.
        has_spread: ``[num_groups]`` bool, False where all rewards of the group are equal.
        norm_adv_by_std, std_floor, epsilon: as ``group_advantages`` takes them.
        trained_counts: ``[N]`` trained tokens.
    """

    rewards: Tensor
    numbers: Tensor
    sizes: Tensor
    means: Tensor
    has_spread: Tensor
    norm_adv_by_std: bool
    std_floor: float
    epsilon: float
    trained_counts: Tensor

    def centred(self) -> Tensor:
        """Reward minus the group's mean, exactly 0 where several rewards are all equal."""
        centred = self.rewards - self.means[self.numbers]
        is_flat = ~self.has_spread & (self.sizes > 1)
        return torch.where(is_flat[self.numbers], 0.0, centred)


AdvantageEstimator = Callable[[RewardGroups], Tensor]
ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {}
"""Estimators by name: a function of ``RewardGroups`` that gives the advantages ``[N]``."""


def register_advantage_estimator(name: str) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorator that makes a function available as ``group_advantages(..., estimator=name)``.

    Raises:
        ValueError: if the name is taken.
    """

    def register(estimator: AdvantageEstimator) -> AdvantageEstimator:
        if name in ADVANTAGE_ESTIMATORS:
            raise ValueError(f"advantage estimator {name!r} is registered already; choose another")
        ADVANTAGE_ESTIMATORS[name] = estimator
        return estimator

    return register


@register_advantage_estimator("grpo")
def _grpo(groups: RewardGroups) -> Tensor:
    advantages = groups.centred()
    if not groups.norm_adv_by_std:
        return advantages
    squares = torch.zeros_like(groups.means).index_add(0, groups.numbers, advantages.square())
    std = (squares / (groups.sizes - 1).clamp(min=1)).sqrt()
    std = torch.where(groups.sizes == 1, 1.0, std)
    return advantages / (std.clamp(min=groups.std_floor) + groups.epsilon)[groups.numbers]


@register_advantage_estimator("rloo")
def _rloo(groups: RewardGroups) -> Tensor:
    sizes = groups.sizes.double()
    factor = torch.where(groups.sizes > 1, sizes / (sizes - 1).clamp(min=1), 1.0)
    return groups.centred() * factor[groups.numbers]


@register_advantage_estimator("reinforce_plus_plus")
def _reinforce_plus_plus(groups: RewardGroups) -> Tensor:
    return _whiten(groups.rewards, groups.trained_counts)


@register_advantage_estimator("reinforce_plus_plus_baseline")
def _reinforce_plus_plus_baseline(groups: RewardGroups) -> Tensor:
    return _whiten(groups.centred(), groups.trained_counts)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    estimator: str = "grpo",
    norm_adv_by_std: bool = True,
    std_floor: float = 0.0,
    epsilon: float = 1e-6,
    trained_counts: Tensor | None = None,
) -> GroupAdvantages:
    """Advantage of every sample from one outcome reward per sample (verl's formulas, in float64).

    With R the reward, mean and std over the sample's group (std with Bessel's correction):

    * ``grpo``: ``(R - mean) / (max(std, std_floor) + epsilon)``; with ``norm_adv_by_std=False``
      ``R - mean`` (Dr. GRPO, arXiv 2503.20783).
    * ``rloo``: R minus the mean of the group's other rewards (arXiv 2402.14740).
    * ``reinforce_plus_plus``: R whitened over the batch (arXiv 2501.03262), without discount.
    * ``reinforce_plus_plus_baseline``: ``R - mean``, then whitened over the batch.

    Whitening is ``(x - mean) / sqrt(variance + 1e-8)`` over the batch's trained tokens: a sample
    counts as often as it has trained tokens, or once when ``trained_counts`` is None.

    A group of one has no others to compare with. Its mean counts as 0 and its std as 1, so its
    advantage is R (before whitening). A larger group whose rewards are all equal has advantage
    exactly 0 (before whitening).

    Args:
        rewards: ``[N]`` finite, of the whole batch.
        group_ids: ``[N]`` integers; samples with equal ids form a group, in any order.
        estimator: a key of ``ADVANTAGE_ESTIMATORS``.
        norm_adv_by_std: for ``grpo``, whether to divide by the group's std.
        std_floor: for ``grpo``, smallest std to divide by: it keeps a nearly flat group from
            having its noise blown up to unit size.
        epsilon: for ``grpo``, added to the std.
        trained_counts: ``[N]`` trained tokens per sample, read by the whitening estimators.

    Raises:
        ValueError: on an unknown estimator, unequal lengths, rewards that are not finite, an
            option that the estimator would ignore, or fewer than two tokens to whiten.
    """
    check_name("estimator", estimator, ADVANTAGE_ESTIMATORS)
    check_same_length("rewards", rewards, group_ids=group_ids, trained_counts=trained_counts)
    check_at_least("std_floor", std_floor, 0)
    check_at_least("epsilon", epsilon, 0)
    if not norm_adv_by_std and estimator != "grpo":
        raise ValueError(f"norm_adv_by_std=False needs estimator='grpo', got {estimator!r}")
    if std_floor > 0 and not (estimator == "grpo" and norm_adv_by_std):
        raise ValueError(
            f"std_floor={std_floor} needs estimator='grpo' with norm_adv_by_std=True, "
            f"got {estimator!r} with norm_adv_by_std={norm_adv_by_std}"
        )
    is_finite = torch.isfinite(rewards)
    if not bool(is_finite.all()):
        bad = int(torch.nonzero(~is_finite)[0])
        raise ValueError(f"rewards[{bad}]={float(rewards[bad])} must be finite: drop the sample")
    rewards = rewards.double()
    unique_ids, numbers, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    means = rewards.new_zeros(len(unique_ids)).index_add(0, numbers, rewards) / sizes
    lowest = rewards.new_full((len(unique_ids),), torch.inf)
    lowest = lowest.scatter_reduce(0, numbers, rewards, "amin")
    highest = torch.full_like(lowest, -torch.inf).scatter_reduce(0, numbers, rewards, "amax")
    groups = RewardGroups(
        rewards=rewards,
        numbers=numbers,
        sizes=sizes,
        means=torch.where(sizes == 1, 0.0, means),
        has_spread=highest > lowest,
        norm_adv_by_std=norm_adv_by_std,
        std_floor=std_floor,
        epsilon=epsilon,
        trained_counts=torch.ones_like(numbers) if trained_counts is None else trained_counts,
    )
    advantages = ADVANTAGE_ESTIMATORS[estimator](groups)
    check_same_length("rewards", rewards, advantages=advantages)
    return GroupAdvantages(
        advantages=advantages,
        group_numbers=numbers,
        has_spread=groups.has_spread,
    )


def _whiten(values: Tensor, counts: Tensor) -> Tensor:
    total = counts.sum()
    if total < 2:
        raise ValueError(f"whitening needs at least 2 trained tokens in the batch, got {total}")
    mean = (values * counts).sum() / total
    centred = values - mean
    variance = (centred.square() * counts).sum() / (total - 1)
    return centred * (variance + 1e-8).rsqrt()


def overlong_penalty(
    response_lens: Tensor,
    max_response_length: int,
    overlong_buffer_len: int,
    penalty_factor: float = 1.0,
) -> Tensor:
    """Reward to add for long responses (DAPO's soft overlong punishment, arXiv 2503.14476).

    Equals 0 up to ``max_response_length - overlong_buffer_len`` tokens, then falls linearly to
    ``-penalty_factor`` at ``max_response_length`` and stays there.

    Args:
        response_lens: ``[N]`` tokens of every response.
        max_response_length: length at which generation stops, in tokens.
        overlong_buffer_len: length of the ramp, in tokens.
        penalty_factor: size of the full penalty.

    Returns:
        ``[N]`` float64, at most 0.

    Raises:
        ValueError: unless ``1 <= overlong_buffer_len <= max_response_length`` and the factor is
            finite and at least 0.
    """
    if not 1 <= overlong_buffer_len <= max_response_length:
        raise ValueError(
            f"overlong_buffer_len={overlong_buffer_len} must lie in [1, {max_response_length}], "
            "the range up to max_response_length"
        )
    check_at_least("penalty_factor", penalty_factor, 0)
    excess = response_lens.double() - (max_response_length - overlong_buffer_len)
    return -penalty_factor * (excess / overlong_buffer_len).clamp(0, 1)
