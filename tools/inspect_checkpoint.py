"""Show what is in a checkpoint (Hugging Face, torch_dist, legacy) without opening pickles."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import printable, report_errors, with_flags


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    args = parser.parse_args()
    from megatron_pg.checkpoint import inspect_checkpoint

    with report_errors():
        summary = inspect_checkpoint(args.checkpoint)
    print(f"{summary.folder}: {summary.kind}")
    for key, value in summary.facts.items():
        print(f"  {key}: {printable(value)}")
    if summary.tensors:
        print(
            f"  {len(summary.tensors)} tensors, {summary.num_parameters:,} parameters, "
            f"{summary.num_bytes:,} bytes; {len(summary.objects)} pickled objects"
        )
    if args.tensors:
        for name, (shape, dtype) in summary.tensors.items():
            print(f"  {printable(name)} {list(shape)} {str(dtype).removeprefix('torch.')}")
    for note in summary.notes:
        print(f"  note: {with_flags(note)}")


if __name__ == "__main__":
    main()
