"""Check and measure this machine's GPU; see ``tools/check_gpu.sh``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tools.check_gpu.needs import Need, find_needs
from tools.check_gpu.report import make_json, make_page
from tools.check_gpu.stages import GRACE, Outcome, Stage, make_stages, run_stage

# Fewer seconds than this are not worth a start.
LEAST = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all that ran is right, 1 when a stage failed, 2 when none could run."""
    parser = argparse.ArgumentParser(prog="tools/check_gpu.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/check_gpu"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--only", default="", metavar="A,B", help="only these stages")
    parser.add_argument("--seconds", type=float, default=480, help="in all (default: %(default)s)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    needs = find_needs()
    show_needs(needs)
    here = {need.name for need in needs if need.found}
    stages = make_stages(here)
    wanted = [name for name in args.only.split(",") if name] or [stage.name for stage in stages]
    unknown = set(wanted) - {stage.name for stage in stages}
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        parser.error(f"no stage {min(unknown)!r}: name some of {names}")
    if args.quick and "gpu" not in here:
        here |= {"gpu", "flash-linear-attention"}  # their quick forms take a CPU, too
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with open(args.out / "check_gpu.log", "w") as log:
        for stage in stages:
            if stage.name in wanted:
                left = args.seconds - (time.monotonic() - started) - GRACE
                outcomes.append(run(stage, here, args.quick, left, log))
                took = time.monotonic() - started
                found = make_json(needs, outcomes)
                (args.out / "check_gpu.json").write_text(json.dumps(found, indent=1) + "\n")
                page = make_page(needs, outcomes, took)
                (args.out / "check_gpu.md").write_text(page)
    print(f"\n{page}\nwritten to {args.out}")
    if all(outcome.status == "left out" for outcome in outcomes):
        return 2
    return int(any(outcome.status == "failed" for outcome in outcomes))


def show_needs(needs: Sequence[Need]) -> None:
    """What is here and what is missing, before anything runs."""
    for need in needs:
        missing = f"missing: left out is {need.without}"
        print(f"{need.name:>20}  {need.found or missing}", flush=True)


def run(stage: Stage, here: set[str], is_quick: bool, seconds: float, log: IO[str]) -> Outcome:
    """Run the stage if it can be; say in a line what became of it."""
    missing = [need for need in stage.needs if need not in here]
    if is_quick and stage.quick is None:
        outcome = Outcome(stage.name, "left out", 0.0, "not under --quick")
    elif missing:
        outcome = Outcome(stage.name, "left out", 0.0, f"needs {', '.join(missing)}")
    elif seconds < LEAST:
        outcome = Outcome(stage.name, "left out", 0.0, "no time is left")
    else:
        with tempfile.TemporaryDirectory() as out:
            outcome = run_stage(stage, is_quick, seconds, Path(out), log)
    text = f"{stage.name:>20}  {outcome.status}, {outcome.seconds:.0f} s, {outcome.detail}"
    print(text, flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
