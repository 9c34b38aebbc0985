"""Run benchmarks: ``python tools/bench/run.py NAME [--json FILE] [--plot FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(ROOT)
warnings.filterwarnings("ignore", module="megatron")

import torch  # noqa: E402

from tools.bench import attention, layer, logprob, memory, pack, step  # noqa: E402, F401
from tools.bench.machine import describe_machine  # noqa: E402
from tools.bench.registry import BENCHMARKS, BenchmarkRow, Options  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run the named benchmarks, print a table and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a PNG of the rows here")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of every comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default="", help="only shapes that contain A or B: A,B")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: shared machine")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    options = Options(
        quick=args.quick,
        rounds=args.rounds,
        threads=args.threads,
        clock=args.clock,
        shapes=tuple(part for part in args.shapes.split(",") if part),
    )
    machine = describe_machine(args.threads)
    rows: list[BenchmarkRow] = []
    for name in BENCHMARKS if args.name == "all" else [args.name]:
        rows += BENCHMARKS[name](options)
    print_table(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([row.as_json(machine) for row in rows], indent=1) + "\n")
    return 0


def print_table(rows: list[BenchmarkRow]) -> None:
    for r in rows:
        print(r.benchmark, r.shape["name"], r.baseline, r.ours_ms, r.baseline_ms, f"{r.ratio:.2f} of {r.bound:.2f} = {r.share:.3f}", r.ratio_spread, r.ours_peak_bytes, r.baseline_peak_bytes, r.max_error, r.load)


if __name__ == "__main__":
    sys.exit(main())
