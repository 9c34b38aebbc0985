"""The numbers of a run, and where they go."""

from .generations import Generations, Split, make_generations
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
from .sinks import Sink, make_sinks, read_metrics
from .timer import PhaseTimer

__all__ = [
    "METRICS",
    "Generations",
    "PhaseTimer",
    "Sink",
    "Split",
    "batch_metrics",
    "closing_table",
    "cost_metrics",
    "make_generations",
    "make_sinks",
    "peak_memory_bytes",
    "plot_reward",
    "read_metrics",
    "token_metrics",
    "update_metrics",
    "write_summary",
]
