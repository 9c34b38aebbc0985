"""Experts that a row's tokens go through: recorded in one pass, replayed in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ...data import RouteShape


class RouteRecorder:
    """Writes down which experts a row's tokens go through, in the order in which top-k gives them.

    A call argument (``PrefixGroupedSeqParams.record_routes``) of one row in one pass. It holds what
    the layers of this rank chose: every pipeline stage and model chunk that is handed it adds its
    own. What is recomputed is not recorded again.
    """

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}
        self._split_over: dist.ProcessGroup | None = None

    def record(self, layer_number: int, expert_ids: Tensor, split_over: dist.ProcessGroup) -> None:
        """Keep ``expert_ids`` ``[tokens of this rank, topk]`` of a layer.

        ``split_over``: the ranks that hold the row's tokens, in their order.
        """
        self._split_over = split_over
        self._layers.setdefault(layer_number, expert_ids.detach().to(torch.int16))

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Layers with experts on this rank, counted from 1 over the whole model."""
        return tuple(sorted(self._layers))

    def routed_experts(self) -> Tensor:
        """``[total_tokens, layers, topk]`` int16 on the device, one of ``layer_numbers`` each.

        Of the whole row: a collective over the ranks that divide it.

        Raises:
            ValueError: if no layer has recorded anything.
        """
        if not self._layers:
            raise ValueError(
                "no routes were recorded: the row went through no layer with experts of this rank"
            )
        own = torch.stack([self._layers[number] for number in self.layer_numbers], dim=1)
        if self._split_over is None or self._split_over.size() == 1:
            return own
        whole = own.new_empty(len(own) * self._split_over.size(), *own.shape[1:])
        # As bytes: no backend of torch.distributed takes int16.
        dist.all_gather_into_tensor(
            whole.view(torch.uint8), own.contiguous().view(torch.uint8), group=self._split_over
        )
        return whole


class TopK:
    """What ``topk_routing_with_score_function`` asks for experts: replays, records, or both.

    It is handed in for one call of a router, so that nothing is left anywhere for another one.

    Args:
        routes: ``[tokens, topk]`` expert ids to go through, -1 where the router's own are taken;
            None takes those throughout.
        record: called with the ids that were taken.
    """

    def __init__(self, routes: Tensor | None, record: Callable[[Tensor], None] | None) -> None:
        self.routes, self.record = routes, record

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, choose: Any
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids, both ``[tokens, topk]``, as Megatron's ``RouterReplay`` gives them."""
        values, ids = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.routes is not None:
            ids = torch.where(self.routes < 0, ids, self.routes)
            values = scores.gather(1, ids)
        if self.record is not None:
            self.record(ids)
        return values, ids


def check_routes(routes: Tensor, total_tokens: int, config: TransformerConfig | None) -> None:
    """Refuse routes that no row or model can have.

    Args:
        routes: ``[total_tokens, num_layers, topk]``; values are looked at where they lie on the
            CPU.
        total_tokens: of the row, padding included.
        config: of the model, where it is known.

    Raises:
        ValueError: naming what is wrong.
        NotImplementedError: if the model's router does not ask for routes.
    """
    wrong = routes.ndim != 3 or len(routes) != total_tokens
    if wrong or routes.dtype.is_floating_point or routes.dtype in (torch.bool, torch.complex64):
        raise ValueError(
            f"routed_experts is {routes.dtype} {tuple(routes.shape)}; it must hold integers "
            f"[total_tokens={total_tokens}, num_layers, topk], padding included"
        )
    if config is not None:
        check_routes_of(routes, config)
        if routes.device.type == "cpu":
            _check_ids(routes, config)


def _check_ids(routes: Tensor, config: TransformerConfig) -> None:
    shape = RouteShape.from_config(config)
    if shape is not None and (wrong := shape.problem(routes.long())):
        raise ValueError(f"routed_experts {wrong}, or all -1 to leave them to the router")


def check_routes_of(routes: Tensor, config: TransformerConfig) -> None:
    """As ``check_routes``, what shapes tell."""
    if not config.num_moe_experts:
        raise ValueError("routed_experts for a model without experts; leave it out")
    expected = config.num_layers, config.moe_router_topk
    if tuple(routes.shape[1:]) != expected:
        raise ValueError(
            f"routed_experts has {routes.shape[1]} layers and {routes.shape[2]} experts a token; "
            f"the model has num_layers={expected[0]} and moe_router_topk={expected[1]}"
        )
    check_replayable(config)


def check_replayable(config: TransformerConfig) -> None:
    """Raise NotImplementedError if the model's router does not ask which experts to take."""
    if config.moe_router_fusion:
        raise NotImplementedError(
            "moe_router_fusion=True takes top-k in one kernel, which neither replays nor records "
            "routes; set it to False"
        )
