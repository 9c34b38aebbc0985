"""What memory depends on of a step's rows: their length, their number and what is resident."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from ...data import (
    Group,
    GroupShape,
    PackPlan,
    group_shape,
)
from ...grpo import PackingConfig, plan_all_replicas, trained_minibatches
from ...mcore import layer_windows
from ..config import TrainConfig
from ..model import ModelPlan
from ..rollouts import Recording, first_step_groups, unfit_groups


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """Of the largest wave of a step; bounds where the rollouts are not known yet.

    Attributes:
        tokens: that a row may hold.
        number: of a wave; None where it is not known, and as many as a pipeline asks for.
        resident_tokens: of prompts that are resident at once.
        resident_prompts: that these are.
        segments: of a row, each of which begins from a state of its own where layers have one.
        shares: of these tokens, whose keys and values layers keep, by their window.
        is_bound: whether the rollouts are not known.
    """

    tokens: int
    number: int | None = None
    resident_tokens: int = 0
    resident_prompts: int = 0
    segments: int = 0
    shares: Mapping[int | None, float] = field(default_factory=dict)
    is_bound: bool = True

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        plan: ModelPlan,
        plans: Sequence[Sequence[PackPlan]] | None,
        dp_size: int,
    ) -> StepRows:
        """Of a run whose first step is packed as ``plans``, a rank's waves each.

        Of one that is not known, or trains nothing, what rows may hold.
        """
        packing = plan.packing(config.prefix_group)
        tokens, residency = packing.max_tokens, packing.residency
        if not any(plans or ()):
            # Not "never" in the settings alone: some models keep nothing whatever they say.
            is_never = residency.choice == "never"
            groups = -(-config.run.groups_per_step // dp_size)
            return cls(
                tokens=tokens,
                resident_tokens=0 if is_never else residency.max_resident_tokens,
                resident_prompts=0 if is_never else groups,
                segments=groups * (1 + config.rollout.num_generations),
            )
        waves = [wave for waves in plans or () for wave in waves]
        largest = max(waves, key=lambda wave: wave.prefix_tokens)
        # Latents are kept of whole prompts.
        windows = () if plan.config.multi_latent_attention else layer_windows(plan.config)
        return cls(
            tokens=tokens,
            number=max(len(wave.rows) for wave in waves),
            resident_tokens=largest.prefix_tokens,
            resident_prompts=largest.num_resident_prefixes,
            segments=max(wave.most_segments for wave in waves),
            shares={window: largest.kept_share(window) for window in set(windows)},
            is_bound=False,
        )


# Rows of a run with other settings on so many replicas; None if it cannot have any.
RowsOf = Callable[[TrainConfig, ModelPlan, int], StepRows | None]


@dataclass(frozen=True, eq=False)
class FirstStep:
    """What the first step of a recorded run trains.

    Attributes:
        groups: that are judged.
        minibatches: places of those of every optimizer step.
    """

    groups: Sequence[Group]
    minibatches: Sequence[Sequence[int]]

    @classmethod
    def of(cls, config: TrainConfig, recording: Recording) -> FirstStep:
        """Of a run.

        Raises:
            ValueError: as ``first_step_groups`` does.
        """
        groups = recording.as_trained(first_step_groups(config, recording.groups))
        return cls(groups, trained_minibatches(groups, config.algorithm.of_step))

    @cached_property
    def num_trained(self) -> int:
        """Groups that some optimizer step trains."""
        return sum(map(len, self.minibatches))

    def plans(self, packing: PackingConfig, dp_size: int) -> list[list[PackPlan]]:
        """Waves of every data-parallel rank."""
        shapes = self._shapes.get(packing.min_shared)
        if shapes is None:
            shapes = [group_shape(group, packing.min_shared) for group in self.groups]
            self._shapes[packing.min_shared] = shapes
        return plan_all_replicas(shapes, dp_size, packing, self.minibatches)

    @cached_property
    def _shapes(self) -> dict[int | None, list[GroupShape]]:
        return {}


def rows_of(recording: Recording | None, first: FirstStep | None) -> RowsOf:
    """How runs of these rollouts, as many a step, would pack their first; bounds without them."""

    @cache
    def shapes(min_shared: int | None) -> list[GroupShape]:
        groups = [] if recording is None else recording.as_trained()
        return [group_shape(group, min_shared) for group in groups]

    def of_run(config: TrainConfig, plan: ModelPlan, dp_size: int) -> StepRows | None:
        if first is None:
            return StepRows.of_run(config, plan, None, dp_size)
        packing = plan.packing(config.prefix_group)
        if any(unfit_groups(shapes(packing.min_shared), packing)):
            return None
        return StepRows.of_run(config, plan, first.plans(packing, dp_size), dp_size)

    return of_run
