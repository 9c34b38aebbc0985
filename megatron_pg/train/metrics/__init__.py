"""The numbers of a run, and where they go."""

from .numbers import (
    METRICS,
    batch_metrics,
    closing_table,
    cost_metrics,
    peak_memory_bytes,
    plot_reward,
    token_metrics,
    update_metrics,
    write_summary,
)
from .writer import MetricsWriter, PhaseTimer

__all__ = [
    "METRICS",
    "MetricsWriter",
    "PhaseTimer",
    "batch_metrics",
    "closing_table",
    "cost_metrics",
    "peak_memory_bytes",
    "plot_reward",
    "token_metrics",
    "update_metrics",
    "write_summary",
]
