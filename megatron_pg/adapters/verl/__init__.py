"""verl's Megatron engine over packed rows; importing this registers it with verl.

``VERL_USE_EXTERNAL_MODULES=megatron_pg.adapters.verl`` makes verl import it in every process and
``VERL_ENGINE_VENDOR=prefix_grouped`` makes verl choose the engine.
"""

from .engine import VENDOR, PrefixGroupedMegatronEngine

__all__ = ["VENDOR", "PrefixGroupedMegatronEngine"]
