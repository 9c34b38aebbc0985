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
        baselines: of "written out" and others, only those that contain one of these; empty takes
            all. Results are compared with the written-out ones whatever is chosen.
        clock: "wall", or "cpu" for the time that the process got (see ``time_interleaved``).
        sweep: also the shapes of the plots.
        ranks: ``step``, ``transparent`` and ``resident`` on one process, on two, or both.
        cp: ``step`` on so many context-parallel processes alone; 1 leaves it to ``ranks``.
    """

    quick: bool = False
    rounds: int | None = None
    shapes: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    clock: str = "wall"
    sweep: bool = False
    ranks: tuple[int, ...] = (1, 2)
    cp: int = 1

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def max_row_tokens(self) -> int | None:
        """Tokens of a written-out row in a step: what activations leave room for on 80 GB."""
        return 12288 if self.device.type == "cuda" else None

    def takes(self, baseline: str) -> bool:
        """Whether the options ask for this baseline."""
        return not self.baselines or any(part in baseline for part in self.baselines)

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
        reachable: the same with the time in which neither path computes what is compared: the
            optimizer's of a step, idle stages' of a pipeline; None where there is none or it is
            not counted.
        ours_ms: median of ours; None where no time is compared.
        baseline_ms: median of the baseline.
        ratio_spread: quartiles of the ratio over the interleaved rounds; over the processes
            where there were several.
        rounds: interleaved rounds behind the medians, in each process.
        processes: fresh processes whose medians the row is the median of.
        clock: which clock they were taken with.
        ours_flops: floating-point operations of one run of ours, where they are counted.
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
    reachable: float | None = None
    ours_ms: float | None = None
    baseline_ms: float | None = None
    ratio_spread: tuple[float, float] | None = None
    rounds: int | None = None
    processes: int = 1
    clock: str | None = None
    ours_flops: float | None = None
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
