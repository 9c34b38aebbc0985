"""verl's Megatron engine over packed rows, and trainers that place groups for it.

Importing this registers them with verl. In every process verl does so where
``VERL_USE_EXTERNAL_MODULES=megatron_pg.adapters.verl``; it chooses the engine where
``VERL_ENGINE_VENDOR=prefix_grouped``, and a trainer by ``trainer.v1.trainer_mode``:
``prefix_grouped_sync``, ``prefix_grouped_colocate_async`` or ``prefix_grouped_separate_async``.
"""

from .engine import VENDOR, PrefixGroupedMegatronEngine
from .trainer import (
    PrefixGroupedTrainerColocateAsync,
    PrefixGroupedTrainerSeparateAsync,
    PrefixGroupedTrainerSync,
)

__all__ = [
    "VENDOR",
    "PrefixGroupedMegatronEngine",
    "PrefixGroupedTrainerColocateAsync",
    "PrefixGroupedTrainerSeparateAsync",
    "PrefixGroupedTrainerSync",
]
