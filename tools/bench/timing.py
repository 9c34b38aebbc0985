"""Interleaved medians, peak memory, and the check that compared paths agree."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench.registry import BenchmarkMismatch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of several paths, one entry a round; round i of all stood side by side."""

    by_name: Mapping[str, list[float]]
    clock: str

    @property
    def rounds(self) -> int:
        return len(next(iter(self.by_name.values())))

    def against(self, baseline: str, ours: str = "ours") -> dict[str, Any]:
        """Timing fields of a ``BenchmarkRow`` that compares ``ours`` with ``baseline``."""
        a, b = np.array(self.by_name[ours]), np.array(self.by_name[baseline])
        # Of the same round: what disturbs the machine for longer than a round hits both.
        low, median, high = np.quantile(b / a, (0.25, 0.5, 0.75)).tolist()
        return {
            "ours_ms": float(np.median(a)),
            "baseline_ms": float(np.median(b)),
            "ratio": median,
            "ratio_spread": (low, high),
            "rounds": self.rounds,
            "clock": self.clock,
            "load": os.getloadavg()[0],
        }

    def beside(self, bound: float, fixed: str, ours: str = "ours") -> float:
        """What is left of a bound on ``ours`` when the path ``fixed`` is a part of both paths."""
        a, f = (float(np.median(self.by_name[name])) for name in (ours, fixed))
        return (bound * max(a - f, 0.0) + f) / max(a, f)


def time_interleaved(paths: Mapping[str, Run], rounds: int, clock: str = "wall") -> Times:
    """Run A B A B ..., and in every other round B A B A ..., so that drift hits all alike.

    Every path has run once when its results were compared: that is the warm-up, to which a GPU
    gets one more round, so that its clock and its allocator have settled. The clock "cpu" counts
    the time that this process got from the machine's cores: with one thread on an idle machine it
    is the wall clock, and on a shared one the neighbours are left out.

    Under ``torch.distributed`` a round counts from the moment that all ranks are ready to the
    moment that all are done; the clock "cpu" adds up what all ranks got.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    gc.collect()
    gc.disable()
    try:
        if torch.cuda.is_available():
            for run in paths.values():
                run()
        for i in range(rounds):
            for name in list(paths)[:: 1 if i % 2 == 0 else -1]:
                _wait()
                start = now()
                paths[name]()
                _wait()
                times[name].append(_over_ranks(now() - start, clock) * 1e3)
    finally:
        gc.enable()
    return Times(times, clock)


def peak_bytes(run: Run) -> int:
    """Peak of the bytes that ``run`` allocates on top of what was there before.

    On the CPU every allocation and release of PyTorch's allocator is read from its profiler,
    kernels' scratch space included; on CUDA it is ``torch.cuda.max_memory_allocated``.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    memory = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0] + [event.nbytes() for event in memory]).max())


def check_equal(pairs: Iterable[tuple[str, Tensor, Tensor]], bound: float) -> float:
    """Largest difference between two paths, relative to the largest value of each tensor.

    Args:
        pairs: ``(name, ours, baseline)``.
        bound: difference above which nothing may be reported.

    Raises:
        BenchmarkMismatch: if a shape differs, a value is not finite or the bound is exceeded.
    """
    worst = 0.0
    for name, ours, baseline in pairs:
        if ours.shape != baseline.shape:
            raise BenchmarkMismatch(f"{name}: {tuple(ours.shape)} against {tuple(baseline.shape)}")
        ours, baseline = ours.detach().double(), baseline.detach().double()
        error = float((ours - baseline).abs().max() / baseline.abs().max().clamp(min=1e-30))
        if not error <= bound:
            raise BenchmarkMismatch(
                f"{name} differs by {error:.3e} of its largest value between the compared paths, "
                f"allowed are {bound:.1e}; no speed-up is reported"
            )
        worst = max(worst, error)
    return worst


def _over_ranks(seconds: float, clock: str) -> float:
    if clock == "wall" or not dist.is_initialized() or dist.get_world_size() == 1:
        return seconds
    total = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
