"""The resident schedule in one process, row after row: what the pipelined one must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.utils import get_model_config
from torch import Tensor

from ...data import Wave
from ..resident import PrefixKV, ScheduledRow


def sequential_prefix_resident_forward_backward(
    *, forward_step_func: Callable[..., Any], waves: Sequence[Wave], model: Any
) -> list[Any]:
    """As ``prefix_resident_forward_backward`` with mode "retain" on one pipeline stage.

    No schedule of Megatron takes part; gradients are neither reduced nor finalized, and losses are
    taken as they are (``calculate_per_token_loss``).

    Args:
        forward_step_func: as the schedule takes it.
        waves: as the schedule takes them.
        model: the whole model.
    """
    scale = get_model_config(model).grad_scale_func or (lambda loss: loss)
    results: list[Any] = []

    def forward(row: ScheduledRow) -> tuple[Tensor, Any]:
        output, loss_func = forward_step_func(iter([row]), model)
        loss, _, data = loss_func(output)
        return loss, data

    def backward(loss: Tensor) -> None:
        # With every parameter frozen there is no graph.
        if loss.requires_grad:
            loss.backward()

    for wave in waves:
        kept = tuple(PrefixKV() for _ in wave.prefix_rows)
        prefix_losses = [
            forward(ScheduledRow(row, kv))[0] for row, kv in zip(wave.prefix_rows, kept)
        ]
        for row in wave.microbatches:
            loss, data = forward(ScheduledRow(row, resident=kept))
            backward(scale(loss))
            results.append(data)
        for loss in prefix_losses:
            backward(loss)
    return results
