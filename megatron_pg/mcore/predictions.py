"""The loss edge: which tokens of a row the last stage is asked to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ..loss import PredictorPlan


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """Tokens whose logprobs the last pipeline stage returns.

    Attributes:
        predictor_ids: ``[E]`` int64 on the CPU, packed index whose hidden state predicts.
        target_tokens: ``[E]`` int64 on the CPU, token to be predicted.
        temperature: logits are divided by it; a number, or ``[E]`` on the CPU.
        vocab_size: entries of the vocabulary that take part in the softmax; all, padding
            included, when None.
        with_entropy: also return the entropy of every prediction.
        chunk_tokens: predictions whose logits exist at once; None for ``loss``'s choice.
        plan: ``loss.plan_predictors`` of the predictor ids for this rank, its arrays on the
            device; made by the last stage when None.
        device_targets: ``target_tokens`` on the device; copied by the last stage when None.
        places: ``[E]`` int64 on any device, where these stand among the predictions of the row, of
            which they are one context-parallel rank's (``of_part``); divided by the last stage
            when None.
        num_of_row: how many the row has; with ``places``.

    Raises:
        ValueError: if the two lists differ in shape, have not one dimension, or lie on a device.
    """

    predictor_ids: Tensor
    target_tokens: Tensor
    temperature: float | Tensor = 1.0
    vocab_size: int | None = None
    with_entropy: bool = False
    chunk_tokens: int | None = None
    plan: PredictorPlan | None = None
    device_targets: Tensor | None = None
    places: Tensor | None = None
    num_of_row: int | None = None

    def __post_init__(self) -> None:
        if self.predictor_ids.shape != self.target_tokens.shape or self.predictor_ids.dim() != 1:
            raise ValueError(
                f"predictor_ids {tuple(self.predictor_ids.shape)} and target_tokens "
                f"{tuple(self.target_tokens.shape)} must be one-dimensional and equally long"
            )
        for name in ("predictor_ids", "target_tokens"):
            device = getattr(self, name).device
            if device != torch.device("cpu"):
                raise ValueError(
                    f"{name} must stay on the CPU, got {device}: which rank owns a row or a token "
                    "is found from it without a device synchronisation"
                )

    def of_part(self, tokens: slice) -> Self:
        """Those that a run of the row's tokens makes.

        Args:
            tokens: the run; ``predictor_ids`` count from its start in what comes back.
        """
        ids = self.predictor_ids
        places = torch.nonzero((ids >= tokens.start) & (ids < tokens.stop)).squeeze(1)
        temperature = self.temperature
        return replace(
            self,
            predictor_ids=ids[places] - tokens.start,
            target_tokens=self.target_tokens[places],
            temperature=temperature[places] if isinstance(temperature, Tensor) else temperature,
            places=places,
            num_of_row=len(ids),
        )
