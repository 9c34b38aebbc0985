"""The numbers of a run, and where they go."""

from .numbers import (
    METRICS,
    closing_table,
    cost_metrics,
    peak_memory_bytes,
    plot_reward,
    rollout_metrics,
    token_metrics,
    update_metrics,
    write_summary,
)
from .writer import MetricsWriter, PhaseTimer

__all__ = [
    "METRICS",
    "MetricsWriter",
    "PhaseTimer",
    "closing_table",
    "cost_metrics",
    "peak_memory_bytes",
    "plot_reward",
    "rollout_metrics",
    "token_metrics",
    "update_metrics",
    "write_summary",
]
