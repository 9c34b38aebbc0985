"""Rewrite a Megatron-LM checkpoint for another parallel layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import add_layout, layout_of, progress_bar, report_errors


def main() -> None:
    """Parse the command line and reshard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--tp", type=int, required=True, help="new tensor-parallel size")
    parser.add_argument("--pp", type=int, required=True, help="new pipeline-parallel size")
    add_layout(parser)
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer out")
    parser.add_argument("--hf-config", metavar="DIR", help="folder with the model's config.json")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle legacy .pt files: this runs code that they may contain",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    args = parser.parse_args()
    from megatron_pg.checkpoint import reshard_checkpoint

    with report_errors(), progress_bar("tensors") as progress:
        folder = reshard_checkpoint(
            args.megatron,
            args.out,
            **layout_of(args),
            weights_only=args.weights_only,
            hf_config=args.hf_config,
            trust_pickle=args.trust_pickle,
            dry_run=args.dry_run,
            progress=progress,
        )
    print(f"{'would write' if args.dry_run else 'wrote'} {folder}")


if __name__ == "__main__":
    main()
