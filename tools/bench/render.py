"""Rows as a table, as Markdown and as a figure with the bound drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.bench.registry import BenchmarkRow

COLUMNS = ("benchmark", "shape", "baseline", "ratio", "bound", "share", "ours", "baseline", "load")
# What a figure is drawn over, and how the axis is named.
SWEEPS = {
    "prefix_len": "prefix length",
    "suffix_len": "response length",
    "num_generations": "responses of a group",
    "depth": "depth of the tree",
    "groups": "groups",
}


def make_table(rows: Sequence[BenchmarkRow]) -> Table:
    """One line a comparison; "share" is the achieved part of the bound."""
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
    for row in rows:
        table.add_row(*_cells(row.as_json({})))
    return table


def make_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same table in Markdown, from rows of a JSON file."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)]) + "\n"


def plot_rows(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel a benchmark and swept length: the measured ratio, and its bound dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(rows)
    columns = min(len(panels), 3)
    shape = math.ceil(len(panels) / columns), columns
    figure, axes = pyplot.subplots(*shape, figsize=(4.6 * columns, 3.6 * shape[0]), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((benchmark, sweep), lines) in zip(axes.flat, panels.items()):
        for (baseline, fixed), points in sorted(lines.items()):
            points.sort(key=lambda row: row["shape"][sweep])
            x = [row["shape"][sweep] for row in points]
            label = f"{baseline}, {fixed}" if fixed else baseline
            (drawn,) = axis.plot(x, [row["ratio"] for row in points], "o-", label=label)
            bounds = [row["bound"] for row in points]
            axis.plot(x, bounds, "--", color=drawn.get_color(), alpha=0.6)
        axis.set_xscale("log", base=2)
        axis.set(title=benchmark, xlabel=SWEEPS[sweep], ylabel="baseline / ours (dashed: bound)")
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _panels(
    rows: Sequence[dict[str, Any]],
) -> dict[tuple[str, str], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Rows by (benchmark, swept length), then by baseline and the lengths that are held."""
    panels: dict[tuple[str, str], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in rows:
        shape = row["shape"]
        sweep = shape.get("sweep") or ("groups" if "groups" in shape else None)
        if sweep is None:
            continue
        letters = {"prefix_len": "P", "suffix_len": "R", "num_generations": "G"}
        held = [f"{letters[n]}{shape[n]}" for n in letters if n != sweep and "prefix_len" in shape]
        fixed = " ".join(held)
        lines = panels.setdefault((row["benchmark"], sweep), {})
        lines.setdefault((row["baseline"], fixed), []).append(row)
    return panels


def _cells(row: dict[str, Any]) -> list[str]:
    shape = row["shape"]
    ranks = "".join(f" {n}={shape[n]}" for n in ("tp", "pp") if shape.get(n, 1) > 1)
    figures = [f"{row[name]:.3f}" for name in ("ratio", "bound", "share")]
    if row["ours_ms"] is not None:
        sizes = [f"{row[name]:.1f} ms" for name in ("ours_ms", "baseline_ms")]
    else:
        sizes = [
            f"{row[name] / 2**20:.1f} MiB" for name in ("ours_peak_bytes", "baseline_peak_bytes")
        ]
    load = "" if row["load"] is None else f"{row['load']:.1f}"
    return [row["benchmark"], shape["name"] + ranks, row["baseline"], *figures, *sizes, load]
