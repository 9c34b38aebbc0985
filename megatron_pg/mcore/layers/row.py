"""What every wrapped layer asks of a packed row before it runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...parallel import ParallelSizes
from ..positioned import PositionedSeqParams


def check_row(
    config: Any,
    hidden_states: Tensor,
    params: PositionedSeqParams,
    inference_context: Any = None,
    **_: Any,
) -> None:
    """Refuse hidden states that are not those of the row.

    Args:
        config: of the layer.
        hidden_states: ``[tokens of this rank, 1, hidden_size]``.
        params: of the row.
        inference_context: of the layer's call.

    Raises:
        ValueError: if the row is not the layout's.
        NotImplementedError: with an ``inference_context``; if nobody has divided the row under
            context parallelism.
    """
    if inference_context is not None:
        raise NotImplementedError(
            "packed groups take no inference_context; sample with mcore.generate"
        )
    if params.is_divided and params.context is None and config.context_parallel_size > 1:
        raise NotImplementedError(
            "a packed row that nobody has divided under context_parallel_size="
            f"{config.context_parallel_size}: every rank would run all of it and count it "
            "once more; feed it to PrefixGroupedGPTModel"
        )
    tokens, batch = hidden_states.shape[:2]
    tokens *= ParallelSizes.from_config(config).sp_size
    if batch != 1 or tokens != len(params.position_ids):
        raise ValueError(
            f"the model was given {batch} row(s) of {tokens} tokens, the layout describes one "
            f"row of {len(params.position_ids)}; feed tokens[None] of the same microbatch"
        )
