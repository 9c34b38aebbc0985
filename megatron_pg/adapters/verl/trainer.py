"""verl's trainer modes, whose batches keep groups on one data-parallel rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from verl.trainer.ppo.v1 import (
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)
from verl.trainer.ppo.v1 import trainer_base as verl_trainer

from .engine import VENDOR
from .placement import place_samples
from .rebound import rebound


class _PlacesGroups:
    """Over one of verl's trainers: ``_balance_batch`` places groups instead of samples.

    Raises:
        ValueError: if verl would not choose the engine that shares them, or shuffles them apart.
    """

    mode: str

    def __init__(self, config: Any):
        vendor = os.environ.get("VERL_ENGINE_VENDOR")
        if vendor != VENDOR:
            raise ValueError(
                f"trainer_mode={config.trainer.v1.trainer_mode} places groups for the engine that "
                f"shares them, but VERL_ENGINE_VENDOR={vendor}; set it to {VENDOR} on every node"
            )
        if config.actor_rollout_ref.actor.get("shuffle", False):
            raise ValueError(
                "actor_rollout_ref.actor.shuffle=True takes groups apart again; set it to False"
            )
        # verl asks for its own modes by name, and reads their settings under it.
        config.trainer.v1.trainer_mode = self.mode
        super().__init__(config)  # type: ignore[call-arg]

    def _balance_batch(self, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> Any:
        """As verl's, over partitions of whole groups."""
        filled: list[Any] = []

        def upsample(*args: Any, **kwargs: Any) -> Any:
            filled.append(verl_trainer.upsample_batch_to_divisible_size(*args, **kwargs))
            return filled[0]

        def partition(workloads: Sequence[Any], k_partitions: int, **_: Any) -> list[list[int]]:
            keys, tags = filled[0].keys, filled[0].tags
            size = self._mini_batch_size(len(keys), k_partitions)
            ranks = place_samples(keys, tags, num_ranks=k_partitions, mini_batch_size=size)
            uids = [{keys[sample].rsplit("_", 2)[0] for sample in rank} for rank in ranks]
            # 1 when every prompt is encoded by one rank.
            metrics["prefix_grouped/ranks_per_prompt"] = sum(map(len, uids)) / len(
                set().union(*uids)
            )
            return ranks

        run = rebound(
            super()._balance_batch,  # type: ignore[misc]
            upsample_batch_to_divisible_size=upsample,
            get_seqlen_balanced_partitions=partition,
        )
        return run(batch, metrics, *args, **kwargs)

    def _mini_batch_size(self, num_samples: int, num_ranks: int) -> int:
        """Samples of an optimizer step; all where the batch is not divided into steps."""
        settings: Any = self.config.actor_rollout_ref  # type: ignore[attr-defined]
        size = int(settings.actor.ppo_mini_batch_size) * int(settings.rollout.n)
        return num_samples if num_samples % size or size % num_ranks else size


@register_trainer("prefix_grouped_sync")
class PrefixGroupedTrainerSync(_PlacesGroups, PPOTrainerSync):
    """``PPOTrainerSync`` that places groups."""

    mode = "sync"


@register_trainer("prefix_grouped_colocate_async")
class PrefixGroupedTrainerColocateAsync(_PlacesGroups, PPOTrainerColocateAsync):
    """``PPOTrainerColocateAsync`` that places groups."""

    mode = "colocate_async"


@register_trainer("prefix_grouped_separate_async")
class PrefixGroupedTrainerSeparateAsync(_PlacesGroups, PPOTrainerSeparateAsync):
    """``PPOTrainerSeparateAsync`` that places groups."""

    mode = "separate_async"
