"""What a run begins with, looked at in one process, and everything that would stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ...grpo import PackingConfig
from ...mcore import validate_config
from ..config import TrainConfig, config_problems, raise_problems
from ..model import (
    ModelPlan,
    plan_model,
    training_configs,
    validate_trainable,
    validate_weights,
)
from ..rollouts import (
    Recording,
    Sampling,
    check_held_out,
    open_sampling,
    read_recording,
    routes_of_run,
)
from .rows import FirstStep

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What there is before anything is built.

    Attributes:
        plan: of the model.
        packing: of its rows.
        bare: folders that describe a model and hold no weights.
        recording: of a recorded run.
        first: of its first step.
        sampling: of a run that samples.
    """

    plan: ModelPlan
    packing: PackingConfig
    bare: list[str]
    recording: Recording | None = None
    first: FirstStep | None = None
    sampling: Sampling | None = None


def read_inputs(config: TrainConfig, world_size: int, card: str | None) -> RunInputs:
    """Look at everything that a run looks at before it builds its model.

    Args:
        config: of the run.
        world_size: ranks of it.
        card: as in ``dry_run``.

    Raises:
        ValueError: listing everything that would stop the run.
    """
    looked = _Looked(config_problems(config) + config.parallel.sizes.launch_problems(world_size))
    plan: ModelPlan | None = None
    if config.model.hf is not None or config.model.vocab_size is not None:
        plan = looked.at(lambda: plan_model(config.model, config.parallel, card=card))
    found = None if plan is None else _of_model(config, plan, looked)
    sampling = None
    if config.rollout.source != "recorded":
        sampling = _read_sampling(config, plan, looked)
    raise_problems("would stop this run", looked.problems)
    assert plan is not None and found is not None
    packing, bare, recording, first = found
    assert packing is not None
    return RunInputs(
        plan=plan,
        packing=packing,
        bare=bare or [],
        recording=recording,
        first=first,
        sampling=sampling,
    )


@dataclass
class _Looked:
    """What was looked at: a refusal is kept, and the next thing is looked at."""

    problems: list[str] = field(default_factory=list)

    def at(self, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (ValueError, NotImplementedError, ImportError) as error:
            self.problems.append(str(error).replace("\n", "\n    "))
            return None


def _of_model(
    config: TrainConfig, plan: ModelPlan, looked: _Looked
) -> tuple[PackingConfig | None, list[str] | None, Recording | None, FirstStep | None]:
    """Packing, bare folders, recording and first step of a model."""
    looked.at(lambda: validate_config(plan.config))
    looked.at(lambda: validate_trainable(plan))
    looked.at(lambda: training_configs(config, plan))
    bare = looked.at(lambda: validate_weights(config, may_be_bare=True))
    packing = looked.at(lambda: plan.packing(config.prefix_group))
    recording: Recording | None = None
    first: FirstStep | None = None
    if packing is not None and config.rollout.source == "recorded" and config.rollout.files:
        recording = looked.at(lambda: read_recording(config, plan, packing))
        if (found := recording) is not None:
            first = looked.at(lambda: FirstStep.of(config, found))
    return packing, bare, recording, first


def _read_sampling(config: TrainConfig, plan: ModelPlan | None, looked: _Looked) -> Sampling | None:
    if plan is not None:
        looked.at(lambda: routes_of_run(config, plan))
    most = None if plan is None else plan.max_positions
    sampling = looked.at(lambda: open_sampling(config, most))
    if sampling is not None:
        looked.at(lambda: check_held_out(config.run, sampling.task, sampling.reward))
    return sampling
