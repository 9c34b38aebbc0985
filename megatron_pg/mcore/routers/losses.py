"""What routers lost since it was last asked for, out of Megatron-Core's own books."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from ...data import expert_pattern
from ...parallel import ParallelSizes
from ..versions import DIVIDES_ROUTER_LOSSES

try:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
except ImportError:  # before core 0.18
    get_moe_metrics_tracker = None

ROUTER_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "z_loss")


def has_router_losses(config: TransformerConfig) -> bool:
    """Whether routers add losses of their own to the one that is trained."""
    return bool(config.num_moe_experts) and bool(_coefficients(config) or config.moe_z_loss_coeff)


def has_sample_losses(config: TransformerConfig) -> bool:
    """Whether routers have a loss of every single sample."""
    return bool(config.num_moe_experts) and "seq_aux_loss" in _coefficients(config)


@contextmanager
def undivided_router_losses(config: TransformerConfig) -> Iterator[float]:
    """Within, losses of routers weigh the same whatever the number of ranks that hold a row.

    Up to core 0.18, and with ``calculate_per_token_loss``, Megatron-Core divides them by that
    number. Its schedules multiply by it here: those losses, and the loss of the last stage.

    Yields:
        What a loss function has to multiply that loss by.
    """
    given, sizes = config.grad_scale_func, ParallelSizes.from_config(config)
    is_divided = DIVIDES_ROUTER_LOSSES and config.calculate_per_token_loss
    ranks = sizes.tp * sizes.cp if is_divided and has_router_losses(config) else 1
    if ranks > 1:
        config.grad_scale_func = lambda loss: (given(loss) if given else loss) * ranks
    try:
        yield 1 / ranks
    finally:
        config.grad_scale_func = given


def take_router_losses(
    config: TransformerConfig, num_rows: int, device: torch.device
) -> dict[str, float]:
    """Mean of every router loss over rows and layers with experts, before its coefficient.

    Of all backward passes since the last call; Megatron's tracker is emptied. A collective over all
    ranks of the job, on each of which the same comes back.

    Args:
        config: of the model.
        num_rows: rows that had such losses, over all replicas.
        device: that the ranks exchange numbers from.
    """
    names = [name for name in ROUTER_LOSSES if _is_on(config, name)]
    if not names:
        return {}
    values = _tracked()
    nothing = torch.zeros(1)
    parts = [values.get(name, nothing).double().sum().to(device) for name in names]
    sums = torch.stack(parts)
    for value in values.values():
        value.zero_()
    # A rank holds the part of its tokens, layers and rows.
    dist.all_reduce(sums)
    divisor = max(num_rows, 1) * sum(expert_pattern(config))
    return {name: value / divisor for name, value in zip(names, sums.tolist())}


def _coefficients(config: TransformerConfig) -> dict[str, float]:
    """Those that are not 0, by the kind of loss."""
    kinds, given = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    given = given if isinstance(given, list) else [given] * len(kinds)
    return {kind: value for kind, value in zip(kinds, given) if value and kind != "none"}


def _is_on(config: TransformerConfig, name: str) -> bool:
    if name == "z_loss":
        return bool(config.moe_z_loss_coeff)
    kind = "seq_aux_loss" if name.startswith("seq") else "aux_loss"
    return kind in _coefficients(config)


def _tracked() -> dict[str, Any]:
    """By name, ``[layers]`` of this rank."""
    if get_moe_metrics_tracker is not None:
        return {name: entry.values for name, entry in get_moe_metrics_tracker().metrics.items()}
    tracker = moe_utils.get_moe_layer_wise_logging_tracker()
    return {name: entry["values"] for name, entry in tracker.items()}
