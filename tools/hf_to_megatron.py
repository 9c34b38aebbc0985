"""Convert a Hugging Face folder to a Megatron-LM checkpoint (torch_dist)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import add_layout, dtype, layout_of, progress_bar, report_errors


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size to record")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size to record")
    add_layout(parser)
    parser.add_argument("--dtype", type=dtype, help="of the written weights (default: as stored)")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument(
        "--bridge",
        action="store_true",
        help="by Megatron Bridge, for a family that is not held here (at tp=1, as stored)",
    )
    args = parser.parse_args()
    from megatron_pg.checkpoint import hf_to_megatron, hf_to_megatron_by_bridge

    if args.bridge:
        with report_errors():
            print(f"wrote {hf_to_megatron_by_bridge(args.hf, args.out)}")
        return
    with report_errors(), progress_bar("parameters") as progress:
        folder = hf_to_megatron(
            args.hf,
            args.out,
            **layout_of(args),
            dtype=args.dtype,
            make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
            dry_run=args.dry_run,
            progress=progress,
        )
    print(f"{'would write' if args.dry_run else 'wrote'} {folder}")


if __name__ == "__main__":
    main()
