"""The loss edge: which tokens of a row the last stage is asked to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        chunk_tokens: predictions whose logits exist at once.

    Raises:
        ValueError: if the two lists differ in shape, have not one dimension, or lie on a device.
    """

    predictor_ids: Tensor
    target_tokens: Tensor
    temperature: float | Tensor = 1.0
    vocab_size: int | None = None
    with_entropy: bool = False
    chunk_tokens: int = 1024

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
