"""Join result files: ``python tools/bench/summarize.py OUT.json IN.json [IN.json ...]``.

Writes the rows of all inputs to OUT.json and the page that reads them to OUT.md. Inputs are files
of ``run.py --json`` or a ``check_gpu.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.bench.render import make_markdown


def main(argv: Sequence[str]) -> int:
    """Join the files named in ``argv``."""
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(argv[0])
    rows = [row for file in argv[1:] for row in _rows(json.loads(Path(file).read_text()))]
    out.write_text(json.dumps(rows, indent=1) + "\n")
    out.with_suffix(".md").write_text(_page(out.stem, rows))
    return 0


def _rows(found: Any) -> list[dict[str, Any]]:
    """Of a benchmark's file, or of what ``tools/check_gpu.sh`` wrote."""
    rows: list[dict[str, Any]] = found["rows"] if isinstance(found, dict) else found
    return rows


def _page(title: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"# {title.replace('_', ' ')}", ""]
    measured: dict[str, dict[str, None]] = {}
    for row in rows:
        machine = row["machine"]
        versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        clock = {"cpu": "time that the process got", "wall": "wall clock"}.get(row["clock"] or "")
        text = (
            f"{machine['hardware']}, {machine['cores']} cores, {_threads(row)} thread(s) a "
            f"process, attention backend {machine['attention_backend']}, Python "
            f"{machine['python']}, {versions}; commit {machine['commit']}, {machine['date']}"
            + (f"; {clock}, medians of {row['rounds']} rounds" if clock else "")
            + (f" and {row['processes']} processes" if row.get("processes", 1) > 1 else "")
        )
        measured.setdefault(text, {})[row["benchmark"]] = None
    lines += [f"* {', '.join(names)}: {text}." for text, names in measured.items()]
    lines += [
        "",
        "ratio is baseline over ours (of times the median over rounds, each within its round, then",
        "over processes where there were several);",
        "bound is the ratio that arithmetic allows, share what is reached of it; reachable is the",
        "bound with the time that neither path can avoid; load is the machine's one-minute load",
        "average when the row was measured.",
        "The JSON file of the same name holds all rows with quartiles, sizes and peak memory.",
        "",
        make_markdown(rows),
    ]
    return "\n".join(lines)


def _threads(row: dict[str, Any]) -> int:
    """Of the process that measured; older rows hold those of the process that started it."""
    return int(row["threads"] if "threads" in row else row["machine"]["threads"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
