"""What decides the rows of a step: budgets, residency, and what rows cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import (
    CARDS,
    CostModel,
    GroupShape,
    ResidencyConfig,
    card_or_here,
    group_cost,
    product_flops_on,
)
from ..mcore import has_sample_losses, layer_windows
from ..parallel import ParallelSizes
from .settings import PrefixGroupConfig


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """What decides the rows of a step.

    Attributes:
        max_tokens: budget of a row in unique tokens.
        pad_to_multiple: ``ParallelSizes.row_multiple``.
        num_microbatches_multiple: ``ParallelSizes.microbatch_multiple``.
        min_shared: see ``data.group_tree``.
        cost_model: balances ranks and rows.
        residency: what becomes of groups that are larger than a row.
    """

    max_tokens: int
    pad_to_multiple: int
    num_microbatches_multiple: int
    min_shared: int | None
    cost_model: CostModel
    residency: ResidencyConfig

    @classmethod
    def from_config(
        cls, settings: PrefixGroupConfig, model: Any, cost_model: CostModel
    ) -> PackingConfig:
        """How a model's rows are packed.

        Args:
            settings: budgets and residency.
            model: ``TransformerConfig``, whose parallel sizes are read.
            cost_model: of the model.

        Raises:
            ValueError: if prompts must be resident under a router loss of every whole sample.
        """
        choice = settings.prefix_resident
        if has_sample_losses(model):
            if choice == "always":
                raise ValueError(
                    "prefix_resident='always' with seq_aux_loss, which is of every whole sample: "
                    "resident prompts stand in rows of their own; use 'auto' or 'never', or "
                    "moe_router_load_balancing_type='aux_loss'"
                )
            choice = "never"
        sizes = ParallelSizes.from_config(model)
        return cls(
            max_tokens=settings.max_tokens_per_microbatch,
            pad_to_multiple=sizes.row_multiple,
            num_microbatches_multiple=sizes.microbatch_multiple,
            min_shared=settings.min_shared,
            cost_model=cost_model,
            residency=ResidencyConfig(
                choice=choice,
                mode=settings.prefix_resident_mode,
                max_resident_tokens=settings.max_tokens_per_microbatch
                if settings.max_resident_tokens is None
                else settings.max_resident_tokens,
                num_stages=sizes.pp,
            ),
        )

    def group_cost(self, shape: GroupShape) -> float:
        """See ``data.group_cost``; what balances replicas."""
        return group_cost(
            shape, self.max_tokens, self.residency, self.cost_model, self.pad_to_multiple
        )


def row_cost_model(
    model: Any,
    vocab_size: int,
    card: str | None = None,
    hybrid_layer_pattern: str | None = None,
) -> CostModel:
    """Cost of rows of a model on a card.

    Args:
        model: ``TransformerConfig``.
        vocab_size: without padding.
        card: see ``data.card_or_here``.
        hybrid_layer_pattern: of a ``HybridModel``.
    """
    cost = CostModel.from_config(model, vocab_size, layer_windows(model), hybrid_layer_pattern)
    return product_flops_on(CARDS[card_or_here(card)], cost)
