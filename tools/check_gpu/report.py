"""The results as one JSON file and one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tools.check_gpu.needs import Need
from tools.check_gpu.stages import Outcome

COLUMNS = (
    *("benchmark", "shape", "baseline", "ratio", "bound", "share", "reachable"),
    *("ours ms", "baseline ms"),
    *("TFLOP/s", "ours GiB", "baseline GiB", "max error"),
)


def make_json(needs: Sequence[Need], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was found: needs, stages, tests and rows."""
    return {
        "needs": [asdict(need) for need in needs],
        "stages": [
            {"name": o.name, "status": o.status, "seconds": o.seconds, "detail": o.detail}
            for o in outcomes
        ],
        "ceilings": _ceilings(outcomes),
        "tests": {o.name: o.tests for o in outcomes if o.tests},
        "rows": [row for o in outcomes for row in o.rows],
    }


def make_page(needs: Sequence[Need], outcomes: Sequence[Outcome], took: float) -> str:
    """The same to read, without what passed."""
    gpu = next((need.found for need in needs if need.name == "gpu"), None)
    rows = [row for outcome in outcomes for row in outcome.rows]
    lines = [f"# {(gpu or 'no GPU').partition(',')[0]}", "", f"{took:.0f} seconds in all.", ""]
    lines += [f"* {need.name}: {need.found}" for need in needs if need.found]
    for key in ("commit", "date", "python", "attention_backend", "versions"):
        lines += [f"* {key}: {_words(row['machine'][key])}" for row in rows[:1]]
    lines += [f"* {name}: {value:.1f}" for name, value in _ceilings(outcomes).items()]
    lines += ["", "## Missing, and left out for it", ""]
    lines += [f"* {need.name}: {need.without}" for need in needs if not need.found] or ["Nothing."]
    lines += ["", "## Stages", ""]
    lines += _table(
        ("stage", "result", "seconds", "what"),
        [(o.name, o.status, f"{o.seconds:.0f}", o.detail) for o in outcomes],
    )
    for outcome in outcomes:
        lines += _tests(outcome)
    if rows:
        lines += ["", "## Benchmarks", ""]
        lines += _table(COLUMNS, [_cells(row) for row in rows])
    return "\n".join(lines) + "\n"


def _tests(outcome: Outcome) -> list[str]:
    """Worst errors against fp64 by backend, what failed and why tests were skipped."""
    lines: list[str] = []
    by_backend: dict[str, list[float]] = {}
    for test in outcome.tests:
        if "error" in test:
            by_backend.setdefault(test["backend"], []).append(float(test["error"]))
    if by_backend:
        lines += ["", f"## Errors against fp64 ({outcome.name})", ""]
        cells = [(name, str(len(all)), f"{max(all):.4f}") for name, all in by_backend.items()]
        lines += _table(("backend", "cases", "worst segment's"), cells)
    failed = [t for t in outcome.tests if t["outcome"] in ("failure", "error")]
    for test in failed:
        lines += ["", f"* {test['name']}: {test['message'][:300]}"]
    skipped = {t["message"] for t in outcome.tests if t["outcome"] == "skipped"}
    lines += ["", *(f"* skipped: {reason}" for reason in sorted(skipped))] if skipped else []
    return lines


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ours_ms, flops = row["ours_ms"], row["ours_flops"]
    measured = ("reachable", "ours_ms", "baseline_ms")
    sizes = [row[name] for name in ("ours_peak_bytes", "baseline_peak_bytes")]
    return (
        *(row["benchmark"], row["shape"]["name"], row["baseline"]),
        *(f"{row[name]:.3f}" for name in ("ratio", "bound", "share")),
        *("" if row[name] is None else f"{row[name]:.3f}" for name in measured),
        f"{flops / ours_ms / 1e9:.1f}" if flops and ours_ms else "",
        *("" if size is None else f"{size / 2**30:.2f}" for size in sizes),
        "" if row["max_error"] is None else f"{row['max_error']:.1e}",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _ceilings(outcomes: Sequence[Outcome]) -> dict[str, float]:
    return {name: value for o in outcomes for name, value in o.ceilings.items()}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return str(value)
