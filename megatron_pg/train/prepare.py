"""What the loss of a step needs besides the rollouts: advantages, old and reference logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import Group, carried_fields, without_aborted
from ..loss import group_advantages, kl_in_reward, overlong_penalty
from .batch import (
    Minibatch,
    PackingConfig,
    count_executions,
    make_minibatch,
    split_evenly,
    written_out,
)
from .config import AlgorithmConfig, TrainConfig
from .metrics import PhaseTimer
from .passes import HeadConfig, compute_logprobs
from .ranks import Ranks


class Preparation:
    """Turns the groups of a step into minibatches; every rank takes part in each call.

    Args:
        config: of the run.
        chunks: the policy on this rank.
        reference: the reference model on this rank, or None.
        head: how tokens are predicted.
        packing: how rows are filled.
        ranks: this rank's place.
    """

    def __init__(
        self,
        config: TrainConfig,
        chunks: Sequence[Any],
        reference: Sequence[Any] | None,
        head: HeadConfig,
        packing: PackingConfig,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.chunks = chunks
        self.reference = reference
        self.head = head
        self.packing = packing
        self.ranks = ranks

    def minibatches(
        self, groups: Sequence[Group], timer: PhaseTimer
    ) -> tuple[list[Minibatch], dict[str, float]]:
        """Minibatches with everything that the loss needs, and what was left out.

        A minibatch without trained tokens is left out: it has no loss. So are aborted samples, and
        a whole step whose rewards cannot be whitened, as fewer than two tokens are trained.

        Returns:
            The minibatches, none when every group is left out, and metrics.
        """
        algorithm = self.config.algorithm
        groups = without_aborted(groups)
        if not groups:
            return [], {"groups/without_spread": 0.0, "groups/skipped": 0.0}
        rewards = shaped_rewards(groups, self.config)
        metrics: dict[str, float] = {}
        if algorithm.use_kl_in_reward:
            with timer.phase("logprobs"):
                penalty = self._kl_of_samples(groups)
            metrics["reward/kl_penalty"] = float(penalty.mean())
            rewards = rewards - penalty
        flat = [not has_spread(group) for group in groups]
        skip = algorithm.skip_groups_without_spread
        kept = [i for i, is_flat in enumerate(flat) if not (skip and is_flat)]
        advantages = None
        if "advantages" not in carried_fields(groups):
            if has_advantages(groups, algorithm):
                advantages = compute_advantages(groups, rewards, algorithm)
            else:
                kept = []
        metrics["groups/without_spread"] = float(sum(flat))
        metrics["groups/skipped"] = float(len(groups) - len(kept))
        with timer.phase("pack"):
            batches = self._pack(groups, advantages, kept)
        with timer.phase("logprobs"):
            return [self._with_logprobs(batch) for batch in batches], metrics

    def self_check(self, groups: Sequence[Group]) -> float:
        """Largest |logprob(packed) - logprob(written out)| over a few of the groups."""
        few = without_aborted(groups)[: self.config.run.self_check_groups]
        packed = self._logprobs_by_sample(few)
        alone = self._logprobs_by_sample(written_out(few))
        differences = [
            float((logprobs - alone[sample]).abs().max())
            for sample, logprobs in packed.items()
            if len(logprobs)
        ]
        return max(differences, default=0.0)

    def _pack(
        self, groups: Sequence[Group], advantages: Tensor | None, kept: Sequence[int]
    ) -> list[Minibatch]:
        algorithm = self.config.algorithm
        sizes = [len(group.samples) for group in groups]
        parts = None if advantages is None else torch.split(advantages, sizes)
        batches = []
        for members in split_evenly(kept, algorithm.num_minibatches):
            chosen = [groups[i] for i in members]
            if not any(s.num_loss_tokens for group in chosen for s in group.samples):
                continue
            values = None if parts is None else torch.cat([parts[i] for i in members])
            batches.append(make_minibatch(chosen, values, algorithm, self.packing, self.ranks))
        return batches

    def _with_logprobs(self, minibatch: Minibatch) -> Minibatch:
        """Old and reference logprobs, recomputed through the same packing where none came along."""
        algorithm = self.config.algorithm
        batches = minibatch.microbatches
        needs_old = not algorithm.is_on_policy or algorithm.policy.importance_mode is not None
        old = ref = None
        if needs_old and batches[0].old_logprobs is None:
            old = self._logprobs(self.chunks, minibatch)
        if self.reference is not None and batches[0].ref_logprobs is None:
            ref = self._logprobs(self.reference, minibatch)
        return minibatch.with_microbatches(
            [
                batch.with_logprobs(
                    old_logprobs=old[i] if old else None, ref_logprobs=ref[i] if ref else None
                )
                for i, batch in enumerate(batches)
            ]
        )

    def _kl_of_samples(self, groups: Sequence[Group]) -> Tensor:
        """``[N]`` ``kl_coef`` times the KL of every sample to the reference, on every rank."""
        algorithm = self.config.algorithm
        sizes = [len(group.samples) for group in groups]
        penalty = torch.zeros(sum(sizes), dtype=torch.float64)
        if not any(s.num_loss_tokens for group in groups for s in group.samples):
            return penalty
        batch = make_minibatch(groups, penalty, algorithm, self.packing, self.ranks)
        rows = batch.microbatches
        old, ref = [row.old_logprobs for row in rows], [row.ref_logprobs for row in rows]
        if rows[0].old_logprobs is None:
            old = [*self._logprobs(self.chunks, batch)]
        if rows[0].ref_logprobs is None:
            assert self.reference is not None
            ref = [*self._logprobs(self.reference, batch)]
        if self.ranks.speaks_for_replica:
            for row, old_logprobs, ref_logprobs in zip(rows, old, ref):
                if row.is_filler:
                    continue
                assert old_logprobs is not None and ref_logprobs is not None
                penalty[row.sample_numbers] = -kl_in_reward(
                    torch.zeros(len(row.sample_numbers), dtype=torch.float64),
                    old_logprobs,
                    ref_logprobs,
                    row.sample_ids,
                    kl_coef=algorithm.kl_coef,
                    kind=algorithm.kl_penalty,
                )
        dist.all_reduce(penalty)
        return penalty

    def _logprobs_by_sample(self, groups: Sequence[Group]) -> dict[int, Tensor]:
        """Logprobs of every sample's trained tokens, on every rank."""
        count = sum(len(group.samples) for group in groups)
        if not any(s.num_loss_tokens for group in groups for s in group.samples):
            return {}
        zeros = torch.zeros(count, dtype=torch.float64)
        batch = make_minibatch(groups, zeros, self.config.algorithm, self.packing, self.ranks)
        logprobs = self._logprobs(self.chunks, batch)
        found: dict[int, Tensor] = {}
        if self.ranks.speaks_for_replica:
            for row, values in zip(batch.microbatches, logprobs):
                if not row.is_filler:
                    found |= dict(zip(row.sample_numbers.tolist(), row.split_by_sample(values)))
        parts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, found)
        return {sample: values for part in parts for sample, values in part.items()}

    def _logprobs(self, chunks: Sequence[Any], minibatch: Minibatch) -> list[Tensor]:
        return compute_logprobs(chunks, minibatch.waves, self.head, self.ranks)


def shaped_rewards(groups: Sequence[Group], config: TrainConfig) -> Tensor:
    """``[N]`` float64 rewards with DAPO's soft punishment of overlong responses, when it is on."""
    algorithm = config.algorithm
    rewards = torch.cat([group.rewards for group in groups])
    if algorithm.overlong_buffer_len == 0:
        return rewards
    lens = torch.tensor([len(s.response_ids) for group in groups for s in group.samples])
    return rewards + overlong_penalty(
        lens,
        config.rollout.max_response_tokens,
        algorithm.overlong_buffer_len,
        algorithm.overlong_penalty_factor,
    )


def has_spread(group: Group) -> bool:
    """Whether the rewards of a group differ, as they were given."""
    return bool((group.rewards != group.rewards[0]).any())


def has_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> bool:
    """Whether the estimator says anything about the groups of one step."""
    num_trained = sum(s.num_loss_tokens for group in groups for s in group.samples)
    return num_trained >= 2 or not _whitens(algorithm)


def compute_advantages(
    groups: Sequence[Group], rewards: Tensor, algorithm: AlgorithmConfig
) -> Tensor:
    """``[N]`` advantages of the samples of one step from their ``rewards [N]``.

    An execution counts once, its samples take its advantage. An aborted sample does not count, its
    advantage is 0.

    Raises:
        ValueError: if samples of one execution have different rewards.
    """
    is_judged = torch.tensor([s.status != "aborted" for g in groups for s in g.samples])
    if not is_judged.all():
        advantages = torch.zeros(len(rewards), dtype=torch.float64)
        if judged := without_aborted(groups):
            advantages[is_judged] = compute_advantages(judged, rewards[is_judged], algorithm)
        return advantages
    executions, counts = count_executions(groups)
    numbers = torch.repeat_interleave(torch.tensor([len(group.samples) for group in groups]))
    places = torch.arange(len(rewards))
    first = torch.full_like(counts, len(rewards)).scatter_reduce(0, executions, places, "amin")
    others = first[executions]
    differs = torch.nonzero((others != places) & (rewards[others] != rewards))
    if len(differs):
        group = groups[int(numbers[differs[0]])]
        raise ValueError(
            f"samples of one execution of group {group.group_id!r} have different rewards; give "
            "them one reward, or an execution_id each"
        )
    settings: dict[str, Any] = {}
    if algorithm.adv_estimator == "grpo":
        settings = {
            "norm_adv_by_std": algorithm.norm_adv_by_std_in_grpo,
            "std_floor": algorithm.std_floor,
        }
    elif _whitens(algorithm):
        settings = {"trained_counts": counts}
    found = group_advantages(
        rewards[first], numbers[first], estimator=algorithm.adv_estimator, **settings
    )
    return found.advantages[executions]


def _whitens(algorithm: AlgorithmConfig) -> bool:
    return algorithm.adv_estimator.startswith("reinforce_plus_plus")
