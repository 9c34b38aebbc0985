"""Groups larger than a microbatch, run over all pipeline stages; see ``README.md``."""

from .reference import sequential_prefix_resident_forward_backward
from .resident import prefix_resident_forward_backward
from .sweep import RetainedRows, Tick, sweep

__all__ = [
    "RetainedRows",
    "Tick",
    "prefix_resident_forward_backward",
    "sequential_prefix_resident_forward_backward",
    "sweep",
]
