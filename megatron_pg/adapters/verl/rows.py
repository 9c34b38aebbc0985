"""A packed row of a verl batch: what the model is asked to predict, and where verl expects it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from ...data import PackedRow
from ...mcore import Predictions

# As verl's own processing of logits has it.
_LEAST_TEMPERATURE = 1e-8


@dataclass(frozen=True, eq=False, kw_only=True)
class VerlRow(PackedRow):
    """One micro-batch of S samples; a prediction is one token under one temperature.

    Attributes:
        batch: the S samples in the row's order, as verl's loss takes them; without keys when the
            row is a filler.
        temperatures: ``[E]`` of the predictions, or one number for all.
        offsets: ``[S + 1]`` first token of every written-out sample.
    """

    batch: TensorDict
    temperatures: float | Tensor
    offsets: Tensor

    @classmethod
    def of(cls, packed: PackedRow, batch: TensorDict, lens: Tensor, temperatures: Tensor) -> Self:
        """The row of some samples.

        Args:
            packed: the row.
            batch: its samples in its order.
            lens: ``[S]`` tokens of every written-out sample.
            temperatures: ``[S]`` that the logits of every sample are divided by.
        """
        own: dict[str, Any] = {f.name: getattr(packed, f.name) for f in fields(PackedRow)}
        distinct, kinds = temperatures.clamp(min=_LEAST_TEMPERATURE).unique(return_inverse=True)
        values: float | Tensor = float(distinct[0]) if len(distinct) else 1.0
        if len(distinct) > 1:
            # Samples that share a predicted token read it under their own temperatures.
            pairs = packed.prediction_ids * len(distinct) + kinds[packed.sample_ids]
            pairs, own["prediction_ids"] = torch.unique(pairs, return_inverse=True)
            predictions = pairs // len(distinct)
            for name in ("predictor_ids", "target_ids"):
                own[name] = own[name][predictions]
            values = distinct[pairs % len(distinct)]
        offsets = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
        return cls(**own, batch=batch, temperatures=values, offsets=offsets)

    def predictions(self, *, with_entropy: bool, chunk_tokens: int | None) -> Predictions:
        """What the last stage is asked for; the padded vocabulary takes part, as in verl."""
        return Predictions(
            predictor_ids=self.predictor_ids,
            target_tokens=self.target_tokens,
            temperature=self.temperatures,
            with_entropy=with_entropy,
            chunk_tokens=chunk_tokens,
        )

    def model_output(self, output: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """What verl's losses take: jagged ``log_probs``, and ``entropy`` where it was asked for.

        Args:
            output: logprobs and entropies ``[E]`` of the last stage.

        Returns:
            Jagged ``[S, L]``, value t that of token t + 1; NaN where nothing was predicted, 0 for
            the last token, which predicts nothing.
        """
        logprobs, entropy = output
        named = {"log_probs": logprobs, "entropy": entropy}
        return {name: self._jagged(v) for name, v in named.items() if v is not None}

    def _jagged(self, values: Tensor) -> Tensor:
        offsets, places, ids = (
            x.to(values.device, non_blocking=True)
            for x in (self.offsets, self._places(), self.prediction_ids)
        )
        flat = values.new_full((int(self.offsets[-1]),), torch.nan)
        flat[offsets[1:] - 1] = 0.0
        flat = flat.index_copy(0, places, values.index_select(0, ids))
        return torch.nested.nested_tensor_from_jagged(flat, offsets)

    def _places(self) -> Tensor:
        """``[M]`` where verl has the value of every pair: at the token before."""
        return self.offsets[self.sample_ids] + self.positions - 1
