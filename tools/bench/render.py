"""Rows as a table, as Markdown and as a figure with the bound drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.bench.registry import BenchmarkRow

COLUMNS = (
    *("benchmark", "shape", "baseline", "ratio", "bound", "share", "reachable"),
    *("ours", "baseline", "load"),
)
# What a figure is drawn over, and how the axis is named.
SWEEPS = {
    "prefix_len": "prefix length",
    "suffix_len": "response length",
    "num_generations": "responses of a group",
    "depth": "depth of the tree",
    "groups": "groups",
}
LETTERS = {"prefix_len": "P", "suffix_len": "R", "num_generations": "G"}


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a panel, ascending in x: measured ratios and what arithmetic allows."""

    label: str
    x: list[int]
    ratios: list[float]
    bounds: list[float]


def plot_rows(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """A column a swept size, a row of panels a benchmark and quantity, the bounds dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = make_panels(rows)
    names = list(dict.fromkeys((benchmark, quantity) for benchmark, quantity, _ in panels))
    sweeps = [sweep for sweep in SWEEPS if any(key[2] == sweep for key in panels)]
    size = (3.4 * len(sweeps), 2.9 * len(names))
    figure, axes = pyplot.subplots(len(names), len(sweeps), figsize=size, squeeze=False)
    for (name, sweep), axis in zip(product(names, sweeps), axes.flat):
        lines = panels.get((*name, sweep))
        if lines is None:
            axis.axis("off")
            continue
        for line in lines:
            (drawn,) = axis.plot(line.x, line.ratios, "o-", label=line.label)
            axis.plot(line.x, line.bounds, "--", color=drawn.get_color(), alpha=0.6)
        ticks = sorted({x for line in lines for x in line.x})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(x) for x in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(SWEEPS[sweep])
        axis.set_title(", ".join(name), fontsize=9)
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("baseline / ours (dashed: bound)", fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def plot_peaks(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Peak memory over the responses of a group, ours and the baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    x = [row["shape"]["num_generations"] for row in rows]
    for field, label in (("ours_peak_bytes", "ours"), ("baseline_peak_bytes", rows[0]["baseline"])):
        axis.plot(x, [row[field] / 2**20 for row in rows], "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set(xlabel=SWEEPS["num_generations"], ylabel="peak activation memory, MiB")
    axis.legend()
    axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def make_panels(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[Line]]:
    """Lines by (benchmark, "time" or "memory", swept size), one for each baseline.

    Peak memory against the written-out baseline is drawn wherever it was measured; its bound is
    logical over unique tokens.
    """
    points: dict[tuple[str, str, str], dict[str, list[tuple[int, float, float]]]] = {}
    for row in rows:
        shape = row["shape"]
        sweep = shape.get("sweep") or ("groups" if "groups" in shape else None)
        if sweep is None:
            continue
        held = [
            f"{s}{shape[n]}" for n, s in LETTERS.items() if n != sweep and "prefix_len" in shape
        ]
        held += _ranks(shape)
        label = " ".join([row["baseline"] + "," * bool(held), *held])
        measured = {}
        if row["ours_ms"] is not None:
            measured["time"] = (row["ratio"], row["bound"])
        if row["ours_peak_bytes"] is not None and row["baseline"] == "written out":
            peaks = row["baseline_peak_bytes"] / row["ours_peak_bytes"]
            measured["memory"] = (peaks, shape["logical_tokens"] / shape["unique_tokens"])
        for quantity, point in measured.items():
            lines = points.setdefault((row["benchmark"], quantity, sweep), {})
            lines.setdefault(label, []).append((shape[sweep], *point))
    return {
        key: [_line(label, sorted(line)) for label, line in lines.items()]
        for key, lines in points.items()
    }


def _line(label: str, points: list[tuple[int, float, float]]) -> Line:
    x, ratios, bounds = (list(column) for column in zip(*points))
    return Line(label=label, x=x, ratios=ratios, bounds=bounds)


def _cells(row: dict[str, Any]) -> list[str]:
    shape = row["shape"]
    figures = [f"{row[name]:.3f}" for name in ("ratio", "bound", "share")]
    figures.append("" if row.get("reachable") is None else f"{row['reachable']:.3f}")
    if row["ours_ms"] is not None:
        sizes = [f"{row[name]:.1f} ms" for name in ("ours_ms", "baseline_ms")]
    else:
        sizes = [
            f"{row[name] / 2**20:.1f} MiB" for name in ("ours_peak_bytes", "baseline_peak_bytes")
        ]
    load = "" if row["load"] is None else f"{row['load']:.1f}"
    name = " ".join([shape["name"], *_ranks(shape)])
    return [row["benchmark"], name, row["baseline"], *figures, *sizes, load]


def _ranks(shape: dict[str, Any]) -> list[str]:
    return [f"{name}={shape[name]}" for name in ("tp", "pp", "cp") if shape.get(name, 1) > 1]
