"""Routers that count a shared token once for every sample, and replay or record its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from ..positioned import PositionedSeqParams
from ..routers import (
    RouteRecorder,
    RouterRow,
    TopK,
    as_mask,
    check_replayable,
    check_routes_of,
    has_router_losses,
    has_sample_losses,
)


class PrefixGroupedRouter(TopKRouter):
    """``TopKRouter`` that knows packed rows; ordinary batches go through it untouched.

    Equals the stock router on written-out samples: its losses, their gradients and logged values,
    and the counts that the expert bias is updated by. The losses of one row are those of its
    written-out samples in one microbatch; padding is in none of them.

    * ``aux_loss``: of all tokens of the row, each counted once for every sample.
    * ``seq_aux_loss``: the mean of the samples' own. The row as a whole, for which the stock router
      takes a ``thd`` row, is what ``aux_loss`` is of; rows of the transparent model do that.
    * ``z_loss``: the mean over tokens, each counted once for every sample.
    * experts' counts: added up over rows, so that the bias does not depend on packing.

    Megatron divides them by microbatches as ever, or with ``calculate_per_token_loss`` weights each
    row by its tokens, counted so: return them from the loss function, and the z-loss is the same
    under any packing.
    """

    reads_row_mask = True
    # Of the row that is in the layer right now.
    _recorder: RouteRecorder | None = None

    @contextmanager
    def reading(self, params: PositionedSeqParams) -> Iterator[Tensor | None]:
        """The mask of a row, while the row is in this router's layer.

        Raises:
            ValueError: on routes of another model.
            NotImplementedError: if routes are to be replayed or recorded by a fused router.
        """
        if params.routed_experts is not None:
            check_routes_of(params.routed_experts, self.config)
        if params.record_routes is not None:
            check_replayable(self.config)
        self._recorder = params.record_routes
        try:
            yield self._mask_of(params)
        finally:
            self._recorder = None

    def _mask_of(self, params: PositionedSeqParams) -> Tensor | None:
        routes = params.routed_experts
        counts = self.enable_expert_bias or has_router_losses(self.config)
        reads = routes is not None or self._recorder is not None
        if not (reads or (counts and torch.is_grad_enabled())):
            return None
        by_sample = has_sample_losses(self.config) and not params.is_one_sequence
        if by_sample and torch.is_grad_enabled() and not params.has_whole_samples:
            raise NotImplementedError(
                "seq_aux_loss is of every whole sample, but resident prompts stand in rows of "
                "their own; use 'aux_loss', or prefix_resident=never"
            )
        assert self.layer_number is not None
        return as_mask(
            samples=params.row_mask if by_sample else None,
            multiplicity_digits=None if by_sample else params.multiplicity_digits,
            routes=None if routes is None else routes[:, self.layer_number - 1],
            num_experts=self.config.num_moe_experts,
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``TopKRouter``; what ``reading`` gave is a row, masks of two dimensions are not."""
        if padding_mask is None or padding_mask.dim() == 2:
            stock: tuple[Tensor, Tensor] = super().routing(logits, padding_mask)
            return stock
        logits = logits.view(-1, self.config.num_moe_experts)
        row = RouterRow.from_mask(padding_mask, self.topk, logits.shape[1])
        lens = row.weights.sum(1)  # of the whole row, before it is cut
        row = row.part(self._place, len(logits))
        is_counted = self.training and torch.is_grad_enabled()
        if is_counted:
            logits = self._with_z_loss(logits, row, lens.sum())
        probs, routing_map = self._top_k(logits, row.routes)
        if is_counted:
            probs = self._with_balance_losses(probs, logits, row, lens)
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += (routing_map * row.multiplicity[:, None]).sum(0)
        return probs, routing_map

    @property
    def _place(self) -> int:
        """Of this rank among those that divide a row: by context, then by sequence parallelism."""
        copies = 1 if self.config.sequence_parallel else self.tp_group.size()
        return int(self.tp_cp_group.rank()) // copies

    def _top_k(self, logits: Tensor, routes: Tensor | None) -> tuple[Tensor, Tensor]:
        config, recorder = self.config, self._recorder
        asks = routes is not None or recorder is not None
        found: tuple[Tensor, Tensor] = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=config.moe_router_fusion,
            router_replay=TopK(routes, self._record if recorder else None) if asks else None,
        )
        return found

    def _record(self, expert_ids: Tensor) -> None:
        assert self._recorder is not None
        split_over = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
        self._recorder.record(self.layer_number, expert_ids, split_over)

    def _with_z_loss(self, logits: Tensor, row: RouterRow, total: Tensor) -> Tensor:
        if not self.config.moe_z_loss_coeff:
            return logits
        coeff = self.config.moe_z_loss_coeff
        squares = torch.logsumexp(logits, dim=-1).square()
        # Ranks hold unequal sums, so each divides by the row's instead of its own.
        loss = (squares * row.multiplicity).sum() * (coeff / total.clamp(min=1))
        return self._attach(logits, coeff, loss, "z_loss", total)

    def _with_balance_losses(
        self, probs: Tensor, logits: Tensor, row: RouterRow, lens: Tensor
    ) -> Tensor:
        by_row, by_sample = map(self.get_aux_loss_coeff, ("aux_loss", "seq_aux_loss"))
        if not (by_row or by_sample):
            return probs
        # Of the router's own choice, without bias or replay, as in the stock router.
        routing_map, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, fused=self.config.moe_router_fusion
        )
        total = lens.sum()
        if by_row:
            loss = self._balance_loss(row.multiplicity[None], total[None], scores, routing_map)
            probs = self._attach(probs, by_row, loss * by_row, "load_balancing_loss", total)
        if by_sample:
            loss = self._balance_loss(row.weights, lens, scores, routing_map)
            name = "seq_load_balancing_loss"
            probs = self._attach(probs, by_sample, loss * by_sample, name, total)
        return probs

    def _balance_loss(
        self, weights: Tensor, lens: Tensor, scores: Tensor, routing_map: Tensor
    ) -> Tensor:
        """``num_experts * sum_e f_e P_e`` as this rank's scores have it, mean over sequences.

        f_e is the share of a sequence's choices that expert e gets, P_e its mean score.
        """
        dtype = torch.promote_types(scores.dtype, torch.float32)
        # The stock loss has no matrix products, which TF32 and autocast round, though not fp64.
        weights = weights.double()
        counts = weights @ routing_map.double()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        lens = lens.clamp(min=1).double()
        shares = (counts * (weights @ scores.double())).sum(1) / (self.topk * lens.square())
        loss: Tensor = shares.sum() * (self.config.num_moe_experts / max(len(lens), 1))
        return loss.to(dtype)

    def _attach(
        self, activation: Tensor, coeff: float, loss: Tensor, name: str, total: Tensor
    ) -> Tensor:
        # The stock method knows how its version scales and logs; a rank's tokens count as equal.
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            activation,
            coeff,
            loss,
            name,
            self.tp_cp_group,
            valid_token_count=total / self.tp_cp_group.size(),
        )
        return attached


def prefix_grouped_router(cls: type) -> type:
    """The router class in whose place packed rows can run.

    Raises:
        NotImplementedError: if the class is none of Megatron-Core's for training.
    """
    if getattr(cls, "reads_row_mask", False):
        return cls
    if cls is TopKRouter:
        return PrefixGroupedRouter
    raise NotImplementedError(
        f"router is {cls.__name__}; prefix grouping knows how TopKRouter counts tokens and takes "
        "experts. Use that, or give yours reads_row_mask = True and read the mask"
    )


def row_mask_of(layer: Any, params: PositionedSeqParams) -> Any:
    """Context in which a layer runs a row, giving what goes in the place of ``padding_mask``.

    Raises:
        NotImplementedError: on routes for a router that is not ours.
    """
    router = getattr(layer.mlp, "router", None)
    if isinstance(router, PrefixGroupedRouter):
        return router.reading(params)
    return _reading_samples(layer, params)


@contextmanager
def _reading_samples(layer: Any, params: PositionedSeqParams) -> Iterator[Tensor | None]:
    asks = params.routed_experts is not None or params.record_routes is not None
    if asks and hasattr(layer.mlp, "router"):
        raise NotImplementedError(
            f"{type(layer.mlp.router).__name__} neither replays nor records routes; build the "
            "layer from Megatron-Core's TopKRouter"
        )
    yield params.row_mask
