"""Routes that a step replays: those of its samples, or those that the old policy's pass records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar, get_args

import torch

from ..data import PackedRow, PrefixRow, RouteShape, Wave
from ..mcore import RouteRecorder
from .batch import StepBatch
from .settings import GrpoConfig, RouterReplay

Row = TypeVar("Row", PackedRow, PrefixRow)


def replayed_routes(algorithm: GrpoConfig, shape: RouteShape | None) -> RouteShape | None:
    """What the samples' routes have to be like; None where they are not replayed.

    Args:
        algorithm: says which routes are.
        shape: of the model's routes; None for a model without experts.

    Raises:
        ValueError: if the mode is unknown, or the model has no experts to route to.
    """
    mode = algorithm.router_replay
    modes = get_args(RouterReplay)
    if mode not in modes:
        raise ValueError(f"router_replay={mode!r} must be one of {', '.join(modes)}")
    if mode != "disabled" and shape is None:
        raise ValueError(
            f"router_replay={mode!r} replays routes to experts, but the model has none; set it to "
            "'disabled'"
        )
    return shape if mode == "R3" else None


def check_carried(algorithm: GrpoConfig, carried: Sequence[str] | None) -> None:
    """Raise ValueError if a step's samples do not carry what its mode replays.

    Args:
        algorithm: of the step.
        carried: see ``StepShape``.
    """
    if carried is None:
        return
    if algorithm.router_replay == "R3" and "routed_experts" not in carried:
        raise ValueError(
            "router_replay='R3' replays the routes of the rollout engine, but the samples carry no "
            "routed_experts; have the engine report them, or set it to 'R2' or 'disabled'"
        )
    if algorithm.router_replay == "R2" and "old_logprobs" in carried:
        raise ValueError(
            "router_replay='R2' records routes in the pass of the old logprobs, but the samples "
            "carry old_logprobs; leave them out, or set it to 'disabled'"
        )


class RouteRecord:
    """What the routers of this rank decide in the rows of one pass."""

    def __init__(self) -> None:
        self._recorders: dict[PackedRow | PrefixRow, RouteRecorder] = {}

    def recorder(self, row: PackedRow | PrefixRow) -> RouteRecorder:
        """For the pass of ``row``, through every model chunk."""
        return self._recorders.setdefault(row, RouteRecorder())

    def onto(self, batch: StepBatch, shape: RouteShape) -> StepBatch:
        """The batch whose minibatches replay what was recorded in their rows, see ``replayed``."""
        minibatches = tuple(
            replace(part, waves=self.replayed(part.waves, shape)) for part in batch.minibatches
        )
        return replace(batch, minibatches=minibatches)

    def replayed(self, waves: Sequence[Wave], shape: RouteShape) -> tuple[Wave, ...]:
        """The waves, their rows with what was recorded as the routes to be replayed.

        Each rank has the routes of its own layers, which are all that it reads; others are zeros. A
        collective of the ranks that divide rows by sequence parallelism.
        """
        return tuple(
            Wave(
                tuple(self._with_routes(row, shape) for row in wave.prefix_rows),
                tuple(self._with_routes(row, shape) for row in wave.microbatches),
            )
            for wave in waves
        )

    def _with_routes(self, row: Row, shape: RouteShape) -> Row:
        recorder = self._recorders[row]
        routes = torch.zeros(len(row.tokens), shape.num_layers, shape.topk, dtype=torch.int16)
        if recorder.layer_numbers:
            layers = torch.tensor(recorder.layer_numbers) - 1
            routes[:, layers] = recorder.routed_experts().cpu()
        return replace(row, routed_experts=routes)
