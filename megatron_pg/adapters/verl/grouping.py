"""Which samples of a verl batch share tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ...data import Group, GroupShape, Sample, group_shape

# A shared run below the prompt costs a segment in every layer; shorter ones are written out.
_MIN_SHARED = 16


def find_groups(
    sequences: Sequence[Tensor],
    prompt_lens: Sequence[int],
    uids: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Samples of every group, ascending; groups in the order of their first samples.

    With uids a group is what has one uid. Without, a sample belongs to the group of a sample whose
    whole prompt its own prompt begins with: equal prompts, and later turns of an agent's rollout.

    Args:
        sequences: ``[L]`` int64 on the CPU, prompt and response of every sample.
        prompt_lens: tokens of every prompt.
        uids: what verl's data set names its prompts by; two of them are never merged.
    """
    if uids is None:
        uids = _common_starts([s[:n] for s, n in zip(sequences, prompt_lens)])
    groups: dict[Hashable, list[int]] = {}
    for sample, uid in enumerate(uids):
        groups.setdefault(uid, []).append(sample)
    return list(groups.values())


def _common_starts(prompts: Sequence[Tensor]) -> list[int]:
    """A number for every prompt, equal for prompts that begin with a whole other one."""
    # What begins with a string stands right behind it in sorted order.
    keys = [prompt.numpy().tobytes() for prompt in prompts]
    numbers, root, number = [0] * len(keys), None, -1
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        if root is None or not keys[i].startswith(root):
            root, number = keys[i], number + 1
        numbers[i] = number
    return numbers


def make_group(
    name: str,
    sequences: Sequence[Tensor],
    first_predicted: Sequence[int],
    routes: Sequence[Tensor | None],
) -> Group:
    """A group whose samples' tokens from ``first_predicted`` on are predicted.

    ``routes`` of the samples are replayed (see ``data.Sample``).
    """
    return Group(
        name,
        tuple(
            Sample(
                prompt_ids=tokens[:first],
                response_ids=tokens[first:],
                reward=0.0,
                loss_mask=torch.ones(len(tokens) - first, dtype=torch.bool),
                routed_experts=own,
            )
            for tokens, first, own in zip(sequences, first_predicted, routes)
        ),
    )


def make_shape(group: Group, prompt_lens: Sequence[int], min_shared: int | None) -> GroupShape:
    """What the samples of a group share: the prompt, and every longer run at any depth.

    Args:
        group: of ``make_group``.
        prompt_lens: tokens of its prompts.
        min_shared: shortest run that is shared; None shares prompts of any length and runs of 16.
    """
    if min_shared is None:
        min_shared = max(min(_MIN_SHARED, *prompt_lens), 1)
    return group_shape(group, min_shared)
