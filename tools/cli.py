"""What the command-line tools share: progress bars, dtypes, one-line errors.

Tools import the package once their arguments are read: ``--help`` waits for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# How a tool spells what the library's errors advise.
_FLAGS = {
    "out_dir=DIR": "--out DIR",
    "hf_config=DIR": "--hf-config DIR",
    "trust_pickle=True": "--trust-pickle",
    "weights_only=True": "--weights-only",
    "dtype=DTYPE": "--dtype DTYPE",
}


def dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16``, ``float16`` (or fp32, bf16, fp16) for argparse."""
    from megatron_pg.checkpoint import parse_dtype

    try:
        found = parse_dtype(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    assert found is not None
    return found


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Options for everything of a layout beside tp and pp, under Megatron-LM's names."""
    parser.add_argument("--vpp", type=int, help="model chunks per pipeline rank")
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel size")
    parser.add_argument("--etp", type=int, help="expert-tensor-parallel size (default: tp)")
    for end in ("first", "last"):
        flag = f"--decoder-{end}-pipeline-num-layers"
        parser.add_argument(flag, type=int, metavar="N", help=f"layers of the {end} stage")
    for what in ("embedding", "loss"):
        flag = f"--account-for-{what}-in-pipeline-split"
        parser.add_argument(flag, action="store_true", help=f"count the {what} as a layer")
    layout = "every chunk by what it holds, such as Ett|tttL"
    parser.add_argument("--pipeline-model-parallel-layout", metavar="TEXT", help=layout)


def layout_of(args: argparse.Namespace) -> dict[str, Any]:
    """What ``hf_to_megatron`` and ``reshard_checkpoint`` are told of a layout."""
    from megatron_pg.parallel import PipelineSplit

    split = PipelineSplit(
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=args.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=args.account_for_loss_in_pipeline_split,
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
    )
    sizes = {f"{name}_size": getattr(args, name) for name in ("tp", "pp", "vpp", "ep", "etp")}
    return sizes | {"split": split}


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A ``progress(done, total)`` that draws a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def report_errors() -> Iterator[None]:
    """Exit with 2 and one clear line for a mistake of the user; other errors keep their trace."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        print(f"error: {with_flags(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def printable(value: object) -> str:
    """A value on one line; what would steer a terminal, or cannot be written to it, is escaped.

    Names and settings in a checkpoint may hold any character.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def with_flags(message: object) -> str:
    """A library's message, printable, with the tools' flags in place of its parameters."""
    return in_flags(printable(message))


def in_flags(text: str) -> str:
    """The same text with the tools' flags in place of a library's parameters."""
    from megatron_pg.parallel import MEGATRON_NAMES

    sizes = {name: size for size, name in MEGATRON_NAMES.items()}
    for parameter, flag in (_FLAGS | sizes).items():
        text = text.replace(parameter, flag)
    return text
