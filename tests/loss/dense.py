"""Ragged test data and its written-out twin: padded [N, L] arrays with a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Flat arrays of M trained tokens; ``lens`` may hold zeros."""

    lens: list[int]
    sample_ids: Tensor

    @classmethod
    def from_lens(cls, lens: list[int]) -> Ragged:
        return cls(lens, torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens)))

    @property
    def num_samples(self) -> int:
        return len(self.lens)

    @property
    def mask(self) -> Tensor:
        return (torch.arange(max(self.lens))[None] < torch.tensor(self.lens)[:, None]).double()

    def pad(self, flat: Tensor) -> Tensor:
        """[M] -> [N, L], differentiable, zeros on padding."""
        rows = torch.split(flat, self.lens)
        width = max(self.lens)
        return torch.stack([torch.cat([r, r.new_zeros(width - len(r))]) for r in rows])

    def flatten(self, padded: Tensor) -> Tensor:
        return padded[self.mask.bool()]


def random_logprobs(ragged: Ragged, seed: int, scale: float = 0.6) -> tuple[Tensor, Tensor]:
    """(logprobs requiring grad, old_logprobs), far enough apart that every clip is met."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(len(ragged.sample_ids), generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(len(old), generator=generator, dtype=torch.float64) * scale
    return (old + noise).requires_grad_(), old


def random_advantages(ragged: Ragged, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    per_sample = torch.randn(ragged.num_samples, generator=generator, dtype=torch.float64)
    return per_sample[ragged.sample_ids]
