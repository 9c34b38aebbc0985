"""verl's router replay: routes that a batch brings, and those that go back with its logprobs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from ...data import UNKNOWN_ROUTE, RouteShape, Wave, routes_of_samples
from ...grpo import RouteRecord
from .packing import MiniBatch


@dataclass(frozen=True, eq=False)
class Replay:
    """What one call of the engine does with routes.

    Attributes:
        routes: of every sample's tokens, to be replayed; None where the routers decide.
        record: keeps what they decide; None where nobody asks for it.
    """

    routes: list[Tensor] | None = None
    record: RouteRecord | None = None

    @classmethod
    def of(
        cls, data: TensorDict, mode: str, shape: RouteShape | None, *, forward_only: bool
    ) -> Replay:
        """As verl's engine has it.

        R2 records in a forward pass without routes, and replays what the batch brings later. R3
        replays the rollout engine's: of all tokens but a sample's last one, and none of a sample
        without response.

        Args:
            data: as verl hands it to its engine; ``routed_experts`` is ``[tokens, layers, topk]``
                of every sample, of all layers or of those with experts.
            mode: ``router_replay.mode``.
            shape: of the model's routes; None for a model without experts.
            forward_only: whether nothing is trained.

        Raises:
            ValueError: if there are no routes where some are to be replayed, or others than the
                model's: names the sample.
        """
        if mode == "disabled" or not tu.get_non_tensor_data(data, "enable_routing_replay", False):
            return cls()
        if shape is None:
            raise ValueError(
                f"router_replay.mode={mode!r} for a model without experts; set it to 'disabled'"
            )
        if data.get("routed_experts", None) is None:
            if mode == "R2" and forward_only:
                return cls(record=RouteRecord())
            raise ValueError(
                f"router_replay.mode={mode!r} replays routed_experts, but the batch brings none; "
                + _REMEDIES[mode]
            )
        return cls(routes=_routes(data, shape, is_rollout=mode == "R3"))


_REMEDIES = {
    "R2": "let the actor's compute_log_prob record them, without rollout_correction.bypass_mode",
    "R3": "set actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
}


def _routes(data: TensorDict, shape: RouteShape, *, is_rollout: bool) -> list[Tensor]:
    lens = [len(tokens) for tokens in data["input_ids"].unbind()]
    masks = data.get("response_mask", None) if is_rollout else None
    responds = [True] * len(lens) if masks is None else [bool(m.any()) for m in masks.unbind()]
    found = []
    for sample, given in enumerate(data["routed_experts"].unbind()):
        routes = given.cpu().to(torch.int16)
        try:
            if len(routes) not in (lens[sample], lens[sample] - is_rollout):
                raise ValueError(f"routed_experts has {len(routes)} rows for {lens[sample]} tokens")
            if is_rollout:
                num_known = _num_known(routes, lens[sample]) if responds[sample] else 0
                unknown = (lens[sample] - num_known, *routes.shape[1:])
                routes = torch.cat([routes[:num_known], routes.new_full(unknown, UNKNOWN_ROUTE)])
            found.append(shape.of_model(routes))
        except ValueError as error:
            raise ValueError(f"sample {sample} of the batch: {error}") from error
    return found


def _num_known(routes: Tensor, num_tokens: int) -> int:
    """Tokens before the last one whose routes were reported; verl fills up with zeros."""
    known = num_tokens - 1
    if routes.shape[2] > 1:
        rows = torch.nonzero(routes[:known].flatten(1).any(dim=1))
        known = int(rows[-1]) + 1 if len(rows) else 0
    return known


def recorded_routes(
    packed: MiniBatch, record: RouteRecord, shape: RouteShape, stages: Any, device: Any
) -> Tensor:
    """Jagged ``[samples, tokens, layers with experts, topk]`` int16, in the order of the batch.

    A collective of the pipeline stages: each has recorded its own layers.

    Args:
        packed: whose rows were run.
        record: of the pass over them.
        shape: of the model's routes.
        stages: process group of the pipeline.
        device: that it communicates on.
    """
    waves = [_of_all_stages(w, stages, device) for w in record.replayed(packed.waves, shape)]
    rows = [(wave, row) for wave in waves for row in range(len(wave.microbatches))]
    experts = torch.tensor([i for i, has in enumerate(shape.has_experts) if has])
    found: dict[int, Tensor] = {}
    for (wave, row), indices in zip(rows, packed.indices, strict=True):
        for sample, routes in zip(indices, routes_of_samples(wave, row)):
            found[sample] = routes[:, experts]
    ordered = [found[sample] for sample in sorted(found)]
    return torch.nested.as_nested_tensor(ordered, layout=torch.jagged)


def _of_all_stages(wave: Wave, stages: Any, device: Any) -> Wave:
    """Every stage has zeros where another one has its routes."""
    rows: list[Any] = [*wave.prefix_rows, *wave.microbatches]
    flat = torch.cat([row.routed_experts.flatten() for row in rows]).to(device, torch.int32)
    if dist.get_world_size(stages) > 1:
        dist.all_reduce(flat, group=stages)
    parts = flat.cpu().to(torch.int16).split([row.routed_experts.numel() for row in rows])
    whole = [
        replace(row, routed_experts=part.view(row.routed_experts.shape))
        for row, part in zip(rows, parts)
    ]
    count = len(wave.prefix_rows)
    return Wave(tuple(whole[:count]), tuple(whole[count:]))
