"""Sums over the tokens of each sample of a flat array."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_sums(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """``[num_samples]`` float64 sums of ``values [M]`` by ``sample_ids [M]``; 0 where empty."""
    sums = values.new_zeros(num_samples, dtype=torch.float64)
    # index_put_ sorts on CUDA, index_add_ would add in an order that changes between runs.
    return sums.index_put_((sample_ids,), values.double(), accumulate=True)


def sample_means(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """``[num_samples]`` float64 means of ``values [M]`` by ``sample_ids [M]``; 0 where empty."""
    counts = sample_sums(torch.ones_like(values), sample_ids, num_samples)
    return sample_sums(values, sample_ids, num_samples) / counts.clamp(min=1)
