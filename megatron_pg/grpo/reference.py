"""Logprobs of a reference model for groups that are trained more than once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import Group
from ..parallel import on_first_rank
from .settings import GrpoConfig
from .step import GrpoStep


def with_ref_logprobs(step: GrpoStep, groups: Sequence[Group], num_groups: int) -> list[Group]:
    """The groups, each sample with the reference model's logprobs; a collective of all ranks.

    Equals what the step computes itself when it trains the groups; to the last bit where they stand
    in the same rows.

    Args:
        step: with a reference model.
        groups: all of them on the first rank, which alone gets them back.
        num_groups: that are judged at once.
    """
    found: list[Group] = []
    for first in range(0, on_first_rank(lambda: len(groups)), num_groups):
        own = list(groups[first : first + num_groups]) if dist.get_rank() == 0 else []
        values = _of_samples(step, own)
        found += [_with_values(group, values) for group in own]
    return found


def _of_samples(step: GrpoStep, groups: Sequence[Group]) -> list[Tensor]:
    """Logprobs of the trained tokens of every sample that is not aborted, on the first rank."""
    # By number, so that no rank but the first needs to bring any; each of them is judged.
    batch = step.pack(step.place(dict(enumerate(groups)), GrpoConfig()))
    values = torch.split(step.ref_logprobs(batch), batch.counts.tolist())
    own = dict(zip(batch.sample_numbers.tolist(), values)) if step.ranks.leads_replica else {}
    parts: list[Any] | None = [None] * step.ranks.world_size if step.ranks.rank == 0 else None
    dist.gather_object(own, parts)
    by_number = {number: value for part in parts or [] for number, value in part.items()}
    return [by_number[number] for number in sorted(by_number)]


def _with_values(group: Group, values: list[Tensor]) -> Group:
    """Takes as many of ``values`` as the group has samples that are not aborted."""
    samples = []
    for sample in group.samples:
        if sample.status != "aborted":
            whole = torch.zeros(len(sample.response_ids), dtype=torch.float64)
            whole[sample.loss_mask] = values.pop(0)
            sample = replace(sample, ref_logprobs=whole)
        samples.append(sample)
    return replace(group, samples=tuple(samples))
