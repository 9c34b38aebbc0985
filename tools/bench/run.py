"""Run benchmarks: ``python tools/bench/run.py NAME [NAME ...] [--json FILE] [--plot FILE]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.bench.registry import BenchmarkRow, Options

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(ROOT)
warnings.filterwarnings("ignore", module="megatron")


def main(argv: list[str] | None = None) -> int:
    """Run the named benchmarks, print a table and write what was asked for."""
    is_program = argv is None
    argv = sys.argv[1:] if argv is None else argv
    parser, outside = _make_parsers()
    args = parser.parse_args(argv)
    # Once the arguments are read: --help waits for nothing.
    import torch
    from rich.console import Console

    from tools.bench import (  # noqa: F401
        attention,
        layer,
        linear,
        logprob,
        memory,
        pack,
        prepare,
        resident,
        scale,
        step,
        transparent,
    )
    from tools.bench.machine import describe_machine, keep_freed_memory
    from tools.bench.processes import rows_of_processes
    from tools.bench.registry import BENCHMARKS, BenchmarkMismatch
    from tools.bench.render import make_table, plot_peaks, plot_rows

    if importlib.util.find_spec("verl"):
        from tools.bench import verl  # noqa: F401

    for problem in _problems(args, list(BENCHMARKS), has_cuda=torch.cuda.is_available()):
        parser.error(problem)
    if is_program:
        # Of a process that belongs to the benchmark alone.
        keep_freed_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options = _make_options(args)
    machine = describe_machine(options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows: list[BenchmarkRow] = []
    if args.processes > 1:
        _, inside = outside.parse_known_args(argv)
        try:
            rows = rows_of_processes([sys.executable, __file__, *inside], args.processes)
        except subprocess.CalledProcessError as error:
            return error.returncode
        if args.json:
            write_rows(rows, machine, args.json)
    else:
        try:
            for name in BENCHMARKS if "all" in args.names else args.names:
                for row in BENCHMARKS[name](options):
                    rows.append(row)
                    console.print(f"{name}: {row.shape['name']}", style="dim")
                    if args.json:
                        write_rows(rows, machine, args.json)
        except BenchmarkMismatch as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    console.print(make_table(rows))
    if args.plot:
        drawn = [row.as_json(machine) for row in rows]
        own = {"resident_memory": plot_peaks, "scale": scale.plot_scale}
        plot = own[args.names[0]] if len(args.names) == 1 and args.names[0] in own else plot_rows
        plot(drawn, args.plot)
    return 0


def _make_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Of all options, and of those that are no business of a process among several."""
    outside = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outside.add_argument("--json", type=Path, help="write the rows here")
    outside.add_argument(
        "--processes", type=_positive, default=1, help="medians over so many fresh processes"
    )
    parser = argparse.ArgumentParser(description=__doc__, parents=[outside], allow_abbrev=False)
    parser.add_argument("names", nargs="+", metavar="NAME", help="of tools/bench/README.md, or all")
    parser.add_argument("--plot", type=Path, help="also run the shapes of the figure; its PNG")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--rounds", type=_positive, help="interleaved rounds of every comparison")
    parser.add_argument("--threads", type=_positive, help="of torch (default: torch's own number)")
    parser.add_argument("--shapes", default="", help="only shapes that contain A or B: A,B")
    parser.add_argument(
        "--baselines", default="", help="attention, layer: only baselines that contain A or B: A,B"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        choices=(1, 2),
        help="step, transparent, resident: on so many processes",
    )
    parser.add_argument(
        "--cp", type=_positive, default=1, help="step: on so many context-parallel processes alone"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: shared machine"
    )
    return parser, outside


def _problems(
    args: argparse.Namespace, benchmarks: Sequence[str], *, has_cuda: bool
) -> Iterator[str]:
    """What of the options does not belong together."""
    known = [*benchmarks, "all"]
    if unknown := set(args.names) - set(known):
        yield f"no benchmark {min(unknown)!r}: name one of {', '.join(known)}"
    if args.plot and args.names == ["resident"]:
        yield "resident varies no length: there is nothing to plot"
    if args.clock == "cpu" and has_cuda:
        yield "--clock cpu counts time on cores, the work is on a GPU: leave it out"
    if args.cp > 1 and args.names != ["step"]:
        yield f"--cp is of step, not of {' '.join(args.names)}: leave it out"
    if args.processes > 1 and args.plot:
        yield "--plot draws the rows of one process: leave out --processes"


def _make_options(args: argparse.Namespace) -> Options:
    """What every benchmark reads of them."""
    from tools.bench.registry import Options

    return Options(
        quick=args.quick,
        rounds=args.rounds,
        clock=args.clock,
        sweep=args.plot is not None,
        shapes=_parts(args.shapes),
        baselines=_parts(args.baselines),
        ranks=(args.ranks,) if args.ranks else (1, 2),
        cp=args.cp,
    )


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes 1 or more, got {number}")
    return number


def write_rows(rows: list[BenchmarkRow], machine: dict[str, Any], file: Path) -> None:
    """Write the rows so far, so that a long run that is cut short leaves what it measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row.as_json(machine) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
