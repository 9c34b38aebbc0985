"""What would sharing gain here? Reads recorded rollouts and a model's sizes; trains nothing.

``python tools/plan_sharing.py ROLLOUTS --model DIR [--json FILE] [--plot FILE]``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(ROOT)

from megatron_pg.data import read_rollouts  # noqa: E402
from tools.sharing.model import read_model  # noqa: E402
from tools.sharing.render import plot_report, print_report  # noqa: E402
from tools.sharing.report import Settings, make_report, predict_at  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Report on the rollouts named in ``argv``; 2 when an input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rollouts", nargs="+", help="JSONL or parquet, any format of read_rollouts")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config.json or args.json"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="write a page of plots here")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, help="token budget of a row")
    parser.add_argument("--min-shared", type=int, help="share every run of this length, any depth")
    parser.add_argument("--activation-gib", type=float, help="memory of a rank for activations")
    parser.add_argument("--bytes-per-value", type=int, default=2, help="4 for fp32")
    parser.add_argument("--format", default="auto", help="format of the rollouts")
    parser.add_argument("--tokenizer", help="for rollouts of text: a Hugging Face tokenizer")
    args = parser.parse_args(argv)
    settings = Settings(
        tp=args.tp,
        pp=args.pp,
        max_tokens=args.max_tokens,
        min_shared=args.min_shared,
        bytes_per_value=args.bytes_per_value,
        activation_gib=args.activation_gib,
    )
    tokenizer = None
    if args.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    try:
        groups = read_rollouts(args.rollouts, format=args.format, tokenizer=tokenizer)
        dims = read_model(args.model)
        report = make_report(groups, dims, settings)
    except ValueError as error:
        print(f"plan_sharing: {error}", file=sys.stderr)
        return 2
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        largest = max(report["recommended_max_tokens"], report["max_tokens"])
        budgets = [max(largest * i // 12 // args.tp * args.tp, args.tp) for i in range(1, 25)]
        plot_report(report, budgets, predict_at(groups, dims, settings, budgets), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
