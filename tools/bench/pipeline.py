"""When the stages of a pipeline are done: 1F1B over rows of unequal length, simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WaveTimes:
    """Seconds of one wave's rows over all stages, each ``[rows, ranks]``.

    Attributes:
        prefix_forward: of prefix rows, which pass all stages before the rows do.
        forward: of rows.
        backward: of rows.
        prefix_backward: of prefix rows, behind the rows.
    """

    prefix_forward: Seconds
    forward: Seconds
    backward: Seconds
    prefix_backward: Seconds

    @property
    def work(self) -> Seconds:
        """``[ranks]`` all of it."""
        parts = (self.prefix_forward, self.forward, self.backward, self.prefix_backward)
        return sum((part.sum(0) for part in parts), np.zeros(self.forward.shape[1]))


def pipeline_seconds(waves: Sequence[WaveTimes], num_stages: int) -> Seconds:
    """``[ranks]`` until a rank's last stage is done; every row takes each stage equally long.

    A stage does what its schedule has next as soon as its neighbour has sent what that needs.
    """
    order = [list(_operations(waves, num_stages - stage - 1)) for stage in range(num_stages)]
    num_ranks = waves[0].forward.shape[1]
    clock = np.zeros((num_stages, num_ranks))
    done: list[dict[tuple[int, bool, bool, int], Seconds]] = [{} for _ in order]
    waiting = sum(map(len, order))
    while waiting:
        for stage, operations in enumerate(order):
            while len(done[stage]) < len(operations):
                key = operations[len(done[stage])]
                wave, is_prefix, is_backward, row = key
                sender = stage + 1 if is_backward else stage - 1
                if 0 <= sender < num_stages:
                    if key not in done[sender]:
                        break
                    clock[stage] = np.maximum(clock[stage], done[sender][key])
                name = ("prefix_" if is_prefix else "") + ("backward" if is_backward else "forward")
                clock[stage] += getattr(waves[wave], name)[row] / num_stages
                done[stage][key] = clock[stage].copy()
                waiting -= 1
    slowest: Seconds = clock.max(0)
    return slowest


def _operations(waves: Sequence[WaveTimes], ahead: int) -> Iterator[tuple[int, bool, bool, int]]:
    """Wave, whether of a prefix row, whether backward, and row, as a stage does them.

    Args:
        waves: of every rank.
        ahead: rows that the stage runs forward before it runs the first one back.
    """
    for wave, times in enumerate(waves):
        num_rows, num_prefix_rows = len(times.forward), len(times.prefix_forward)
        yield from ((wave, True, False, row) for row in range(num_prefix_rows))
        for step in range(num_rows + ahead):
            if step < num_rows:
                yield wave, False, False, step
            if 0 <= step - ahead < num_rows:
                yield wave, False, True, step - ahead
        yield from ((wave, True, True, row) for row in range(num_prefix_rows))
