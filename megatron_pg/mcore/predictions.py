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
        plan: ``loss.plan_predictors`` of the row's predictor ids for this rank, its arrays on the
            device; made by the last stage when None. With one that deals the predictions over
            context-parallel ranks all else is of this rank's share (``on_rank``).
        device_targets: ``target_tokens`` on the device; copied by the last stage when None.

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

    def on_rank(self, plan: PredictorPlan) -> Self:
        """What a rank makes of the row's predictions.

        Args:
            plan: of the row's ``predictor_ids`` for the rank, on the host.
        """
        if plan.share is None:
            return replace(self, plan=plan)
        temperature = self.temperature
        return replace(
            self,
            predictor_ids=self.predictor_ids[plan.share],
            target_tokens=self.target_tokens[plan.share],
            temperature=temperature[plan.share] if isinstance(temperature, Tensor) else temperature,
            plan=plan,
            device_targets=None,
        )
