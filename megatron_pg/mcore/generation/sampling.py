"""From logits to tokens: temperature, truncation, and randomness that belongs to the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Chooses tokens by inverse of the cumulative distribution, one uniform number per token.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 or None keeps all.
        top_p: keep the fewest likeliest tokens (of those that top_k left) whose probability
            reaches this share.
        vocab_size: real entries of the vocabulary; later columns are padding.

    Raises:
        ValueError: on a value outside its range.
    """

    temperature: float
    top_k: int | None
    top_p: float
    vocab_size: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be finite and at least 0")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or 0 or None to keep all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 turns it off")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Sample S tokens from each of R distributions.

        Args:
            logits: ``[R, padded vocabulary]``.
            uniforms: ``[R, S]`` float64 in [0, 1), on the logits' device.

        Returns:
            ``(tokens [R, S] int64, logprobs [R, S])``. Logprobs are those of
            ``softmax(logits / temperature)`` over the whole vocabulary, before truncation, as the
            trainer recomputes them; greedy tokens get those of temperature 1. In fp32 (fp64 for
            fp64 logits).
        """
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = logits[:, : self.vocab_size].to(dtype)
        if self.temperature not in (0, 1):
            scores = scores / self.temperature
        scores = scores.log_softmax(-1)
        if self.temperature == 0:
            tokens = scores.argmax(-1, keepdim=True).expand(uniforms.shape)
        else:
            tokens = self._choose(scores.exp(), uniforms)
        return tokens, scores.gather(1, tokens)

    def _choose(self, probabilities: Tensor, uniforms: Tensor) -> Tensor:
        order = None
        if self.top_k and self.top_k < self.vocab_size:
            probabilities, order = probabilities.topk(self.top_k)
        elif self.top_p < 1:
            probabilities, order = probabilities.sort(descending=True, stable=True)
        # fp32 sums over a vocabulary would lose its rare tokens.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if self.top_p < 1:
            # A token is kept when those before it do not reach top_p; the first always is.
            num_kept = (cumulative < self.top_p * total).sum(-1, keepdim=True) + 1
            total = cumulative.gather(1, num_kept - 1)
        places = torch.searchsorted(cumulative, uniforms * total, right=True)
        # Only the rounding of uniforms just below 1 reaches the end.
        places.clamp_(max=cumulative.shape[1] - 1)
        return places if order is None else order.gather(1, places)


def sample_uniforms(
    seed: int, prompt_numbers: Sequence[int], num_generations: int, num_tokens: int
) -> Tensor:
    """``[num_prompts, num_generations, num_tokens]`` float64 in [0, 1).

    Entry (i, j) is a stream of its own, a function of ``(seed, prompt_numbers[i], j)`` alone; a
    longer one continues a shorter one.
    """
    uniforms = np.empty((len(prompt_numbers), num_generations, num_tokens))
    for i, number in enumerate(prompt_numbers):
        for j in range(num_generations):
            np.random.Generator(np.random.PCG64([seed, number, j])).random(out=uniforms[i, j])
    return torch.from_numpy(uniforms)
