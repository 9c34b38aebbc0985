"""What layers keep of prefix rows while other rows attend to them."""

from .latent import ProjectedKV, ResidentLatent
from .prefix_kv import PrefixKV, ScheduledRow
from .states import RowStates

__all__ = ["PrefixKV", "ProjectedKV", "ResidentLatent", "RowStates", "ScheduledRow"]
