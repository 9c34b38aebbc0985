"""Convert a Megatron-LM checkpoint (torch_dist or legacy) to a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import dtype, progress_bar, report_errors


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="new Hugging Face folder")
    parser.add_argument(
        "--hf-config",
        metavar="DIR",
        help="folder with config.json and tokenizer (default: the checkpoint's huggingface/)",
    )
    parser.add_argument("--dtype", type=dtype, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-size-mb", type=int, default=2048, metavar="MB")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle legacy .pt files: this runs code that they may contain",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument(
        "--bridge",
        action="store_true",
        help="by Megatron Bridge, for a family that is not held here; needs --hf-config",
    )
    args = parser.parse_args()
    if args.bridge and args.hf_config is None:
        parser.error("--bridge needs --hf-config DIR")
    from megatron_pg.checkpoint import megatron_to_hf, megatron_to_hf_by_bridge

    if args.bridge:
        options = dict(hf_config=args.hf_config, trust_pickle=args.trust_pickle)
        with report_errors():
            megatron_to_hf_by_bridge(args.megatron, args.out, **options)
        print(f"wrote {args.out}")
        return
    with report_errors(), progress_bar("tensors") as progress:
        has_tokenizer = megatron_to_hf(
            args.megatron,
            args.out,
            hf_config=args.hf_config,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size_mb * 2**20,
            trust_pickle=args.trust_pickle,
            dry_run=args.dry_run,
            progress=progress,
        )
    print(f"{'would write' if args.dry_run else 'wrote'} {args.out}")
    if not has_tokenizer:
        folder = args.hf_config or "the checkpoint's huggingface/"
        print(f"no tokenizer: none in {folder}; pass --hf-config DIR of a folder that has one")


if __name__ == "__main__":
    main()
