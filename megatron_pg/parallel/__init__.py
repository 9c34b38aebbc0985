"""Where tokens and weights live: every parallel size and its rules; what fails on all ranks."""

from .collective import attempt, from_all_ranks, on_all_ranks, on_first_rank, told_error
from .context import ContextPart, exchanged_values, kv_head_copies
from .model_sizes import ModelSizes
from .sizes import MEGATRON_NAMES, ParallelSizes
from .split import PipelineSplit

__all__ = [
    "MEGATRON_NAMES",
    "ContextPart",
    "ModelSizes",
    "ParallelSizes",
    "PipelineSplit",
    "attempt",
    "exchanged_values",
    "from_all_ranks",
    "kv_head_copies",
    "on_all_ranks",
    "on_first_rank",
    "told_error",
]
