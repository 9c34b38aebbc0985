"""Where tokens and weights live: every parallel size and its rules."""

from .sizes import MEGATRON_NAMES, ModelSizes, ParallelSizes

__all__ = ["MEGATRON_NAMES", "ModelSizes", "ParallelSizes"]
