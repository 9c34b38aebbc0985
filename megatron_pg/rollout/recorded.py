"""Rewarded groups for a trainer that were sampled earlier."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..data import Group, content_checksum
from .base import WeightExporter
from .streams import checked_num_taken, positive


class RecordedRollouts:
    """Groups that were sampled earlier, epoch after epoch, each epoch in its own order.

    From the second epoch on a group's id gains ``#<epoch>``, so that a step which spans two
    epochs holds no id twice.

    Args:
        groups: what was recorded.
        shuffle: draw a new order every epoch from ``seed``; else the order given.
        seed: of the orders.
        num_epochs: passes over the groups; None never ends.

    Raises:
        ValueError: on no groups, a repeated ``group_id`` or ``num_epochs < 1``.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_epochs: int | None = None,
    ) -> None:
        if len(groups) == 0:
            raise ValueError("groups is empty: there is nothing to train on")
        if len({group.group_id for group in groups}) != len(groups):
            raise ValueError("groups repeat a group_id: join the samples of equal ids first")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs={num_epochs} must be None or at least 1")
        self.groups = tuple(groups)
        self.shuffle = shuffle
        self.seed = seed
        self.num_epochs = num_epochs
        self._num_taken = 0

    on_all_ranks = False

    def start(self) -> None:
        """Nothing to wait for."""

    def numbers(self, num_groups: int) -> Sequence[int]:
        """All of them."""
        return range(num_groups)

    def held_out_groups(self, num_prompts: int | None, num_generations: int) -> dict[int, Group]:
        """Recorded groups hold nothing out. Raises ValueError."""
        raise ValueError("recorded rollouts have no prompts that could be held out")

    def add_values(self, groups: Sequence[Group]) -> None:
        """Give the same groups with more per-token values from now on.

        The position stays, and that of a checkpoint is compared with what was recorded.
        """
        self._content = content_checksum(self.groups)
        self.groups = tuple(groups)

    def ask_ahead(self, num_groups: int) -> None:
        """Nothing to do: recorded groups are there."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to give up."""

    def next_groups(self, num_groups: int) -> list[Group]:
        """The next groups; fewer than asked for when the last epoch ends, then none."""
        end = self._num_taken + positive("num_groups", num_groups)
        if self.num_epochs is not None:
            end = min(end, self.num_epochs * len(self.groups))
        taken: list[Group] = []
        while self._num_taken < end:
            epoch, first = divmod(self._num_taken, len(self.groups))
            order = self._epoch_order(epoch)[first : first + end - self._num_taken]
            taken += [self._group_of_epoch(number, epoch) for number in order]
            self._num_taken += len(order)
        return taken

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Nothing to do: recorded responses do not depend on the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and what fixes its order."""
        return {
            "num_taken": self._num_taken,
            "num_groups": len(self.groups),
            "content": self._content,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken.

        A state without ``content``, as earlier versions gave it, is not compared in that.

        Raises:
            ValueError: if the state is of other groups or another order, or none.
        """
        mine = self.state_dict()
        self._num_taken = checked_num_taken(
            {"content": mine["content"], **state}, mine, "another recording"
        )

    @cached_property
    def _content(self) -> str:
        return content_checksum(self.groups)

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self.groups)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def _group_of_epoch(self, number: int, epoch: int) -> Group:
        group = self.groups[number]
        return replace(group, group_id=f"{group.group_id}#{epoch}") if epoch else group
