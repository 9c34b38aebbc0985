"""The same benchmarks in several processes: a ratio may move more between them than within one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median

import numpy as np

from tools.bench.registry import BenchmarkRow


def rows_of_processes(command: Sequence[str], count: int) -> list[BenchmarkRow]:
    """Rows of ``count`` fresh processes that run ``command`` one after another, as medians.

    Args:
        command: what runs the benchmarks, but for ``--json FILE``, which is added.
        count: processes, at least 1.

    Raises:
        subprocess.CalledProcessError: if a process fails; it has said why.
    """
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            file = Path(folder) / f"{i}.json"
            subprocess.run([*command, "--json", str(file)], check=True, stdout=sys.stderr)
            runs.append([_from_json(row) for row in json.loads(file.read_text())])
    return [median_row(rows) for rows in zip(*runs, strict=True)]


def median_row(rows: Sequence[BenchmarkRow]) -> BenchmarkRow:
    """The row whose ratio and times are medians over ``rows``, its spread their quartiles.

    Raises:
        ValueError: if the rows compare different things.
    """
    compared = [(row.benchmark, row.shape, row.baseline, row.bound) for row in rows]
    if any(what != compared[0] for what in compared):
        raise ValueError(f"rows of one comparison have the same shape and baseline: {compared}")
    low, ratio, high = np.quantile([row.ratio for row in rows], (0.25, 0.5, 0.75)).tolist()
    times = [
        (row.ours_ms, row.baseline_ms)
        for row in rows
        if row.ours_ms is not None and row.baseline_ms is not None
    ]
    return replace(
        rows[0],
        ratio=ratio,
        ratio_spread=(low, high),
        ours_ms=median(ours for ours, _ in times) if times else None,
        baseline_ms=median(baseline for _, baseline in times) if times else None,
        max_error=max((row.max_error for row in rows if row.max_error is not None), default=None),
        load=max((row.load for row in rows if row.load is not None), default=None),
        processes=len(rows),
    )


def _from_json(row: dict[str, object]) -> BenchmarkRow:
    names = [field.name for field in fields(BenchmarkRow)]
    return BenchmarkRow(**{name: row[name] for name in names})  # type: ignore[arg-type]
