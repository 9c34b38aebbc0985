"""What would sharing gain here? Reads recorded rollouts and a model's sizes; trains nothing.

``python tools/plan_sharing.py ROLLOUTS --model DIR [--json FILE] [--plot FILE]``
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_pg.data import Group
    from tools.sharing.dims import ModelDims
    from tools.sharing.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Modules are found from the repository root, not from beside this script.
    sys.path[0] = str(ROOT)


def main(argv: list[str] | None = None) -> int:
    """Report on the rollouts named in ``argv``; 2 when an input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rollouts", nargs="+", help="JSONL or parquet, any format of read_rollouts")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with config.json or args.json"
    )
    parser.add_argument("--json", type=Path, help="write what make_report returns here")
    parser.add_argument("--plot", type=Path, help="write a page of plots here")
    parser.add_argument("--tp", type=int, default=1, help="with sequence parallelism")
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1, help="ranks that divide the tokens of a row")
    parser.add_argument("--max-tokens", type=int, help="token budget of a row")
    parser.add_argument("--min-shared", type=int, help="share every run of this length, any depth")
    parser.add_argument(
        "--router-replay", choices=["disabled", "R3"], default="disabled", help="of recorded routes"
    )
    parser.add_argument("--activation-gib", type=float, help="memory of a rank for activations")
    parser.add_argument(
        "--card", choices=["a100", "h100", "h200"], default="h100", help="to predict seconds for"
    )
    parser.add_argument("--bytes-per-value", type=int, default=2, help="4 for fp32")
    parser.add_argument("--format", default="auto", help="format of the rollouts")
    parser.add_argument("--tokenizer", help="for rollouts of text: a Hugging Face tokenizer")
    parser.add_argument(
        "--reward-key",
        action="append",
        default=[],
        help="part of the reward to sum; may be repeated",
    )
    parser.add_argument(
        "--group-across-files", action="store_true", help="equal ids of several files are one group"
    )
    args = parser.parse_args(argv)
    # Once the arguments are read: --help waits for nothing.
    from tools.sharing.render import plot_report, print_report
    from tools.sharing.report import make_report, predict_at

    try:
        settings, dims, tokenizer = _prepare(args)
        groups = _read_groups(args, dims, tokenizer)
        report = make_report(groups, dims, settings)
    except (ValueError, ImportError) as error:
        print(f"plan_sharing: {error}", file=sys.stderr)
        return 2
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        largest = max(report["recommended_max_tokens"], report["max_tokens"])
        multiple = settings.sizes.row_multiple
        budgets = [max(largest * i // 12 // multiple, 1) * multiple for i in range(1, 25)]
        plot_report(report, budgets, predict_at(groups, dims, settings, budgets), args.plot)
    return 0


def _read_groups(args: argparse.Namespace, dims: ModelDims, tokenizer: Any) -> list[Group]:
    """What training would encode. Raises: ValueError when that is nothing."""
    from megatron_pg.data import carried_fields, read_rollouts, without_aborted

    groups = read_rollouts(
        args.rollouts,
        format=args.format,
        tokenizer=tokenizer,
        reward_key=args.reward_key,
        group_across_files=args.group_across_files,
    )
    if not (trained := without_aborted(groups)):
        raise ValueError("every response is aborted or empty: there is nothing to train")
    if args.router_replay == "R3" and "routed_experts" not in carried_fields(trained):
        raise ValueError(
            "--router-replay R3, but the rollouts carry no routed_experts; leave it out"
        )
    routes = dims.mlps.routes
    if args.router_replay == "R3" and routes is not None:
        trained = [routes.of_group(group) for group in trained]
    return trained


def _prepare(args: argparse.Namespace) -> tuple[Settings, ModelDims, Any]:
    """Settings, model and tokenizer. Raises: ValueError that lists all that is wrong with them."""
    from megatron_pg.parallel import ParallelSizes
    from tools.sharing.model import read_model
    from tools.sharing.settings import Settings, raise_problems, setting_problems

    settings = Settings(
        sizes=ParallelSizes(tp=args.tp, sp=args.tp > 1, pp=args.pp, cp=args.cp),
        max_tokens=args.max_tokens,
        min_shared=args.min_shared,
        bytes_per_value=args.bytes_per_value,
        activation_gib=args.activation_gib,
        card=args.card,
        replays_routes=args.router_replay == "R3",
    )
    problems = list(_output_problems(args))
    dims = tokenizer = None
    try:
        dims = read_model(args.model)
    except ValueError as error:
        problems.append(str(error))
    problems += setting_problems(settings, dims)
    if args.tokenizer is not None:
        try:
            tokenizer = _load_tokenizer(args.tokenizer)
        except ValueError as error:
            problems.append(str(error))
    raise_problems(problems)
    assert dims is not None
    return settings, dims, tokenizer


def _output_problems(args: argparse.Namespace) -> Iterator[str]:
    for name, file in (("json", args.json), ("plot", args.plot)):
        if file is not None and not file.parent.is_dir():
            yield f"--{name} {file}: {file.parent} is no folder; create it"
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        yield "--plot needs matplotlib: pip install 'megatron_pg[train]'"


def _load_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        message = "--tokenizer needs transformers: pip install 'megatron_pg[train]'"
        raise ValueError(message) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever transformers and its parsers raise
        raise ValueError(
            f"--tokenizer {name} could not be loaded ({type(error).__name__}: {error}); name a "
            "folder with a tokenizer, or leave it out for rollouts of token ids"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
