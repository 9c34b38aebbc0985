"""What a pass over a row reads on the device, brought there in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from ..data import PackedRow, PrefixRow, TokenValues
from ..loss import plan_predictors
from ..mcore import Predictions
from ..parallel import ParallelSizes
from ..tree import to_device
from .replicas import Ranks

_OF_LOSS = {"prediction_ids", "sample_ids", *(field.name for field in fields(TokenValues))}


@dataclass(frozen=True, eq=False, kw_only=True)
class StagedRow:
    """A row of a schedule whose arrays lie where the model does.

    Attributes:
        host: the row as it was packed.
        row: the same with what is read of it on the device; a ``Microbatch`` where there is a loss.
        predictions: this rank's, what is read of them on the device; None on stages without.
    """

    host: PackedRow | PrefixRow
    row: Any
    predictions: Predictions | None


def stage_row(
    row: PackedRow | PrefixRow, model: Any, ranks: Ranks, values: TokenValues | None = None
) -> StagedRow:
    """Bring a row to the device of a model chunk.

    Args:
        row: to be run.
        model: chunk that runs it; only one that predicts reads what its loss does.
        ranks: this rank's place.
        values: what the loss reads; None where there is none.
    """
    host = row
    predicts = get_attr_wrapped_model(model, "post_process")
    if isinstance(row, PackedRow) and predicts and values is not None:
        row = row.with_values(values)
    read = {"tokens", "routed_experts"} | (_OF_LOSS if predicts else set())
    own = {f.name: getattr(row, f.name) for f in fields(row) if f.name in read}
    own = {name: array for name, array in own.items() if array is not None}
    predictions: Predictions | None = None
    extra: dict[str, Tensor] = {}
    if predicts:
        predictions = _predictions(host, get_model_config(model), ranks)
        extra = _arrays(predictions)
    moved = iter(to_device([*own.values(), *extra.values()], ranks.device))
    of_row: dict[str, Any] = {name: next(moved) for name in own}
    there: dict[str, Any] = {name: next(moved) for name in extra}
    return StagedRow(
        host=host,
        row=replace(row, **of_row),
        predictions=predictions and _with_arrays(predictions, there),
    )


def _predictions(row: PackedRow | PrefixRow, config: Any, ranks: Ranks) -> Predictions:
    """What this rank predicts of a row, and how."""
    if isinstance(row, PrefixRow):
        empty = torch.empty(0, dtype=torch.int64)
        return Predictions(predictor_ids=empty, target_tokens=empty)
    sizes = ParallelSizes.from_config(config)
    plan = plan_predictors(
        row.predictor_ids,
        row.layout.total_tokens // sizes.row_multiple,
        tp_rank=ranks.tp_rank,
        tp_size=sizes.tp,
        sequence_parallel=sizes.sp,
        cp_rank=ranks.cp_rank,
        cp_size=sizes.cp,
    )
    whole = Predictions(predictor_ids=row.predictor_ids, target_tokens=row.target_tokens)
    return whole.on_rank(plan)


def _arrays(predictions: Predictions) -> dict[str, Tensor]:
    """What is read of them on the device, by name."""
    if predictions.plan is None:
        return {}
    return predictions.plan.arrays | {"device_targets": predictions.target_tokens}


def _with_arrays(predictions: Predictions, arrays: dict[str, Any]) -> Predictions:
    plan = predictions.plan
    if plan is None:
        return predictions
    of_plan = {name: arrays[name] for name in plan.arrays}
    own = {name: x for name, x in arrays.items() if name not in of_plan}
    return replace(predictions, plan=replace(plan, **of_plan), **own)
