"""Routes that a run replays."""

from __future__ import annotations

from ...data import RouteShape
from ...grpo import replayed_routes
from ...mcore import check_replayable
from ..config import TrainConfig
from ..model import ModelPlan


def routes_of_run(config: TrainConfig, plan: ModelPlan) -> RouteShape | None:
    """What the routes of the rollout engine have to be like; None where they are not replayed.

    Raises:
        ValueError: if routes are to be replayed or recorded and the model has no experts.
        NotImplementedError: if its routers ask for none.
    """
    if config.algorithm.router_replay != "disabled":
        check_replayable(plan.config)
    try:
        return replayed_routes(config.algorithm, RouteShape.from_config(plan.config))
    except ValueError as error:
        raise ValueError(f"algorithm.{error}") from error
