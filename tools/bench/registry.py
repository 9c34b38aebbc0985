"""The benchmarks by name, and the one row that each of them returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


class BenchmarkMismatch(RuntimeError):
    """Two compared paths gave different results: there is no speed-up to report."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How benchmarks run.

    Attributes:
        quick: tiny shapes and few rounds: proves that everything runs, measures nothing.
        rounds: interleaved rounds; None takes each benchmark's own number.
        shapes: only shapes whose name contains one of these; empty takes all.
        clock: "wall", or "cpu" for the time that the process got (see ``time_interleaved``).
        sweep: also the shapes of the plots.
        ranks: ``step``, ``transparent`` and ``resident`` on one process, on two, or both.
    """

    quick: bool = False
    rounds: int | None = None
    shapes: tuple[str, ...] = ()
    clock: str = "wall"
    sweep: bool = False
    ranks: tuple[int, ...] = (1, 2)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def num_rounds(self, default: int) -> int:
        """Rounds to run where the benchmark itself would take ``default``."""
        return self.rounds or (2 if self.quick else default)


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One comparison: what sharing gives beside what arithmetic allows.

    Attributes:
        benchmark: registered name.
        shape: what was run, lengths and sizes by name.
        baseline: what ours is compared with.
        ratio: baseline over ours, of times the median over rounds; above 1 is a gain.
        bound: the ratio that arithmetic allows, see each benchmark's docstring.
        ours_ms: median of ours; None where no time is compared.
        baseline_ms: median of the baseline.
        ratio_spread: quartiles of the ratio over the interleaved rounds; over the processes
            where there were several.
        rounds: interleaved rounds behind the medians, in each process.
        processes: fresh processes whose medians the row is the median of.
        clock: which clock they were taken with.
        ours_peak_bytes: peak of what one run allocates, where measured.
        baseline_peak_bytes: the same for the baseline.
        threads: of each process that measured.
        max_error: largest difference between the two paths' results, relative to the largest
            value of a result.
        load: one-minute load average of the machine when the row was measured.
    """

    benchmark: str
    shape: dict[str, Any]
    baseline: str
    ratio: float
    bound: float
    ours_ms: float | None = None
    baseline_ms: float | None = None
    ratio_spread: tuple[float, float] | None = None
    rounds: int | None = None
    processes: int = 1
    clock: str | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    ours_peak_bytes: int | None = None
    baseline_peak_bytes: int | None = None
    max_error: float | None = None
    load: float | None = None

    @property
    def share(self) -> float:
        """Achieved part of the bound."""
        return self.ratio / self.bound

    def as_json(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The row of the JSON file; ``machine`` describes where it was measured."""
        return {**asdict(self), "share": self.share, "machine": machine}


Benchmark = Callable[[Options], Iterable[BenchmarkRow]]
BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str) -> Callable[[Benchmark], Benchmark]:
    """Decorator: add a benchmark under ``name``."""

    def add(benchmark: Benchmark) -> Benchmark:
        BENCHMARKS[name] = benchmark
        return benchmark

    return add
