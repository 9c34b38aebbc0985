"""The shape of a group: the lengths that planning needs, without its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..tree import BoolArray, IntArray, PrefixTree
from .cost import CostModel
from .routes import prompts_agree, route_labels, without_routes
from .types import Group, Sample

# A fork costs every layer a pass over all that follows it, and saves what its tokens cost.
_LEAST_RUN = 64


@dataclass(frozen=True, eq=False)
class GroupShape:
    """Lengths of a group. Small, picklable, and equal on every rank that has the same group.

    Attributes:
        group_id: names the group in messages.
        tree: what its samples share; lengths only.
        loss_lens: ``[num_samples]`` trained tokens of every sample.
        untrained_lens: ``[num_samples]`` tokens before the first trained one of every sample; None
            when unknown, which keeps nothing resident.
        split_tokens: tokens of the tree that would be shared if samples had no routes.
    """

    group_id: str
    tree: PrefixTree
    loss_lens: IntArray
    untrained_lens: IntArray | None = None
    split_tokens: int = 0

    @property
    def num_samples(self) -> int:
        return self.tree.num_samples

    @cached_property
    def loss_tokens(self) -> int:
        """Trained (sample, token) pairs of the group."""
        return int(self.loss_lens.sum())

    @cached_property
    def resident_lens(self) -> IntArray:
        """``[num_segments]`` tokens at the start of each root that can stay resident, 0 elsewhere.

        Nothing in them is trained. The token before the first trained one predicts it, so it stands
        with what follows: it is encoded once more in every row instead of handing its hidden state
        from row to row.
        """
        lens = np.zeros(self.tree.num_segments, dtype=np.int64)
        if self.untrained_lens is not None:
            roots = self.sample_roots
            lens[roots] = self.tree.segment_lens[roots]
            np.minimum.at(lens, roots, self.untrained_lens)
            lens[roots] -= 1
        return lens

    @cached_property
    def sample_roots(self) -> IntArray:
        """``[num_samples]`` root of every sample."""
        parents, roots = self.tree.segment_parents, self.tree.sample_segments
        while (parents[roots] >= 0).any():
            roots = np.where(parents[roots] >= 0, parents[roots], roots)
        return roots

    @property
    def resident_tokens(self) -> int:
        """Tokens that can stay resident."""
        return int(self.resident_lens.sum())

    @cached_property
    def prefixes(self) -> PrefixTree:
        """What can stay resident, one root for each root that has something."""
        lens = self.resident_lens[self.resident_lens > 0]
        return PrefixTree(lens, np.full(len(lens), -1), np.arange(len(lens)))

    @cached_property
    def suffixes(self) -> GroupShape:
        """The group without what can stay resident."""
        return replace(self, tree=self.tree.without_prefix(self.resident_lens), untrained_lens=None)

    def cost(self, cost_model: CostModel, samples: Sequence[int] | None = None) -> float:
        """Cost of the group, or of some of its ``samples`` standing alone."""
        if samples is None or len(samples) == self.num_samples:
            return cost_model.estimate(self.tree, self.loss_tokens)
        loss_tokens = int(self.loss_lens[list(samples)].sum())
        return cost_model.estimate(self.tree, loss_tokens, path_segments(self.tree, samples))

    def tokens(self, samples: Sequence[int]) -> int:
        """Unique tokens of some ``samples`` standing alone."""
        if len(samples) == self.num_samples:
            return self.tree.unique_tokens
        return int(self.tree.segment_lens[path_segments(self.tree, samples)].sum())


def group_tree(group: Group, min_shared: int | None = None) -> PrefixTree:
    """What the samples of ``group`` share.

    Args:
        group: at least one sample.
        min_shared: an integer shares every run of at least that many tokens, at any depth (see
            ``PrefixTree.from_sequences``). None takes 64, or the length of the shortest prompt
            where that is less, for a group that has a rollout of several samples, or equal prompts
            with different routes. For others it shares exactly the prompt: samples whose prompts
            differ get one root per distinct prompt, and equal responses stay separate.

    Samples that carry routes share only tokens whose routes agree (see ``routes``).

    Raises:
        ValueError: on an empty group, ``min_shared < 1``, or routes of different shapes.
    """
    if not group.samples:
        raise ValueError(f"group {group.group_id!r} has no samples; leave it out")
    labels = route_labels(group)
    forks = len(group.rollouts.unique()) < len(group.samples)
    if min_shared is None and (forks or (labels and not prompts_agree(group, labels))):
        min_shared = min(_LEAST_RUN, *(len(sample.prompt_ids) for sample in group.samples))
    if min_shared is not None:
        sequences = [sample.tokens for sample in group.samples]
        return PrefixTree.from_sequences(sequences, min_shared, labels)
    by_prompt: dict[bytes, list[int]] = {}
    first = group.samples[0].prompt_ids
    first_key = first.numpy().tobytes()
    for i, sample in enumerate(group.samples):
        same = sample.prompt_ids is first
        key = first_key if same else sample.prompt_ids.numpy().tobytes()
        by_prompt.setdefault(key, []).append(i)
    lens: list[int] = []
    parents: list[int] = []
    sample_segments = np.empty(len(group.samples), dtype=np.int64)
    for members in by_prompt.values():
        root = len(lens)
        # A sample without a response ends at its prompt.
        sample_segments[members] = root
        answered = [i for i in members if len(group.samples[i].response_ids)]
        sample_segments[answered] = np.arange(root + 1, root + 1 + len(answered))
        lens.append(len(group.samples[members[0]].prompt_ids))
        lens += [len(group.samples[i].response_ids) for i in answered]
        parents += [-1] + [root] * len(answered)
    return PrefixTree(np.array(lens), np.array(parents), sample_segments)


def group_shape(group: Group, min_shared: int | None = None) -> GroupShape:
    """Lengths of ``group``, shared as ``group_tree`` says.

    Raises:
        ValueError: as ``group_tree`` does.
    """
    tree = group_tree(group, min_shared)
    if tree.token_ids is not None:
        tree = replace(tree, token_ids=None)
    loss_lens = np.array([sample.num_loss_tokens for sample in group.samples], dtype=np.int64)
    untrained_lens = np.array([_untrained_len(sample) for sample in group.samples], dtype=np.int64)
    alike = without_routes(group)
    split_tokens = 0
    if alike is not group:
        # Groups whose prompts are split share more of their responses.
        split_tokens = max(0, tree.unique_tokens - group_tree(alike, min_shared).unique_tokens)
    return GroupShape(group.group_id, tree, loss_lens, untrained_lens, split_tokens)


def _untrained_len(sample: Sample) -> int:
    """Tokens before the first trained one; all tokens when none is trained."""
    if not sample.num_loss_tokens:
        return len(sample.tokens)
    return len(sample.prompt_ids) + int(sample.loss_mask.int().argmax())


def path_segments(tree: PrefixTree, samples: Sequence[int]) -> BoolArray:
    """``[num_segments]`` those that stand on the path of one of ``samples``."""
    kept = np.zeros(tree.num_segments, dtype=bool)
    segments = tree.sample_segments[list(samples)]
    while len(segments):
        kept[segments] = True
        segments = tree.segment_parents[segments]
        segments = segments[segments >= 0]
        segments = segments[~kept[segments]]
    return kept


def select_samples(tree: PrefixTree, samples: Sequence[int]) -> PrefixTree:
    """Lengths of the part of ``tree`` on the paths of ``samples``, which keep the order given."""
    if list(samples) == list(range(tree.num_samples)):
        return tree
    ends, kept = tree.sample_segments[list(samples)], path_segments(tree, samples)
    number = np.cumsum(kept) - 1
    parents = tree.segment_parents[kept]
    return PrefixTree(
        segment_lens=tree.segment_lens[kept],
        segment_parents=np.where(parents >= 0, number[parents], -1),
        sample_segments=number[ends],
        resident_lens=None if tree.resident_lens is None else tree.resident_lens[kept],
    )
