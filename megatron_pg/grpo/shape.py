"""What every rank knows of a step's groups: numbers of each sample, and no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Group, Status, carried_fields

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepShape:
    """Numbers of the G groups of a step and their N samples, in the order of the rollout.

    Attributes:
        group_ids: ``[G]`` names for messages.
        num_samples: ``[G]``.
        costs: ``[G]`` of a pass over the group.
        rewards: ``[N]`` as they were given.
        loss_lens: ``[N]`` trained tokens.
        prompt_lens, response_lens: ``[N]`` tokens.
        statuses: ``[N]`` index into ``Status``.
        rollouts: ``[N]`` rollout of the sample within its group, from 0.
        loss_weights: ``[N]`` as they were given, 0 where none was.
        carried: names of the optional values that the samples with trained tokens carry (see
            ``data.carried_fields``); None when there is no such sample.
    """

    group_ids: tuple[str, ...]
    num_samples: IntArray
    costs: FloatArray
    rewards: FloatArray
    loss_lens: IntArray
    prompt_lens: IntArray
    response_lens: IntArray
    statuses: IntArray
    rollouts: IntArray
    loss_weights: FloatArray
    carried: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        costs: Sequence[float] | None = None,
    ) -> StepShape:
        """Of the groups that one replica brings.

        Args:
            groups: in the order of the rollout.
            costs: of every group; 0 when None.

        Raises:
            ValueError: if some samples carry a kind of values and others do not.
        """
        samples = [sample for group in groups for sample in group.samples]
        is_trained = any(sample.num_loss_tokens for sample in samples)
        return cls(
            group_ids=tuple(group.group_id for group in groups),
            num_samples=_ints(len(group.samples) for group in groups),
            costs=np.array([0.0] * len(groups) if costs is None else costs, dtype=np.float64),
            rewards=np.array([s.reward for s in samples], dtype=np.float64),
            loss_lens=_ints(s.num_loss_tokens for s in samples),
            prompt_lens=_ints(len(s.prompt_ids) for s in samples),
            response_lens=_ints(len(s.response_ids) for s in samples),
            statuses=_ints(_STATUSES.index(s.status) for s in samples),
            rollouts=_ints(n for group in groups for n in group.rollouts.tolist()),
            loss_weights=np.array([s.loss_weight or 0.0 for s in samples], dtype=np.float64),
            carried=carried_fields(groups) if is_trained else None,
        )

    @cached_property
    def offsets(self) -> IntArray:
        """``[G + 1]`` first sample of every group."""
        return np.cumsum(np.concatenate([[0], self.num_samples]))

    @cached_property
    def group_numbers(self) -> Tensor:
        """``[N]`` group of every sample."""
        return torch.from_numpy(np.repeat(np.arange(len(self.group_ids)), self.num_samples))

    @cached_property
    def has_spread(self) -> npt.NDArray[np.bool_]:
        """``[G]`` whether the rewards of a group differ, as they were given."""
        firsts = np.repeat(self.rewards[self.offsets[:-1]], self.num_samples)
        different = np.zeros(len(self.group_ids), dtype=np.int64)
        np.add.at(different, self.group_numbers.numpy(), self.rewards != firsts)
        return different > 0

    @cached_property
    def is_trained(self) -> npt.NDArray[np.bool_]:
        """``[G]`` whether a token of the group is trained."""
        tokens = np.zeros(len(self.group_ids), dtype=np.int64)
        np.add.at(tokens, self.group_numbers.numpy(), self.loss_lens)
        return tokens > 0

    def take(self, groups: Sequence[int] | IntArray) -> StepShape:
        """The step of some of the groups, in the order given."""
        groups = np.asarray(groups, dtype=np.int64)
        samples = self.samples_of(groups)
        changed: dict[str, object] = {"group_ids": tuple(self.group_ids[g] for g in groups)}
        for field in fields(self):
            values = getattr(self, field.name)
            if isinstance(values, np.ndarray):
                of_groups = field.name in ("num_samples", "costs")
                changed[field.name] = values[groups if of_groups else samples]
        return replace(self, **changed)  # type: ignore[arg-type]

    def samples_of(self, groups: Sequence[int] | IntArray) -> IntArray:
        """Samples of some of the groups, group by group."""
        groups = np.asarray(groups, dtype=np.int64)
        counts = self.num_samples[groups]
        before = np.cumsum(counts) - counts
        firsts = np.repeat(self.offsets[groups] - before, counts)
        return firsts + np.arange(int(counts.sum()))

    def written_out(self) -> StepShape:
        """Every sample as a group of its own."""
        names = zip(self.group_ids, self.num_samples.tolist())
        ones = np.ones(len(self.rewards), dtype=np.int64)
        return replace(
            self,
            group_ids=tuple(f"{name}/{i}" for name, count in names for i in range(count)),
            num_samples=ones,
            costs=np.zeros(len(ones)),
            rollouts=np.zeros_like(ones),
        )

    @cached_property
    def rollout_numbers(self) -> Tensor:
        """``[N]`` rollout of every sample within the step, from 0 in order of appearance."""
        lasts = np.zeros(len(self.group_ids), dtype=np.int64)
        np.maximum.at(lasts, self.group_numbers.numpy(), self.rollouts + 1)
        firsts = np.repeat(np.cumsum(lasts) - lasts, self.num_samples)
        return torch.from_numpy(self.rollouts + firsts)

    @property
    def rollout_counts(self) -> Tensor:
        """``[R]`` trained tokens of every rollout, in all its samples."""
        counts = torch.zeros(len(self.rollout_numbers.unique()), dtype=torch.int64)
        return counts.index_add(0, self.rollout_numbers, torch.from_numpy(self.loss_lens))

    @property
    def rollout_firsts(self) -> Tensor:
        """``[R]`` first sample of every rollout."""
        places = torch.arange(len(self.rewards))
        firsts = torch.full_like(self.rollout_counts, len(places))
        return firsts.scatter_reduce(0, self.rollout_numbers, places, "amin")

    def statistics(self) -> dict[str, float]:
        """Rewards of the rollouts and lengths of the samples, as ``metrics.jsonl`` names them."""
        aborted = self.statuses == _STATUSES.index("aborted")
        judged = np.arange(len(aborted)) if aborted.all() else np.nonzero(~aborted)[0]
        _, firsts = np.unique(self.rollout_numbers.numpy()[judged], return_index=True)
        rewards = torch.from_numpy(self.rewards[judged[firsts]])
        count = len(self.rewards)
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()) if len(rewards) > 1 else 0.0,
            "reward/max": float(rewards.max()),
            "reward/min": float(rewards.min()),
            "response_length/mean": int(self.response_lens.sum()) / count,
            "response_length/max": float(self.response_lens.max()),
            "response_length/truncated": int((self.statuses == _STATUSES.index("truncated")).sum())
            / count,
            "response_length/aborted": int(aborted.sum()) / count,
            "prompt_length/mean": int(self.prompt_lens.sum()) / count,
        }


def join_shapes(parts: Sequence[tuple[Sequence[int], StepShape]]) -> StepShape:
    """The step of all replicas.

    Args:
        parts: numbers of a replica's groups in the rollout, and their shape.

    Raises:
        ValueError: if a number is given twice, or if some samples carry a kind of values and others
            do not.
    """
    _check_carried([shape for _, shape in parts])
    numbers = np.concatenate([np.asarray(own, dtype=np.int64) for own, _ in parts])
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError(
            f"two replicas brought one group of a step (numbers {sorted(numbers.tolist())}); each "
            "group is brought by one replica, as RolloutSource.numbers divides them"
        )
    joined: dict[str, object] = {}
    for field in fields(StepShape):
        values = [getattr(shape, field.name) for _, shape in parts]
        if field.name == "group_ids":
            joined[field.name] = tuple(name for own in values for name in own)
        elif field.name == "carried":
            joined[field.name] = next((own for own in values if own is not None), None)
        else:
            joined[field.name] = np.concatenate(values)
    return StepShape(**joined).take(np.argsort(numbers))  # type: ignore[arg-type]


def _check_carried(shapes: Sequence[StepShape]) -> None:
    given = {shape.carried: shape for shape in shapes if shape.carried is not None}
    if len(given) > 1:
        (one, first), (other, second) = list(given.items())[:2]
        differing = sorted(set(one) ^ set(other))
        raise ValueError(
            f"the groups {first.group_ids[0]!r} and {second.group_ids[0]!r} differ in carrying "
            f"{', '.join(differing)}; give them for all samples or for none"
        )


def _ints(values: Iterable[int]) -> IntArray:
    return np.fromiter(values, dtype=np.int64)
