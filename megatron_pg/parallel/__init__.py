"""Where tokens and weights live: every parallel size and its rules; what fails on all ranks."""

from .collective import attempt, on_all_ranks, on_first_rank, told_error
from .sizes import MEGATRON_NAMES, ModelSizes, ParallelSizes

__all__ = [
    "MEGATRON_NAMES",
    "ModelSizes",
    "ParallelSizes",
    "attempt",
    "on_all_ranks",
    "on_first_rank",
    "told_error",
]
